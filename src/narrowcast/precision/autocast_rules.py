"""CUDA's autocast rehearsed on a CPU.

Autocast on a CPU is another policy than autocast on CUDA: softmax, layer_norm, exp, sum and a dozen
more keep fp32 on CUDA and stay in 16 bits on a CPU. A rehearsal makes CPU autocast cast exactly as
CUDA's would, so that a laptop sees the numerics, and the saved tensors, that a GPU will have.

How: autocast is a dispatch key, ``AutocastCPU``, with a kernel for each listed operation. While a
rehearsal is on, the kernels of the operations that differ are overridden from Python, for real and
for fake tensors alike; the others keep torch's own. ``cast_lists`` says which is on which list.
"""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Callable
from functools import lru_cache
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from narrowcast.errors import UnknownName, UnsupportedPrecision
from narrowcast.precision.cast_lists import CPU_LISTS, CUDA_LISTS, CastLists

__all__ = ["CPU_LISTS", "CUDA_LISTS", "CastLists", "Rehearsal", "rehearse"]


# CUDA's recurrent layers are cast by a wrapper of cuDNN's own, on no list. A CPU's LSTM arrives at
# this operation instead, and 16-bit results are what both give, so it keeps its native rule.
_STAND_INS = {"mkldnn_rnn_layer"}
# Registered for CUDA by wrappers of their own, in builds with these libraries.
_VENDOR_OPS = {"_cudnn_rnn", "miopen_rnn"}
# CUDA computes these in 16 bits where a CPU (avg_pool3d: up to torch 2.13, trace: 2.11) cannot.
_WITHOUT_CPU_KERNEL = {"avg_pool3d", "trace"}
_AUTOCAST_CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)


