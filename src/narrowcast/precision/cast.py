"""How a module is made to obey a policy, and how it is evaluated in full precision.

Four things, all reversible and none of them silent:

    prepare_model      weights in the policy's storage format; islands that stay in fp32
    forward_context    what the forward pass runs under: autocast, or nothing
    full_precision     evaluation in fp32 from the stored weights, whatever surrounds it
    numeric_settings   the process-wide switches (TF32 and oneDNN's equivalents) behind "fp32"
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import TracebackType

import torch
from torch import Tensor, nn

from narrowcast.errors import UnknownName, UsageError
from narrowcast.policy import Policy
from narrowcast.precision.autocast_rules import Rehearsal, rehearse
from narrowcast.precision.full_precision import full_precision, own_tensors
from narrowcast.precision.functions import EnterFunctions, LeaveFunctions
from narrowcast.precision.islands import HOOKS, CastInputs, CastOutputs, EnterIsland, LeaveIsland

__all__ = [
    "AutocastContext",
    "backward_context",
    "format_name",
    "forward_context",
    "full_precision",
    "kept_parameters",
    "numeric_settings",
    "prepare_model",
    "settings_hold",
    "torch_dtype",
    "weights_became",
]

_DTYPES = {
    "fp32": torch.float32,
    "tf32": torch.float32,  # a way to multiply fp32 tensors, not a way to store them
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "e4m3": torch.float8_e4m3fn,
    "e5m2": torch.float8_e5m2,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items() if name != "tf32"}


def torch_dtype(name: str) -> torch.dtype:
    """Return the dtype that holds numbers of this format; tf32 is held as fp32.

    Raises UnknownName with the nearest match.
    """
    if name not in _DTYPES:
        raise UnknownName.of("float format", name, _DTYPES)
    return _DTYPES[name]


def format_name(dtype: torch.dtype) -> str:
    """Return our name of a dtype, or torch's own ('int64') for one that is no format of ours."""
    return _NAMES.get(dtype) or str(dtype).removeprefix("torch.")


class AutocastContext:
    """Autocast for one device type, without ``torch.autocast``'s per-construction checks.

    Reusable and re-entrant: the state before each entry is kept on a stack. Enter it in one thread
    at a time, as autocast's own state is per thread.
    """

    __slots__ = ("_before", "_device_type", "_dtype")

    def __init__(self, device_type: str, dtype: torch.dtype) -> None:
        self._device_type = device_type
        self._dtype = dtype
        self._before: list[tuple[bool, torch.dtype, bool]] = []

    def __enter__(self) -> None:
        device_type = self._device_type
        self._before.append(
            (
                torch.is_autocast_enabled(device_type),
                torch.get_autocast_dtype(device_type),
                torch.is_autocast_cache_enabled(),
            )
        )
        torch.set_autocast_enabled(device_type, True)
        torch.set_autocast_dtype(device_type, self._dtype)
        torch.autocast_increment_nesting()
        torch.set_autocast_cache_enabled(True)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if torch.autocast_decrement_nesting() == 0:
            torch.clear_autocast_cache()
        enabled, dtype, cache = self._before.pop()
        torch.set_autocast_enabled(self._device_type, enabled)
        torch.set_autocast_dtype(self._device_type, dtype)
        torch.set_autocast_cache_enabled(cache)


class _RehearsedAutocast:
    """CPU autocast that follows CUDA's cast lists."""

    __slots__ = ("_autocast", "_rules")

    def __init__(self, autocast: AutocastContext, rules: Rehearsal) -> None:
        self._autocast = autocast
        self._rules = rules

    def __enter__(self) -> None:
        self._rules.__enter__()
        self._autocast.__enter__()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._autocast.__exit__(kind, error, trace)
        self._rules.__exit__(kind, error, trace)


_HOOKS = (*HOOKS, EnterFunctions, LeaveFunctions)
_NOTHING: AbstractContextManager[None] = nullcontext()

