"""What one operation lost by its format, found by doing it again in fp32 on the same inputs.

So an error is told apart from the errors that came in with the inputs, and nothing has to be
aligned with another run. Costs the operation once more, in fp32, and fp32 copies of its inputs
while it runs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from narrowcast.formats import FORMATS
from narrowcast.records.diagnosis import LostConstant
from narrowcast.replay.flow import Flow, numbers_in
from narrowcast.replay.traits import Traits

__all__ = ["SLOW", "Call", "Fidelity", "fidelity_of", "near"]

_NARROW = (torch.float16, torch.bfloat16)

SLOW = 1 / 16
"""An average of this weight or more always arrives; see `near`."""

# Up to here every whole number is one of the format's: 2 ** (mantissa bits + 1).
_WHOLE = {
    torch.float16: 2 ** (FORMATS["fp16"].mantissa_bits + 1),
    torch.bfloat16: 2 ** (FORMATS["bf16"].mantissa_bits + 1),
}
_ONLY_WHOLE = 2 ** FORMATS["fp32"].mantissa_bits


@dataclass(frozen=True, kw_only=True)
class Fidelity:
    """See the fields of the same names of `records.diagnosis.ExecutedOp`."""

    constants: tuple[LostConstant, ...] = ()
    local_error: float | None = None
    absorbed: float | None = None
    swallowed: float | None = None
    collapsed: float | None = None


_FAITHFUL = Fidelity()


@dataclass(frozen=True, slots=True)
class Call:
    """An operation and its arguments."""

    func: Any
    traits: Traits
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def with_copies(self) -> Call:
        """Return the call with copies of what it is about to overwrite: itself, if of nothing."""
        traits = self.traits
        if not traits.is_in_place:
            return self
        args = (_copied(a) if i in traits.writes else a for i, a in enumerate(self.args))
        kwargs = {
            name: _copied(value) if name in traits.writes_named else value
            for name, value in self.kwargs.items()
        }
        return replace(self, args=tuple(args), kwargs=kwargs)

    @property
    def has_infinite_constant(self) -> bool:
        """Whether the program itself says infinity here."""
        return any(isinstance(n, float) and math.isinf(n) for n in self.elements())

    def elements(self) -> Iterator[float | Tensor]:
        """Yield the numbers, and tensors of one, that are meant as elements."""
        for place, value in (*enumerate(self.args), *self.kwargs.items()):
            if place not in self.traits.elements or isinstance(value, bool):
                continue
            if isinstance(value, (int, float)) or (isinstance(value, Tensor) and value.dim() == 0):
                yield value

    @property
    def draws(self) -> bool:
        """Whether it takes random numbers, and would take others the second time."""
        place = self.traits.dropout
        if place < 0:
            return self.traits.is_random
        has_it = len(self.args) > place
        return bool(self.args[place] if has_it else self.kwargs.get("dropout_p", 0))

    def numbers(self) -> Iterator[Tensor]:
        """Yield the floating-point tensors among the arguments."""
        yield from numbers_in((*self.args, *self.kwargs.values()))


@torch.no_grad()
def fidelity_of(call: Call, outputs: Sequence[Tensor], flow: Flow) -> Fidelity:
    """Judge a call that is done, from its arguments as they were before (`Call.with_copies`)."""
    made = next((out for out in outputs if out.dtype in _NARROW), None)
    if made is None and not any(x.dtype in _NARROW for x in call.numbers()):
        return _FAITHFUL
    return Fidelity(
        constants=() if made is None else _lost_constants(call, made.dtype, flow),
        local_error=_local_error(call, outputs),
        absorbed=None if made is None else _absorbed(call, made),
        swallowed=None if made is None else _swallowed(call, made),
        collapsed=None if made is None else _collapsed(call, made),
    )


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    return [_copied(item) for item in value] if isinstance(value, (list, tuple)) else value


def _lost_constants(call: Call, dtype: torch.dtype, flow: Flow) -> tuple[LostConstant, ...]:
    lost = []
    for number in call.elements():
        if isinstance(number, Tensor):
            # One that was computed is no constant.
            if not number.is_floating_point() or number.itemsize < 4 or flow.of(number).writers:
                continue
            number = number.item()
        value = float(number)
        becomes = torch.tensor(value, dtype=torch.float64).to(dtype).item()
        if math.isfinite(value) and value and (becomes == 0 or math.isinf(becomes)):
            lost.append(LostConstant(value=value, becomes=becomes))
    return tuple(lost)


def _local_error(call: Call, outputs: Sequence[Tensor]) -> float | None:
    """Return rms(result - result in fp32) / rms(result in fp32), the largest over the outputs.

    Infinite where the result is not finite and that in fp32 is; where both are not, the element
    does not count. None for random operations and those that have no fp32 twin.
    """
    if call.draws:
        return None
    traits = call.traits
    args = [_widened(a, is_written=i in traits.writes) for i, a in enumerate(call.args)]
    if traits.stem in ("_softmax", "_log_softmax"):
        args[2] = False  # half_to_float: the input is no half any more
    kwargs = {n: _widened(a, is_written=n in traits.writes_named) for n, a in call.kwargs.items()}
    try:
        result = call.func(*args, **kwargs)
    except (RuntimeError, NotImplementedError, TypeError):
        return None  # a kernel for 16 bits alone, such as a fused attention's
    return max(
        (
            _relative(low, high)
            for low, high in zip(outputs, numbers_in((result,)), strict=False)
            if low.shape == high.shape and low.layout is torch.strided
        ),
        default=None,
    )


def _widened(value: Any, *, is_written: bool) -> Any:
    """Widen 16-bit tensors and asked-for dtypes; what would be overwritten is copied in any case.

    The arguments of an operation in place are copies already, which `_absorbed` still needs.
    """
    if isinstance(value, Tensor):
        if value.dtype in _NARROW:
            return value.detach().float()
        return value.detach().clone() if is_written else value
    if isinstance(value, torch.dtype):
        return torch.float32 if value in _NARROW else value
    if isinstance(value, (list, tuple)):
        return [_widened(item, is_written=is_written) for item in value]
    return value


def _relative(low: Tensor, high: Tensor) -> float:
    if low.is_complex():
        low, high = torch.view_as_real(low.resolve_conj()), torch.view_as_real(high.resolve_conj())
    if low.numel() == 0:
        return 0.0
    difference = low.to(high.dtype) - high
    size, error = _norm(high), _norm(difference)
    if not math.isfinite(size + error):
        counted = torch.isfinite(high)
        size = _norm(torch.where(counted, high, 0))
        error = _norm(torch.where(counted, difference, 0))
        if math.isnan(error):  # NaN where fp32 gives a number
            return math.inf
    return error / size if size else (math.inf if error else 0.0)


def _norm(values: Tensor) -> float:
    return float(torch.linalg.vector_norm(values, dtype=torch.float64).item())


def _absorbed(call: Call, result: Tensor) -> float | None:
    """Return the share of non-zero addends that changed nothing.

    Of two addends, element by element, the smaller is the addend. A running sum's addends are its
    elements after the first, an average's (``lerp``) the way that it was to go. Torch carries the
    sum inside of ``sum`` and ``cumsum`` in fp32; what is absorbed is absorbed where the running sum
    is stored. So are wider numbers that are copied over narrow ones.
    """
    sign, args, stem = call.traits.addend_sign, call.args, call.traits.stem
    if stem == "cumsum":
        return _absorbed_in_running_sum(args[0].to(result.dtype), result, args[1])
    if stem in ("lerp", "lerp_"):
        return _absorbed_in_average(call, result)
    if stem == "copy_":
        return _absorbed_in_store(args[0], args[1], result)
    if not sign or not all(isinstance(a, Tensor) for a in args[:2]):
        return None
    first, second = (a.float().expand(result.shape) for a in args[:2])
    second = second * (sign * call.kwargs.get("alpha", 1))
    is_first_larger = first.abs() >= second.abs()
    larger = torch.where(is_first_larger, first, second)
    addend = torch.where(is_first_larger, second, first)
    return _share((addend != 0) & torch.isfinite(larger), result.float() == larger)


def _swallowed(call: Call, result: Tensor) -> float | None:
    """Return the share of non-zero elements that vanish beside a constant: ``1 - rate``."""
    stem, given = call.traits.stem, call.args[:2]
    if stem not in ("add", "add_", "sub", "sub_", "rsub") or len(given) < 2:
        return None
    number = next((float(g) for g in given if isinstance(g, (int, float))), None)
    tensor = next((g for g in given if isinstance(g, Tensor)), None)
    if number is None or tensor is None or tensor.layout is not torch.strided:
        return None
    kept = -number if stem.startswith("sub") and isinstance(given[0], Tensor) else number
    return _share(tensor != 0, result.float() == kept)


def _absorbed_in_average(call: Call, result: Tensor) -> float | None:
    before, towards = (a.float().expand(result.shape) for a in call.args[:2])
    weight = call.args[2] if len(call.args) > 2 else call.kwargs["weight"]
    way, eps = towards - before, torch.finfo(result.dtype).eps
    if isinstance(weight, Tensor):
        is_slow, moves = weight.abs() < SLOW, weight != 0
        room = torch.where(is_slow, near(0.0, eps), near(1.0, eps))
    else:
        room, moves = torch.tensor(near(abs(weight), eps)), torch.tensor(bool(weight))
    is_far = way.abs() > room.to(way.device) * before.abs()
    return _share(is_far & moves.to(way.device) & torch.isfinite(way), result.float() == before)


def near(weight: float, eps: float) -> float:
    """Return how near to its goal, relative to itself, an average counts as having arrived.

    One of weight w stands still within eps / 2w. For a weight of 1/16 or more that is 8 eps at
    most, and no matter; a slower one stands still far from its goal, and only rounding excuses it.
    """
    return 8 * eps if weight >= SLOW else eps


def _absorbed_in_store(before: Tensor, stored: Tensor, result: Tensor) -> float | None:
    is_wider = stored.is_floating_point() and stored.dtype not in _NARROW
    if not is_wider or not (stored.layout is before.layout is torch.strided):
        return None
    held = before.float().expand(result.shape)
    way = stored.to(result.device).expand(result.shape) - held
    return _share((way != 0) & torch.isfinite(way), result.float() == held)


def _absorbed_in_running_sum(addends: Tensor, sums: Tensor, dim: int) -> float | None:
    length = sums.size(dim) if sums.dim() else 0
    if length < 2:
        return None
    after, before = sums.narrow(dim, 1, length - 1), sums.narrow(dim, 0, length - 1)
    added = addends.narrow(dim, 1, length - 1) != 0
    return _share(added & torch.isfinite(after), after == before)


def _share(counted: Tensor, among: Tensor) -> float | None:
    number = int(counted.sum())
    return int((counted & among).sum()) / number if number else None


def _collapsed(call: Call, result: Tensor) -> float | None:
    """Return the share of distinct whole numbers that became equal to others in 16 bits."""
    if call.traits.stem == "arange":
        distinct = torch.unique(result).numel()
        return 1 - distinct / result.numel() if result.numel() else None
    if not call.traits.is_cast:
        return None
    source: Tensor = call.args[1 if call.traits.stem.startswith("copy") else 0]
    if source.dtype in (*_NARROW, torch.bool) or source.is_complex() or source.numel() == 0:
        return None
    largest = source.abs().max()
    if source.is_floating_point() and not _are_whole(source, largest):
        return None
    if bool(largest <= _WHOLE[result.dtype]):
        return 0.0
    before, after = torch.unique(source), torch.unique(source.to(result.dtype))
    return float(1 - after.numel() / before.numel())


def _are_whole(values: Tensor, largest: Tensor) -> bool:
    """Whether all are whole numbers, and could be others: beyond 2^23 fp32 holds no others."""
    # NaN compares to nothing.
    return bool(largest <= _ONLY_WHOLE) and bool((values == values.round()).all())
