"""A model under torch.compile that gives what it gives without: what has to be set, and is counted.

torch.compile as it comes differs from eager training in ways that matter to a precision, and
each is settled here:

    autocast in backward   a graph is traced under the autocast of its forward pass, backward as
                           well, so that an fp32 island gets a 16-bit backward: switched off
    random numbers         are drawn as torch draws them; the compiler has a generator of its own
    traces on disk         are not used, as torch 2.11 takes those of another format for its own
    shapes                 get one graph each, so that no step depends on the shapes before it

What is compiled is the call of the model, its hooks included, and nothing else: loss, optimizer and
scaler stay as they are. Names and classes of the model do too.
"""

from __future__ import annotations

import sysconfig
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor  # has no public name
from torch.utils._pytree import tree_leaves  # torch's only walker of nests

from narrowcast.errors import UnknownName, UsageError
from narrowcast.precision.executed import ExecutedDtypes
from narrowcast.precision.float8 import emulated_product
from narrowcast.records.compilation import Compilation

__all__ = [
    "BACKENDS",
    "CompiledCall",
    "backend_named",
    "compile_model",
    "compiled_call",
    "eagerly",
    "is_compiled",
    "leave_uncompiled",
]

BACKENDS = ("inductor", "aot_eager")
"""torch's compilers that this is tested with: its own, and graphs of operations run one by one."""

_LIMIT = "recompile limit"  # as torch's reason says that it will compile this code no more

# torch._dynamo takes 3 s to import, and few trainings compile: what needs it imports it.
Compiler = Callable[[fx.GraphModule, list[Any]], Callable[..., Any]]


def backend_named(asked: bool | str) -> str:  # noqa: FBT001 -- True, or a name
    """Return the backend that is asked for: True asks for inductor, False for none ('')."""
    name = (BACKENDS[0] if asked else "") if isinstance(asked, bool) else asked
    if name and name not in BACKENDS:
        raise UnknownName.of("backend of torch.compile", name, BACKENDS)
    return name


def is_compiled(model: nn.Module) -> bool:
    """Whether the model or a module of it runs as compiled code, which calls no hooks inside."""
    return any(
        type(module).__name__ == "OptimizedModule"
        or getattr(module, "_compiled_call_impl", None) is not None
        or getattr(module, "_compiler_ctx", None) is not None  # Lightning: it compiled its steps
        for module in model.modules()
    )


def compiled_call(model: nn.Module) -> CompiledCall | None:
    """Return what `compile_model` put on this very model; None without it."""
    found = getattr(model, "_compiled_call_impl", None)
    return found if isinstance(found, CompiledCall) else None


def eagerly(model: nn.Module) -> AbstractContextManager[object]:
    """Run a compiled model, or compiled parts of it, as if it were not, in the block.

    Under a mode that watches operations torch does so by itself, and never compiles again what it
    first met there (2.11, 2.13); after this block it does.
    """
    if not is_compiled(model):
        return nullcontext()
    uncompiled: AbstractContextManager[object] = torch.compiler.set_stance("force_eager")
    return uncompiled


def leave_uncompiled(model: nn.Module) -> None:
    """Take off what `compile_model` put on."""
    if compiled_call(model) is not None:
        model._compiled_call_impl = None


def compile_model(
    model: nn.Module, backend: str, *, device_type: str, checkpoints: bool = False
) -> CompiledCall:
    """Compile the calls of a model in place, from the next one on; returns what counts them.

    `checkpoints` says that the model runs parts of itself again in backward. State dict, class and
    deep copies of the model are as before. Raises UsageError for a model that is compiled already,
    and where the backend lacks its own compiler.
    """
    leave_uncompiled(model)
    if is_compiled(model):
        raise UsageError(
            "the model is compiled already, in whole or in part",
            hint="pass it as it was before torch.compile, or leave compile out",
        )
    missing = _missing_for(device_type) if backend == "inductor" else ""
    if missing:
        raise UsageError(
            f"torch.compile needs {missing} to compile for {device_type}",
            hint="install it, or train without compile",
        )
    # In one piece, so that the mark by which its products are counted is in the graph.
    torch.compiler.allow_in_graph(emulated_product)  # type: ignore[no-untyped-call]
    made = CompiledCall(model, backend, checkpoints=checkpoints)
    model._compiled_call_impl = made  # where nn.Module.compile puts its own
    return made


def _missing_for(device_type: str) -> str:
    """Name what inductor lacks on this machine, before minutes are spent; '' for nothing."""
    if device_type == "cuda":
        from torch.utils._triton import has_triton

        return "" if has_triton() else "Triton"
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return "a C++ compiler (g++, or the one that CXX names)"
    header = Path(sysconfig.get_path("include")) / "Python.h"
    return "" if header.exists() else f"Python's own header files ({header}; python3-dev)"