# Running statistics in bf16 do not move by less than a 512th, and torch's kernels take 16-bit
# inputs beside fp32 weights and statistics: so these keep fp32 in every precision.
_KEPT_KINDS = (nn.modules.batchnorm._BatchNorm,)


def _rehearses(policy: Policy, device_type: str) -> bool:
    return policy.autocasts and policy.autocast_rules == "cuda" and device_type == "cpu"


def forward_context(policy: Policy, device_type: str) -> AbstractContextManager[None]:
    """Return what forward pass and loss run under; make it once and enter it every step.

    Autocast for the mixed policies, nothing otherwise. With ``autocast_rules="cuda"`` on a CPU
    the casts are those that CUDA would make.
    """
    if not policy.autocasts:
        return _NOTHING
    autocast = AutocastContext(device_type, torch_dtype(policy.compute))
    if _rehearses(policy, device_type):
        return _RehearsedAutocast(autocast, rehearse("cuda"))
    return autocast


def backward_context(policy: Policy, device_type: str) -> AbstractContextManager[None]:
    """Return what the backward pass runs under: nothing, but for a rehearsal of CUDA's casts.

    Activation checkpointing runs parts of the forward pass again inside backward and turns
    autocast on for them; the rehearsed rules must then be in force as well.
    """
    return rehearse("cuda") if _rehearses(policy, device_type) else _NOTHING


def prepare_model(model: nn.Module, policy: Policy, device: torch.device | str) -> tuple[str, ...]:
    """Move a model to the device and make it obey the policy, in place.

    Weights and floating-point buffers take ``policy.param``; parameters stay the same objects, so
    an optimizer made before keeps working. Modules in ``policy.keep_fp32`` hold fp32 weights, get
    fp32 inputs and run with autocast off. Where weights are not fp32 there is no autocast to insert
    casts, so inputs are cast where the model is entered, outputs to ``policy.output`` where it is
    left, and outputs of fp32 islands back to the compute format.

    Buffers of fp64 stay so where the policy stores fp32, as they do in a plain loop; 16-bit formats
    narrow them. Returns notes on what was cast.

    A second call replaces the first one's effect. Raises UsageError for a pattern that matches no
    module, for a weight shared between an island and a 16-bit module, and for fp64 weights.
    """
    kept = _kept_modules(model, policy)
    _require_no_fp64(model, policy)
    _remove_hooks(model)
    model.to(device)
    notes = _cast_weights(model, list(kept), torch_dtype(policy.param))
    for module, entry in kept.items():
        module.register_forward_pre_hook(EnterIsland(entry), with_kwargs=True, prepend=True)
        module.register_forward_hook(LeaveIsland(), always_call=True)
    compute = torch_dtype(policy.compute)
    _keep_functions(model, policy, None if policy.keeps_master else compute)
    if policy.keeps_master:
        return notes
    within = {id(m) for module in kept for m in module.modules() if m is not module}
    for module in kept:
        if module is not model and id(module) not in within:
            module.register_forward_hook(CastOutputs(compute))
    if model not in kept:
        model.register_forward_pre_hook(CastInputs(compute), with_kwargs=True, prepend=True)
    model.register_forward_hook(CastOutputs(torch_dtype(policy.output)))
    return notes


def _keep_functions(model: nn.Module, policy: Policy, dtype: torch.dtype | None) -> None:
    """Put the modes that compute single functions in fp32 on the modules that call them."""
    for name, module in model.named_modules():
        functions = policy.functions_kept(name)
        if functions:
            enter = EnterFunctions(functions, dtype)
            module.register_forward_pre_hook(enter)
            module.register_forward_hook(LeaveFunctions(), always_call=True)


def _require_no_fp64(model: nn.Module, policy: Policy) -> None:
    """Raise UsageError for weights of which half the digits would be lost without a word."""
    wide = [name for name, p in model.named_parameters() if p.dtype is torch.float64]
    if wide:
        more = f" and {len(wide) - 3} more" if len(wide) > 3 else ""
        raise UsageError(
            f"{', '.join(wide[:3])}{more} are fp64, and policy {policy.name!r} stores weights in "
            f"{policy.param}",
            hint="call model.float() first if fp32 is enough; what needs fp64 needs a plain loop",
        )


