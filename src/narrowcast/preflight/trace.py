"""Rules that need values: one small forward pass of a recipe, watched operation by operation.

Real tensors on the CPU, under CUDA's cast lists, since what is asked is which *values* meet which
format: positions that become equal, constants that become 0, casts that write a tensor out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode  # the only way to see below autocast

from narrowcast.formats import FORMATS, FloatFormat
from narrowcast.precision.cast import format_name
from narrowcast.records.check import Severity
from narrowcast.replay.places import Place, Places
from narrowcast.replay.traits import traits_of

__all__ = ["TRACED_RULES", "StepTrace", "TracedFound", "TracedRule"]

# Below this a tensor written out costs nothing worth a word.
_FEWEST_WRITTEN = 4096
_LEAST_BLOW_UP = 4

_SUMS = {"add", "add_", "sub", "sub_", "rsub", "clamp", "clamp_", "clamp_min", "clamp_min_"}
"""Where a small constant keeps a denominator or a logarithm from 0."""

_FILLS = {"masked_fill", "masked_fill_", "where", "full_like", "fill_", "index_fill", "index_fill_"}
_PARTIAL_SUMS = {"cumsum", "cumsum_"}


@dataclass(frozen=True, kw_only=True)
class TracedRule:
    """One thing that shows in the values of a step."""

    code: str
    name: str
    severity: Severity
    fix: str
    source: str

    @property
    def title(self) -> str:
        return f"{self.code} {self.name}"


@dataclass(frozen=True, kw_only=True)
class TracedFound:
    """One operation at which a traced rule fired."""

    rule: TracedRule
    place: Place
    message: str


_PYTORCH = "https://github.com/pytorch/pytorch/issues/"

BROADCAST_CAST = TracedRule(
    code="NC501",
    name="cast-of-expanded-tensor",
    severity="warning",
    fix="multiply before expanding, or let the product broadcast by itself (drop expand)",
    source=f"{_PYTORCH}85698",
)
POSITIONS = TracedRule(
    code="NC502",
    name="positions-collapse",
    severity="error",
    fix="compute this product with autocast off (torch.autocast(..., enabled=False)) in fp32, or "
    "narrowcast's --keep-fp32 for the module",
    source="https://github.com/huggingface/diffusers/issues/13920",
)
LOST_CONSTANT = TracedRule(
    code="NC503",
    name="constant-becomes-zero",
    severity="warning",
    fix="use an eps that the format holds (1e-6 in fp16), or compute this in fp32: x.float()",
    source=f"{_PYTORCH}40497",
)
LARGE_CONSTANT = TracedRule(
    code="NC504",
    name="constant-out-of-range",
    severity="error",
    fix="fill with torch.finfo(x.dtype).min, or with float('-inf') where no row is empty",
    source="https://github.com/huggingface/transformers/pull/17306",
)
NARROW_SUM = TracedRule(
    code="NC505",
    name="long-sum-in-16-bits",
    severity="warning",
    fix="sum in fp32: x.cumsum(dim, dtype=torch.float32)",
    source="https://docs.pytorch.org/docs/stable/notes/numerical_accuracy.html",
)
RAISES = TracedRule(
    code="NC506",
    name="step-raises",
    severity="error",
    fix="see the message; narrowcast's --keep-fp32 keeps the module in fp32",
    source="https://docs.pytorch.org/docs/stable/amp.html#autocast-op-reference",
)

TRACED_RULES = (BROADCAST_CAST, POSITIONS, LOST_CONSTANT, LARGE_CONSTANT, NARROW_SUM, RAISES)


class StepTrace(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Looks at the arguments of every operation while entered; ``found`` has each line once."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: dict[tuple[str, str, int], TracedFound] = {}
        self._places = Places(model)

    def __enter__(self) -> StepTrace:
        self._places.__enter__()
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._places.__exit__(*error)

    def __torch_dispatch__(
        self,
        func: Any,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        place = self._places.here()
        traits = traits_of(func)
        stem = "" if traits is None else traits.stem
        for rule, message in _before(stem, args):
            self._note(rule, place, message)
        result = func(*args, **(kwargs or {}))
        for rule, message in _after(stem, args, result):
            self._note(rule, place, message)
        return result

    def _note(self, rule: TracedRule, place: Place, message: str) -> None:
        key = (rule.code, place.file, place.line)
        if place.phase == "forward" and key not in self.found:
            self.found[key] = TracedFound(rule=rule, place=place, message=message)


def _before(stem: str, args: tuple[Any, ...]) -> Iterator[tuple[TracedRule, str]]:
    """Yield what the arguments of an operation tell; some operations raise, and return nothing."""
    format_ = _narrow_format(args)
    if format_ is None or stem not in _SUMS | _FILLS:
        return
    meets = f"and a {format_.name} tensor"
    for number in (a for a in args if isinstance(a, (int, float)) and not isinstance(a, bool)):
        size = abs(number)
        if stem in _SUMS and 0 < size <= format_.smallest_subnormal / 2:
            smallest = f"whose smallest number is {format_.smallest_subnormal:.2g}"
            zero = f"{number:g} is 0 in {format_.name}, {smallest}"
            yield LOST_CONSTANT, f"{stem} of {number:g} {meets}: {zero}"
        if math.isfinite(number) and size > format_.max:
            does = "RuntimeError on conversion" if stem in _FILLS else "it becomes infinite"
            largest = f"whose largest number is {format_.max:g}"
            yield LARGE_CONSTANT, f"{stem} of {number:g} {meets}, {largest}: {does}"


def _after(stem: str, args: tuple[Any, ...], result: Any) -> Iterator[tuple[TracedRule, str]]:
    """Yield what an operation's input and output tell together."""
    source = args[0] if args and isinstance(args[0], Tensor) else None
    if source is None or not isinstance(result, Tensor):
        return
    format_ = FORMATS.get(format_name(result.dtype))
    if format_ is None or format_.storage_bytes != 2:
        return
    if stem == "_to_copy" and source.dtype == torch.float32:
        yield from _of_cast(source, result, format_)
    elif stem in _PARTIAL_SUMS and isinstance(args[1], int) and source.dim():
        length, most = source.shape[args[1]], _largest_integer(format_)
        if length > most:
            ends = f"from {most} equal addends on nothing is added any more"
            yield NARROW_SUM, f"sums {length} elements in {format_.name}: {ends}"