class _WeightCasts:
    """Casts of fp32 weights made by our kernels, alive as long as torch's own in the same region.

    Torch drops its cache when the outermost autocast region ends, and says so to nobody. A witness
    tells us: a weight of ours whose cast lives in that cache, and is seen to die with it.
    """

    def __init__(self) -> None:
        self._casts: dict[tuple[int, torch.dtype, bool], tuple[weakref.ref[Tensor], Tensor]] = {}
        self._weight: Tensor | None = None
        self._witness: weakref.ref[Tensor] | None = None

    def cast(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the cast of this weight in the current autocast region, made at most once.

        A cast made without gradients is not reused where they are recorded: it leads nowhere.
        """
        if self._witness is None or self._witness() is None:
            self._casts.clear()
            self._witness = weakref.ref(self._cached_by_torch(), lambda _: self._casts.clear())
        key = (id(weight), dtype, torch.is_grad_enabled())
        known = self._casts.get(key)
        if known is not None and known[0]() is weight:
            return known[1]
        made = weight.to(dtype)
        self._casts[key] = (weakref.ref(weight), made)
        return made

    def _cached_by_torch(self) -> Tensor:
        """Let torch's own kernel of mm cast a weight of ours, and fetch the cast that it caches.

        A product with an empty matrix computes nothing, and autograd saves the cast for backward.
        Outside of all modes: it is no operation of the user's.
        """
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            torch._C._DisableTorchDispatch(),
            torch._C._ForceDispatchKeyGuard(
                torch._C._dispatch_tls_local_include_set() | _AUTOCAST_CPU,
                torch._C._dispatch_tls_local_exclude_set().remove(torch._C.DispatchKey.AutocastCPU),
            ),
        ):
            if self._weight is None:
                self._weight = torch.zeros(1, 1, requires_grad=True)
            empty = torch.zeros(1, 0, requires_grad=True)
            product = torch.ops.aten.mm.default(self._weight, empty)
            cast: Tensor = product.grad_fn._saved_self
            return cast

    def clear(self) -> None:
        self._casts.clear()


_WEIGHT_CASTS = _WeightCasts()


def _is_eligible(value: Any) -> bool:
    """Whether autocast would touch this argument: a floating-point CPU tensor, but not fp64."""
    return (
        isinstance(value, Tensor)
        and value.is_floating_point()
        and value.dtype != torch.float64
        and value.device.type == "cpu"
    )


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """Cast one argument, or each of a list, as ``at::autocast::cached_cast`` does."""
    if isinstance(value, (list, tuple)):
        return [_cast(item, dtype) for item in value]
    if not _is_eligible(value) or value.dtype == dtype:
        return value
    is_weight = value.dtype == torch.float32 and value.is_leaf and value.requires_grad
    if (
        is_weight
        and dtype == torch.get_autocast_dtype("cpu")
        and torch.is_autocast_cache_enabled()
        and not value._is_view()
    ):
        return _WEIGHT_CASTS.cast(value, dtype)
    return value.to(dtype)


def _widest(args: tuple[Any, ...]) -> torch.dtype:
    """Return fp32 if any argument is, else the autocast dtype; fp64 does not count.

    Raises UnsupportedPrecision, as CUDA raises RuntimeError, for the other 16-bit format.
    """
    lower = torch.get_autocast_dtype("cpu")
    dtypes = {
        item.dtype
        for value in args
        for item in (value if isinstance(value, (list, tuple)) else (value,))
        if _is_eligible(item)
    }
    if torch.float32 in dtypes:
        return torch.float32
    if dtypes - {lower}:
        raise UnsupportedPrecision(
            f"CUDA's autocast to {lower} refuses an input of {(dtypes - {lower}).pop()} here",
            hint="keep the model in fp32 or in the autocast format, not in the other 16-bit one",
        )
    return lower


_Kernel = Callable[..., Any]


def _casting(op: _Kernel, dtype_for: Callable[[tuple[Any, ...]], torch.dtype]) -> _Kernel:
    """Build the kernel of an operation whose inputs are cast: lower, fp32, promote."""

    def kernel(*args: Any, **kwargs: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST_CPU):
            dtype = dtype_for(args)
            cast = {name: _cast(value, dtype) for name, value in kwargs.items()}
            return op(*(_cast(value, dtype) for value in args), **cast)

    return kernel


def _setting_dtype(op: Any) -> _Kernel:
    """Build the kernel of an operation that is asked for an fp32 result unless it has a dtype."""
    names = [a.name for a in op._schema.arguments]
    place = names.index("dtype")

    def kernel(*args: Any, **kwargs: Any) -> Any:
        given = args[place] if place < len(args) else kwargs.get("dtype")
        with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST_CPU):
            if given is not None or not _is_eligible(args[0]):
                return op(*args, **kwargs)
            return op(*args[:place], **{**kwargs, "dtype": torch.float32})

    return kernel


def _appending_dtype(op: Any) -> _Kernel:
    """Build the kernel of ``norm``, whose overloads without a dtype are sent to those with one."""
    overload = "ScalarOpt" if op._overloadname == "Scalar" else op._overloadname
    target = getattr(torch.ops.aten.norm, f"{overload}_dtype")
    parameters = [(a.name, a.default_value) for a in op._schema.arguments]

    def kernel(*args: Any, **kwargs: Any) -> Any:
        rest = [kwargs.get(name, default) for name, default in parameters[len(args) :]]
        dtype = torch.float32 if _is_eligible(args[0]) else args[0].dtype
        with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST_CPU):
            return target(*args, *rest, dtype=dtype)

    return kernel


def _rounding_back(op: _Kernel) -> _Kernel:
    """Build the kernel of an operation that a CPU lacks in 16 bits: in fp32, rounded at the end."""

    def kernel(value: Tensor, *args: Any, **kwargs: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST_CPU):
            if not _is_eligible(value):
                return op(value, *args, **kwargs)
            return op(value.float(), *args, **kwargs).to(value.dtype)

    return kernel


def _refusing(op: Any) -> _Kernel:
    def kernel(*args: Any, **kwargs: Any) -> Any:
        raise UnsupportedPrecision(
            f"{op._schema.name.removeprefix('aten::')} is refused by CUDA's autocast: its gradient "
            "overflows 16 bits where the probability is near 0 or 1",
            hint="use binary_cross_entropy_with_logits (BCEWithLogitsLoss), which is safe",
        )

    return kernel


def _kernel(op_name: str, rule: str | None) -> _Kernel:
    """Return what CUDA's rule does with an operation; without a rule, nothing."""
    name, _, overload = op_name.partition(".")
    op = getattr(getattr(torch.ops.aten, name), overload or "default")
    match rule:
        case "lower":
            return _casting(op, lambda _: torch.get_autocast_dtype("cpu"))
        case "fp32":
            return _casting(op, lambda _: torch.float32)
        case "promote":
            return _casting(op, _widest)
        case "fp32_set_opt_dtype":
            return _setting_dtype(op)
        case "fp32_append_dtype":
            return _appending_dtype(op)
        case "banned":
            return _refusing(op)
        case _ if op_name in _WITHOUT_CPU_KERNEL:
            return _rounding_back(op)
        case _:
            return torch.library.fallthrough_kernel


def _registered(key: str) -> frozenset[str]:
    """List the operations of the installed torch that have a kernel for an autocast key."""
    names = torch._C._dispatch_get_registrations_for_dispatch_key(key)
    return frozenset(n.removeprefix("aten::") for n in names if n.startswith("aten::"))


@lru_cache(maxsize=1)
def _overrides() -> dict[str, _Kernel]:
    """Build the kernels of all operations that the two devices of the installed torch cast apart.

    Raises UnsupportedPrecision if this torch casts an operation that is on none of our lists: the
    rehearsal would then not be CUDA's policy.
    """
    cuda, cpu = _registered("AutocastCUDA") - _VENDOR_OPS, _registered("AutocastCPU")
    unknown = (cuda - CUDA_LISTS.ops) | (cpu - CPU_LISTS.ops)
    if unknown:
        raise UnsupportedPrecision(
            f"torch {torch.__version__} casts operations under autocast that this version of "
            f"narrowcast does not know: {', '.join(sorted(unknown))}",
            hint="use --autocast-rules native, or a newer narrowcast",
        )
    rules = {
        op: (
            CUDA_LISTS.rule_of(op) if op in cuda else None,
            CPU_LISTS.rule_of(op) if op in cpu else None,
        )
        for op in sorted((cuda | cpu) - _STAND_INS)
    }
    return {op: _kernel(op, there) for op, (there, here) in rules.items() if there != here}


class Rehearsal:
    """CPU autocast follows CUDA's lists while this is entered; re-entrant, reusable.

    Process-wide, as the kernels of a device are: autocast in other threads follows CUDA's lists as
    well until the last rehearsal is left. Entering the outermost one costs about 1 ms.
    """

    _lock = threading.Lock()
    _depth = 0
    _library: torch.library.Library | None = None

    def __enter__(self) -> None:
        with Rehearsal._lock:
            if Rehearsal._depth == 0:
                Rehearsal._library = _install(_overrides())
            Rehearsal._depth += 1

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with Rehearsal._lock:
            Rehearsal._depth -= 1
            if Rehearsal._depth == 0 and Rehearsal._library is not None:
                Rehearsal._library._destroy()  # type: ignore[no-untyped-call] # torch's own kernels are in force again
                Rehearsal._library = None
                _WEIGHT_CASTS.clear()


def _install(kernels: dict[str, _Kernel]) -> torch.library.Library:
    _hear_the_notice()
    library = torch.library.Library("aten", "IMPL", "AutocastCPU")  # type: ignore[no-untyped-call]
    for op, kernel in kernels.items():
        library.impl(op, kernel)  # type: ignore[no-untyped-call]
    return library


@lru_cache(maxsize=1)
def _hear_the_notice() -> None:
    """Override one kernel, so that torch gives its once-per-process notice of it now, unheard.

    Silencing every installation instead would make Python forget which warnings it has shown.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="(?s).*verriding a previously registered kernel")
        library = torch.library.Library("aten", "IMPL", "AutocastCPU")  # type: ignore[no-untyped-call]
        library.impl("grid_sampler", torch.library.fallthrough_kernel)  # type: ignore[no-untyped-call]
        library._destroy()  # type: ignore[no-untyped-call]


def rehearse(device_type: str) -> Rehearsal:
    """Return a context in which CPU autocast follows the cast lists of `device_type` ('cuda').

    It does not turn autocast on. Raises UnknownName for any other device.
    """
    if device_type != "cuda":
        raise UnknownName.of("device to rehearse", device_type, ("cuda",))
    return Rehearsal()