def kept_parameters(model: nn.Module, policy: Policy) -> list[nn.Parameter]:
    """List the parameters that stay fp32 under the policy: of fp32 islands, and of batch norms."""
    kept = [*_kept_modules(model, policy)]
    if policy.param != "fp32":
        kept += [module for module in model.modules() if isinstance(module, _KEPT_KINDS)]
    return [p for module in dict.fromkeys(kept) for p in module.parameters()]


def _kept_modules(model: nn.Module, policy: Policy) -> dict[nn.Module, str]:
    """Map modules that the policy keeps to the entry that does; every entry must match one."""
    named = [
        (name, module, tuple(f"{c.__module__}.{c.__qualname__}" for c in type(module).__mro__))
        for name, module in model.named_modules()
    ]
    entries: dict[nn.Module, str] = {}
    for entry in policy.keep_fp32:
        one = dataclasses.replace(policy, keep_fp32=(entry,))
        matched = [module for name, module, classes in named if one.keeps(name, classes)]
        if not matched and not any(one.functions_kept(name) for name, _, _ in named):
            raise _no_match(entry, [n for n, _, _ in named if n], [c[0] for *_, c in named])
        for module in matched:
            entries.setdefault(module, entry)
    return {module: entries[module] for _, module, _ in named if module in entries}


_LISTED = 12  # module names in a hint: two lines of a terminal


def _no_match(entry: str, names: list[str], classes: list[str]) -> UsageError:
    """Say that an entry of keep_fp32 matches nothing, with the names that exist."""
    message = f"keep_fp32 entry {entry!r} matches no module of the model"
    if not names:
        return UsageError(
            message, hint="the model has no named modules; '*' keeps all of it in fp32"
        )
    known = sorted(set(names) | {f"class:{c}" for c in classes})
    near = difflib.get_close_matches(entry, known, n=1, cutoff=0.5)
    guess = f"did you mean {near[0]!r}? " if near else ""
    more = f", and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return UsageError(
        message,
        hint=f"{guess}entries are globs on dotted module names, or classes; "
        f"modules: {', '.join(names[:_LISTED])}{more}",
    )


def _remove_hooks(model: nn.Module) -> None:
    """Take our own hooks off, and nobody else's."""
    for module in model.modules():
        for hooks in (
            module._forward_pre_hooks,
            module._forward_hooks,
        ):
            for key in [k for k, hook in hooks.items() if isinstance(hook, _HOOKS)]:
                del hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)
                module._forward_hooks_always_called.pop(key, None)


def _cast_weights(model: nn.Module, kept: list[nn.Module], dtype: torch.dtype) -> tuple[str, ...]:
    """Give islands and batch norms fp32 and all else `dtype`; returns what is to be said of it.

    Integers and complex numbers stay as they are, and fp64 where it would become fp32.
    """
    island = {id(m) for root in kept for m in root.modules()}
    island |= {id(m) for m in model.modules() if isinstance(m, _KEPT_KINDS)}
    targets: dict[int, tuple[str, Tensor, torch.dtype]] = {}
    for module_name, module in model.named_modules():
        wanted = torch.float32 if id(module) in island else dtype
        for name, tensor in own_tensors(module):
            first = targets.setdefault(id(tensor), (f"{module_name}.{name}", tensor, wanted))
            if first[2] != wanted:
                raise UsageError(
                    f"weight {first[0]} is shared with {module_name}.{name}, and only one of the "
                    "two modules is kept in fp32",
                    hint="keep both modules in fp32, or neither",
                )
    cast: dict[tuple[torch.dtype, torch.dtype], list[str]] = {}
    for name, tensor, wanted in targets.values():
        before = tensor.dtype
        if before != wanted and not (before is torch.float64 and wanted is torch.float32):
            cast.setdefault((before, wanted), []).append(name.removeprefix("."))
            gradient, tensor.grad = tensor.grad, None
            tensor.data = tensor.data.to(wanted)
            if gradient is not None:
                tensor.grad = gradient.to(wanted)
    return tuple(_said_of(cast))


