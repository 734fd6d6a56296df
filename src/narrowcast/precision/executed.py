"""In which dtype each kind of operation really executed, and whether that is what was asked.

A precision that is asked for and not carried out makes every figure that rests on it wrong, and
happens without a word elsewhere (fp16 asked of a CPU runs in fp32 in two of our peers). So one
training step of each run is watched below autocast, where every operation shows the dtype that it
computes in.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode  # the only way to see below autocast

from narrowcast.policy import Policy
from narrowcast.precision.cast import format_name
from narrowcast.precision.float8 import product_label

__all__ = ["ExecutedDtypes", "honoured"]

# The kinds that a precision is about: their cost is what 16 bits are to save.
_HEAVY = ("matmul", "conv", "attention", "rnn")


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_MATMULS = _names(
    """mm addmm bmm baddbmm addbmm mv addmv dot vdot linear mkldnn_linear _addmm_activation
    _scaled_mm _grouped_mm _scaled_grouped_mm _trilinear"""
)
_REDUCTIONS = _names(
    """sum mean prod var std var_mean std_mean norm linalg_vector_norm logsumexp amax amin max min
    cumsum cumprod nansum argmax argmin"""
)
# They move, make or describe data; no arithmetic happens in the dtype that they carry.
_MOVES = _names(
    """clone copy_ empty empty_like empty_strided new_empty new_empty_strided new_zeros new_ones
    new_full zeros zeros_like ones ones_like full full_like fill_ zero_ detach lift_fresh cat stack
    _local_scalar_dense arange scalar_tensor rand randn randperm bernoulli_ normal_ uniform_ random_
    set_ resize_ constant_pad_nd native_dropout gather index_select index select_backward
    slice_backward repeat roll flip sort topk nonzero equal _fused_dropout split_with_sizes_copy
    rand_like randn_like randint _unsafe_view"""
)
_ENDING = re.compile(r"(_dense)?_(backward|backward_data|forward|backward_elemt)\Z")
_KINDS = (
    ("optimizer", re.compile(r"_foreach_|_fused_(adam|sgd|adagrad)|_amp_")),
    # _safe_softmax is made by scaled_dot_product_attention alone, where no fused kernel exists.
    ("attention", re.compile(r".*(attention|flash_attn)|_safe_softmax\Z")),
    ("rnn", re.compile(r".*(_rnn|lstm|gru)(\Z|_)")),
    ("conv", re.compile(r".*conv(_|olution|\Z)")),
    ("softmax", re.compile(r"_(log_)?softmax\Z")),
    ("layer_norm", re.compile(r".*(layer|rms)_norm")),
    ("batch_norm", re.compile(r".*(batch_norm|group_norm)")),
    ("embedding", re.compile(r".*embedding")),
    ("loss", re.compile(r".*_loss(\d?d)?\Z|binary_cross_entropy")),
    ("pool", re.compile(r".*_pool\d?d?")),
)


class ExecutedDtypes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Count, while entered, the calls of each kind of operation in each dtype, backward included.

    Put it round the forward and backward pass of one step; an optimizer is another matter. Code
    under torch.compile is not seen. ``counts`` maps kind -> format name -> calls; what is
    multiplied in TF32 counts as tf32, as the switches of torch say at the moment of the call.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._counts: defaultdict[str, defaultdict[str, int]] = defaultdict(
            lambda: defaultdict(int)
        )
        self._read: set[int] = set()

    def has_read(self, weight: nn.Parameter) -> bool:
        """Whether an operation had this parameter, itself and no view of it, as an argument."""
        return id(weight) in self._read

    @property
    def counts(self) -> dict[str, dict[str, int]]:
        """Calls by kind and format, sorted by name."""
        return {k: dict(sorted(by.items())) for k, by in sorted(self._counts.items())}

    def __torch_dispatch__(
        self,
        func: Any,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        self._read.update(id(value) for value in args if isinstance(value, nn.Parameter))
        result = func(*args, **(kwargs or {}))
        kind = _kind_of(func)
        name = None if kind is None else _format(kind, args, result)
        if kind is not None and name is not None:
            self._counts[kind][name] += 1
        return result


@lru_cache(maxsize=2048)
def _kind_of(func: Any) -> str | None:
    """Return the kind of an operation, None for one that only moves, makes or views data."""
    namespace, _, name = func._schema.name.partition("::")
    if name == "_to_copy":
        return "cast"
    if name in _MOVES or func.is_view or namespace in ("profiler", "prim"):
        return None
    stem = _ENDING.sub("", name)
    if stem in _MATMULS:
        return "matmul"
    for kind, pattern in _KINDS:
        if pattern.match(stem):
            return kind
    if stem in _REDUCTIONS:
        return "reduction"
    return "elementwise" if torch.Tag.pointwise in func.tags else "other"


def _format(kind: str, args: tuple[Any, ...], result: Any) -> str | None:
    """Name the format that a call computed in; None if nothing in it is floating-point.

    Products compute in the dtype of their inputs. Other operations may be asked for a wider result
    (a sum of bf16 in fp32) and then compute in it. A cast is filed under the dtype it makes.
    """
    source, made = _first_floating(args), _first_floating((result,))
    if kind == "cast":
        return format_name(made.dtype) if made is not None and source is not None else None
    if kind in _HEAVY or made is None:
        return None if source is None else _product_format(kind, source)
    if source is None:
        return format_name(made.dtype)
    return format_name(torch.promote_types(source.dtype, made.dtype))


def _first_floating(values: Iterable[Any]) -> Tensor | None:
    for value in values:
        if isinstance(value, Tensor):
            if value.is_floating_point():
                return value
        elif isinstance(value, (list, tuple)):
            found = _first_floating(value)
            if found is not None:
                return found
    return None


def _product_format(kind: str, source: Tensor) -> str:
    """Name the format of a product, telling TF32 from fp32 by the switch that decides.

    Products of fp8 factors are "fp8", whichever of its formats each factor is in; what stands for
    them is "fp8-emulated".
    """
    label = product_label(source) if kind == "matmul" else None
    if label is not None:
        return label
    if source.dtype == torch.float32 and source.device.type == "cuda" and kind in _HEAVY:
        switch = {"conv": "conv", "rnn": "rnn"}.get(kind, "matmul")
        uses_tf32 = torch._C._get_fp32_precision_getter("cuda", switch) == "tf32"
        if uses_tf32 and torch.cuda.get_device_capability(source.device) >= (8, 0):
            return "tf32"
    return format_name(source.dtype)


def honoured(
    policy: Policy,
    counts: Mapping[str, Mapping[str, int]],
    unused: Mapping[str, str] | None = None,
    *,
    widened: int = 0,
) -> tuple[bool, tuple[str, ...]]:
    """Whether every product and convolution executed in the policy's compute format, and notes.

    Where the policy keeps modules in fp32, their calls are allowed for, and counted in a note;
    `unused` are those that `islands.unused_islands` and `functions.unused_functions` found to be
    kept in vain. `widened` is how many of the fp32 products a chunked loss made on purpose, of
    16-bit factors.
    """
    heavy = {kind: dict(counts[kind]) for kind in _HEAVY if counts.get(kind)}
    if widened:
        heavy["matmul"]["fp32"] -= widened
        heavy["matmul"] = {name: calls for name, calls in heavy["matmul"].items() if calls}
        is_honoured, notes = honoured(policy, heavy, unused)
        purpose = f"{widened} products of the chunked loss executed in fp32, on purpose"
        return is_honoured, (*notes, purpose)
    if not heavy:
        return True, ("nothing to execute in low precision: no matrix product or convolution ran",)
    allowed = {policy.compute} | ({"fp32"} if policy.keep_fp32 else set())
    fp8 = None if policy.linears == "compute" else policy.linears
    if fp8 is not None:
        allowed.add(fp8)
    failures = [
        f"{calls} of {sum(by.values())} {kind} calls executed in {name}, not in {policy.compute}"
        for kind, by in heavy.items()
        for name, calls in by.items()
        if name not in allowed
    ]
    if fp8 is not None and not heavy.get("matmul", {}).get(fp8):
        failures.append(f"no matrix product executed in {fp8}")
    if failures:
        failures += _likely_reason(policy, heavy)
    if policy.compute != "fp32":
        failures += [_in_vain(name, entry) for name, entry in (unused or {}).items()]
    if failures:
        return False, tuple(failures)
    notes = () if fp8 is None else (_share(fp8, heavy["matmul"]),)
    kept = sum(by.get("fp32", 0) for by in heavy.values())
    if policy.compute == "fp32" or not policy.keep_fp32:
        return True, notes
    if not any(by.get(name) for by in heavy.values() for name in allowed - {"fp32"}):
        return False, (f"all {kept} calls executed in fp32: keep_fp32 leaves nothing else",)
    modules = ", ".join(policy.keep_fp32)
    kept_so = f"{kept} calls executed in fp32, in modules that are kept so: {modules}"
    return True, (*notes, kept_so)


def _share(fp8: str, products: Mapping[str, int]) -> str:
    """Say how many products the layers that multiply in fp8 made, of all."""
    return f"{products[fp8]} of {sum(products.values())} matmul calls executed in {fp8}"


def _in_vain(name: str, entry: str) -> str:
    module, colon, function = name.partition(":")
    if colon:
        return f'keep_fp32 "{entry}" had no effect: {module or "the model"} calls no {function}'
    return (
        f'keep_fp32 "{entry}" had no effect on {name}: it is never called, its weight is used '
        "elsewhere"
    )


def _likely_reason(policy: Policy, heavy: Mapping[str, Mapping[str, int]]) -> tuple[str, ...]:
    """Explain the one case in which torch itself multiplies in fp32 under a 16-bit policy."""
    in_fp32 = all(heavy.get(kind, {}).get("fp32") for kind in ("matmul", "attention"))
    if policy.compute not in ("fp16", "bf16") or not in_fp32:
        return ()
    reason = (
        "scaled_dot_product_attention multiplies in fp32 where torch has no fused kernel for it"
    )
    return (f"{reason}, as with dropout on a CPU",)
