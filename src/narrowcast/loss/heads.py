"""Chunked cross-entropy for a model and a loop that know nothing of it: one call on the model.

    with chunked_logits(model) as handle:
        ...train as ever...
    handle.chunked_calls, handle.materialised

While the head is being called, F.linear with its weight returns deferred logits in place of the
product. Hooks see to that, rather than a replaced ``forward``: a deep copy of the model takes its
own along, pickling works, other hooks on the head see what they always saw, and an fp32 island
round it still decides in which format it multiplies.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from types import TracebackType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from narrowcast.errors import UsageError
from narrowcast.loss.cross_entropy import CHUNK_BYTES, compute_format
from narrowcast.loss.deferred import DeferredLogits, Record
from narrowcast.loss.forms import Form

__all__ = ["ChunkedLogits", "chunked_logits", "known_head"]

# What heads are called in nanoGPT, timm, torchtune, GPT-NeoX, fairseq and transformers.
_NAMES = ("head", "lm_head", "output", "embed_out", "output_projection", "unembed", "decoder")


class ChunkedLogits:
    """Handle of a head whose logits are deferred; a context manager, and ``remove()`` ends it."""

    def __init__(self, name: str, head: nn.Module, record: Record) -> None:
        self.head = name
        self._record = record
        self._hooks = (
            head.register_forward_pre_hook(_Enter(record)),
            # First of the hooks, and after an exception too: nothing else is to be deferred.
            head.register_forward_hook(_Leave(), prepend=True, always_call=True),
        )

    @property
    def chunked_calls(self) -> int:
        """Losses that were computed in chunks; 0 after a step says that the lever did nothing."""
        return self._record.chunked_calls

    @property
    def deferred_calls(self) -> int:
        """Calls of the head that returned deferred logits."""
        return self._record.deferred_calls

    @property
    def materialised(self) -> list[str]:
        """Names of the operations that needed the whole logits, in the order of their coming."""
        return list(self._record.operations)

    @property
    def widened_products(self) -> int:
        """Products of 16-bit factors that the chunked loss executed in fp32, as it does on a CPU.

        Whoever checks which formats executed expects these.
        """
        return self._record.tally.widened

    def reset(self) -> None:
        """Count from zero again."""
        self._record.chunked_calls = self._record.deferred_calls = self._record.tally.widened = 0
        self._record.operations.clear()

    def remove(self) -> None:
        """Let the head work as it did before."""
        for hook in self._hooks:
            hook.remove()

    def __enter__(self) -> ChunkedLogits:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.remove()


def chunked_logits(
    model: nn.Module, head: str | nn.Module | None = None, *, chunk_bytes: int = CHUNK_BYTES
) -> ChunkedLogits:
    """Make the head of a model return logits that are computed only where they are needed.

    `head` is a module of the model or its dotted name; left out, it is what the model's
    ``get_output_embeddings()`` returns (transformers), or else the one nn.Linear called head,
    lm_head, output and the like. Only while the head is in training mode and gradients are
    recorded; in evaluation, and under torch.compile, it works as it always did.
    """
    name, module = _head_of(model, head)
    if any(isinstance(hook, _Enter) for hook in module._forward_pre_hooks.values()):
        raise UsageError(
            f"the logits of {name!r} are deferred already", hint="remove() the first handle"
        )
    return ChunkedLogits(name, module, Record(chunk_bytes=chunk_bytes))


def known_head(model: nn.Module) -> nn.Module | None:
    """Return the head that `chunked_logits` would find by itself; None if it would find none."""
    try:
        return _head_of(model, None)[1]
    except UsageError:
        return None


def _head_of(model: nn.Module, head: str | nn.Module | None) -> tuple[str, nn.Module]:
    modules = dict(model.named_modules())
    if head is None:
        return _found_head(modules)
    if isinstance(head, str):
        named = [(head, modules[head])] if head in modules else []
    else:
        named = [(name, module) for name, module in modules.items() if module is head]
    if not named:
        raise UsageError(
            f"{head!r} is no module of this {_class(modules)}", hint=_candidates(modules)
        )
    name, module = named[0]
    if not isinstance(module, nn.Linear):
        raise UsageError(
            f"{name!r} is a {type(module).__name__}: only the logits of a linear layer can be "
            "computed in chunks",
            hint=_candidates(modules),
        )
    return name, module


def _found_head(modules: dict[str, nn.Module]) -> tuple[str, nn.Module]:
    names = {module: name for name, module in modules.items()}
    for module in modules.values():  # the model itself, or one that is wrapped in it
        embeddings = getattr(module, "get_output_embeddings", None)
        found = embeddings() if callable(embeddings) else None
        if isinstance(found, nn.Linear) and found in names:
            return names[found], found
    called = [
        (name, module)
        for name, module in modules.items()
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in _NAMES
    ]
    if len(called) != 1:
        raise UsageError(
            f"{len(called)} layers of this {_class(modules)} look like its head"
            + (f": {', '.join(name for name, _ in called)}" if called else ""),
            hint=f"name it: chunked_logits(model, head=...); {_candidates(modules)}",
        )
    return called[0]


def _class(modules: dict[str, nn.Module]) -> str:
    return type(modules[""]).__name__


def _candidates(modules: dict[str, nn.Module]) -> str:
    """List the widest linear layers: a head is wide."""
    linear = [(m.out_features, n) for n, m in modules.items() if isinstance(m, nn.Linear)]
    if not linear:
        return "the model has no linear layer"
    widest = sorted(linear, key=lambda pair: -pair[0])[:6]
    return "linear layers: " + ", ".join(f"{name!r} ({width} wide)" for width, name in widest)


class _Open(threading.local):
    """The heads that a thread is inside of, each with its mode."""

    def __init__(self) -> None:
        self.stack: list[tuple[nn.Module, _DeferProduct]] = []


_OPEN = _Open()


class _Enter:
    """Forward pre-hook: from here on, in training, the head's product is deferred."""

    def __init__(self, record: Record) -> None:
        self.record = record

    def __call__(self, module: nn.Module, args: Any) -> None:
        deferring = module.training and torch.is_grad_enabled()
        if deferring and not torch.compiler.is_compiling():
            assert isinstance(module, nn.Linear)
            mode = _DeferProduct(module.weight, self.record)
            mode.__enter__()  # type: ignore[no-untyped-call]
            _OPEN.stack.append((module, mode))


class _Leave:
    """Forward hook: F.linear is F.linear again."""

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        stack = _OPEN.stack
        # A KeyboardInterrupt inside a head skips its hook; its entry is passed over here.
        while stack and any(entered is module for entered, _ in stack):
            entered, mode = stack.pop()
            mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]
            if entered is module:
                return


class _DeferProduct(TorchFunctionMode):
    """Answers F.linear with one weight by deferred logits, once, and everything else as ever."""

    def __init__(self, weight: Tensor, record: Record) -> None:
        super().__init__()
        self._weight: Tensor | None = weight
        self._record = record

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        ours = func is F.linear and len(args) > 1 and args[1] is self._weight
        if ours and args[0].shape[-1:] == args[1].shape[1:]:  # else F.linear says what is wrong
            self._weight = None  # whoever needs the logits now multiplies
            return _defer(self._record, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _defer(
    record: Record, hidden: Tensor, weight: Tensor, bias: Tensor | None = None
) -> DeferredLogits:
    compute = compute_format(hidden, weight)
    form = Form(
        hidden=hidden,
        weight=weight,
        bias=bias,
        compute=compute,
        dtype=compute,
        class_dim=hidden.dim() - 1,
    )
    record.deferred_calls += 1
    return DeferredLogits.of(form, record)