def _said_of(cast: Mapping[tuple[torch.dtype, torch.dtype], list[str]]) -> Iterator[str]:
    """Say which weights and buffers took another format: fp64 ones by name, as they lose most."""
    for (before, after), names in cast.items():
        if before is torch.float64:
            yield f"fp64 buffers became {format_name(after)}: {', '.join(names)}"
        else:
            named = names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")
            yield f"{weights_became(format_name(before), format_name(after))}: {named}"


def weights_became(before: str, after: str) -> str:
    """Return how a note on weights and buffers that were cast begins."""
    return f"{before} weights became {after}"


# Where "fp32" may silently mean less: (backend, operation) of torch's own switches. cuDNN's
# convolutions are in TF32 unless told otherwise; oneDNN follows torch.set_float32_matmul_precision.
_SWITCHES = tuple((b, op) for b in ("cuda", "mkldnn") for op in ("matmul", "conv", "rnn"))
_FULL = ("none", "ieee")


@contextmanager
def numeric_settings(policy: Policy) -> Iterator[None]:
    """Make fp32 mean what the policy says, process-wide, and leave everything as it was found.

    Policy tf32 allows TF32 in CUDA's matrix products, convolutions and recurrent nets; every other
    policy computes what it computes in fp32 with all mantissa bits, on CUDA and in oneDNN. The
    reductions inside 16-bit matrix products (``allow_bf16_reduced_precision_reduction`` and its
    like) stay at torch's defaults, as in the plain ``torch.amp`` loop that we are compared with.
    """
    if settings_hold(policy, "cpu") and settings_hold(policy, "cuda"):
        yield
        return
    tf32 = policy.compute == "tf32"
    wanted = {s: "tf32" if tf32 and s[0] == "cuda" else "ieee" for s in _SWITCHES}
    before = {s: torch._C._get_fp32_precision_getter(*s) for s in _SWITCHES}
    legacy = _legacy_switches()
    try:
        _set_switches((tf32, tf32) if legacy else None, None, wanted)
        yield
    finally:
        _set_switches(legacy and legacy[:2], legacy and legacy[2], before)


def settings_hold(policy: Policy, device_type: str) -> bool:
    """Whether `numeric_settings` would change nothing that this type of device reads (< 1 us)."""
    backend = "mkldnn" if device_type == "cpu" else device_type
    accepted = ("tf32",) if policy.compute == "tf32" and backend == "cuda" else _FULL
    read = torch._C._get_fp32_precision_getter
    return (
        read(backend, "matmul") in accepted
        and read(backend, "conv") in accepted
        and read(backend, "rnn") in accepted
    )


def _legacy_switches() -> tuple[bool, bool, str] | None:
    """Read the older flags; None if the newer ones were set without them, when reading raises."""
    try:
        return (
            torch.backends.cuda.matmul.allow_tf32,
            torch.backends.cudnn.allow_tf32,
            torch.get_float32_matmul_precision(),
        )
    except RuntimeError:
        return None


def _set_switches(
    allow_tf32: tuple[bool, bool] | None,
    matmul_precision: str | None,
    precisions: dict[tuple[str, str], str],
) -> None:
    """Set the older flags (matrix products, cuDNN) and then the newer ones, which decide.

    Both, because code that reads an older flag is refused by torch when the two disagree.
    """
    if allow_tf32 is not None:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = allow_tf32
    if matmul_precision is not None:
        torch.set_float32_matmul_precision(matmul_precision)
    for (backend, op), precision in precisions.items():
        inherited = precision == torch._C._get_fp32_precision_getter(backend, "all")
        torch._C._set_fp32_precision_setter(backend, op, "none" if inherited else precision)