class CompiledCall:
    """What stands in place of a model's call: the compiled one, and what became of it."""

    def __init__(self, model: nn.Module, backend: str, *, checkpoints: bool) -> None:
        self.backend = backend
        self._executed = ExecutedDtypes()
        self._read: set[int] = set()
        self._graphs = self._recompiles = 0
        self._breaks: Counter[str] = Counter()
        self._fell_back = False
        self._compiler = _compiler(backend)
        self._around = _checkpoints_note_themselves if checkpoints else nullcontext

        def call(*args: Any, **kwargs: Any) -> Any:
            return model._call_impl(*args, **kwargs)  # type: ignore[no-untyped-call]

        # Code of its own: torch keeps graphs, and their largest number, by the code.
        call.__code__ = call.__code__.replace(co_name=f"call_of_{type(model).__name__}")
        from torch._dynamo.exc import TorchDynamoException
        from torch._dynamo.utils import counters

        self._failures = TorchDynamoException
        self._counters = counters
        self._compiled = torch.compile(call, backend=self._compile, dynamic=False)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        before = self._troubles()
        try:
            with self._around():
                return self._compiled(*args, **kwargs)
        except self._failures as error:
            raise _failure(self.backend, error) from error
        finally:
            if (now := self._troubles()) != before:
                self._note(now[0] - before[0], now[1] - before[1])

    @property
    def counts(self) -> dict[str, dict[str, int]]:
        """Kind of operation -> format -> calls, in the first graphs that were made for training."""
        return self._executed.counts

    def has_read(self, weight: nn.Parameter) -> bool:
        """Whether a graph has this parameter among its inputs."""
        return id(weight) in self._read

    def record(self) -> Compilation:
        """Return what was compiled so far."""
        return Compilation(
            backend=self.backend,
            graphs=self._graphs,
            recompiles=self._recompiles,
            graph_breaks=dict(self._breaks),
            fell_back=self._fell_back,
        )

    def _compile(self, graph: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        import torch._functorch.config as functorch
        from torch._guards import CompileContext

        self._graphs += 1
        made = CompileContext.current_compile_id()  # of this code, the first has number 0
        is_anew = made is not None and bool(made.frame_compile_id)
        self._recompiles += is_anew
        if torch.is_grad_enabled() and not is_anew:
            self._read.update(id(each) for each in inputs if isinstance(each, nn.Parameter))
            _count_executed(graph, self._executed)
        # Torch 2.11 keeps traces on disk under a key that knows not which format autocast had:
        # bf16 then ran a graph in fp16. What inductor made of a trace is kept under the trace.
        settings: dict[str, Any] = {"backward_pass_autocast": "off", "enable_autograd_cache": False}
        with functorch.patch(settings):
            return self._compiler(graph, inputs)

    def _troubles(self) -> tuple[Counter[str], Counter[str]]:
        """Return torch's own counts, which are of the whole process."""
        counters = self._counters
        return Counter(counters["graph_break"]), Counter(counters["unimplemented"])

    def _note(self, breaks: Counter[str], untraced: Counter[str]) -> None:
        """Take note of what one call added to these counts."""
        for reason, number in breaks.items():
            self._breaks[reason.partition("\n")[0]] += number
        self._fell_back = self._fell_back or any(_LIMIT in reason for reason in untraced)


def _compiler(backend: str) -> Compiler:
    if backend == "inductor":
        from torch._inductor.compile_fx import compile_fx

        # Dropout as in eager code, from torch's generators, and not from one of the compiler's.
        def inductor(graph: fx.GraphModule, inputs: list[Any]) -> Any:
            return compile_fx(graph, inputs, config_patches={"fallback_random": True})

        return inductor
    from torch._dynamo.backends.registry import lookup_backend

    found: Compiler = lookup_backend(backend)
    return found


def _checkpoints_note_themselves() -> AbstractContextManager[object]:
    """Let a checkpointed part leave notes in Python (an island was entered), once and not twice."""
    import torch._dynamo.config as dynamo

    patched: AbstractContextManager[object] = dynamo.patch(
        skip_fwd_side_effects_in_bwd_under_checkpoint=True
    )
    return patched


def _count_executed(graph: fx.GraphModule, counting: ExecutedDtypes) -> None:
    """Count what a graph and its backward pass execute, on tensors without values.

    Compiled code calls few of torch's operations, so that they cannot be counted as they execute.
    """
    inputs = [n.meta.get("example_value") for n in graph.graph.nodes if n.op == "placeholder"]
    wanted = [each for each in inputs if isinstance(each, Tensor) and each.requires_grad]
    fake = next((each.fake_mode for each in inputs if isinstance(each, FakeTensor)), nullcontext())
    with fake, counting:  # new tensors are to have no values either
        outputs = [each for each in tree_leaves(graph(*inputs)) if isinstance(each, Tensor)]
        ends = [each for each in outputs if each.requires_grad]
        if ends and wanted:
            with torch._C._DisableAutocast():
                seeds = [torch.ones_like(each) for each in ends]
                torch.autograd.grad(ends, wanted, seeds, allow_unused=True)


def _failure(backend: str, error: Exception) -> UsageError:
    root: BaseException = getattr(error, "inner_exception", error)
    while root.__cause__ is not None:
        root = root.__cause__
    said = next((line for line in str(root).splitlines() if line.strip()), "")
    return UsageError(
        f"{backend} could not compile the model: {type(root).__name__}: {said}",
        hint="train without compile; TORCH_LOGS=+dynamo,+inductor shows what it tried. A killed "
        "compilation leaves torn files behind: another TORCHINDUCTOR_CACHE_DIR begins anew",
    )