def _of_cast(
    source: Tensor, result: Tensor, format_: FloatFormat
) -> Iterator[tuple[TracedRule, str]]:
    stored = _stored_elements(source)
    written = result.numel()
    if written >= max(_FEWEST_WRITTEN, _LEAST_BLOW_UP * stored) and _is_dense(result):
        sizes = f"{written:,} elements of {format_.name} for the {stored:,} that are stored"
        yield BROADCAST_CAST, f"the cast writes an expanded tensor out: {sizes}"
    before, after = _distinct(source, result, format_)
    if after < before:
        largest = source.detach().abs().max().item()
        limit = f"{format_.name}, which holds integers to {_largest_integer(format_)} only"
        lost = f"{before} distinct values become {after}"
        yield POSITIONS, f"integers up to {largest:g} enter a product in {limit}: {lost}"


def _largest_integer(format_: FloatFormat) -> int:
    """Return the integer up to which a format holds all."""
    return 1 << (format_.mantissa_bits + 1)


def _stored_elements(tensor: Tensor) -> int:
    """Return how many elements a strided tensor has in storage, those of stride 0 once."""
    return math.prod(
        n for n, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride or n == 1
    )


def _is_dense(tensor: Tensor) -> bool:
    return _stored_elements(tensor) == tensor.numel()


def _distinct(source: Tensor, result: Tensor, format_: FloatFormat) -> tuple[int, int]:
    """Count the distinct values of a tensor of integers before and after a cast; (0, 0) if none."""
    if source.numel() < 2 or isinstance(source, nn.Parameter):
        return 0, 0
    values = source.detach()
    if not bool(
        (values.abs().amax() > _largest_integer(format_)) & (values == values.round()).all()
    ):
        return 0, 0
    after = result.detach().float()
    return int(torch.unique(values).numel()), int(torch.unique(after).numel())


def _narrow_format(args: tuple[Any, ...]) -> FloatFormat | None:
    """Return the format of an operation whose tensors are all of one 16-bit format."""
    formats = {
        format_name(a.dtype) for a in args if isinstance(a, Tensor) and a.is_floating_point()
    }
    if len(formats) != 1:
        return None
    format_ = FORMATS.get(formats.pop())
    return format_ if format_ is not None and format_.storage_bytes == 2 else None
