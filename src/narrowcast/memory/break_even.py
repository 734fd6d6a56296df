"""From which batch size on autocast holds less memory than fp32, found by measuring, and why.

What autocast adds does not depend on the batch: 16-bit copies of the weights until backward, and in
backward the 16-bit gradient of a weight beside its fp32 cast. What it saves grows with the batch.
So there is a batch below which autocast holds more. It is not cast bytes over saved bytes alone:
the peak moves between forward and backward, and a 16-bit copy of the inputs is saved as well. It is
therefore searched on peaks, and both ends of what is returned have been measured.

The update is left out of the search: the optimizer works on fp32 weights either way, and where its
phase is the highest of the step, autocast changes nothing; that is said in the answer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass

from narrowcast.records.memory import BreakEven, MemoryRecord
from narrowcast.units import format_bytes

__all__ = ["Bracket", "Sides", "break_even_of", "search"]

# A batch as large as this is of no use to anybody who asks whether a small one fits.
_LARGEST = 2**14

Lines = Mapping[str, int]


@dataclass(frozen=True, kw_only=True)
class Sides:
    """One batch size measured in both precisions: bytes by category.

    At the peak of forward and backward, and (`held`) when forward is over.
    """

    autocast: Lines
    fp32: Lines
    autocast_held: Lines
    fp32_held: Lines

    @property
    def excess(self) -> int:
        """Bytes that autocast holds more than fp32 at the peak."""
        return sum(self.autocast.values()) - sum(self.fp32.values())

    @property
    def activations_saved(self) -> int:
        return self.fp32_held["activations"] - self.autocast_held["activations"]


@dataclass(frozen=True, kw_only=True)
class Bracket:
    """Neighbouring batch sizes between which the sign of the excess changes; None: not found."""

    more_at: int | None
    less_at: int | None


def search(excess: Callable[[int], int | None], start: int, *, least: int) -> Bracket:
    """Find where the excess of autocast turns from positive to not positive, from `start` on.

    `excess(batch)` measures; None means that this batch is too large to measure. The bracket is
    narrowed to neighbours, or to one per cent of the batch.
    """
    first = excess(start)
    assert first is not None, "the batch to begin with has been measured before"
    if first <= 0:
        lowest = excess(least) if least < start else first
        if lowest is None or lowest <= 0:
            return Bracket(more_at=None, less_at=least)
        return _narrow(excess, (least, lowest), (start, first))
    more, more_excess = start, first
    while more < _LARGEST:
        size = 2 * more
        value = excess(size)
        if value is None:
            break
        if value <= 0:
            return _narrow(excess, (more, more_excess), (size, value))
        more, more_excess = size, value
    return Bracket(more_at=more, less_at=None)


def _narrow(
    excess: Callable[[int], int | None], more: tuple[int, int], less: tuple[int, int]
) -> Bracket:
    """Close in by turns of interpolation, which is exact where peaks are linear, and halving."""
    halve = False
    while less[0] - more[0] > max(1, more[0] // 100):
        if halve:
            size = (more[0] + less[0]) // 2
        else:
            size = more[0] + int((less[0] - more[0]) * more[1] / (more[1] - less[1]))
        size = min(max(size, more[0] + 1), less[0] - 1)
        value = excess(size)
        assert value is not None, "a larger batch than this has been measured"
        more, less = ((size, value), less) if value > 0 else (more, (size, value))
        halve = not halve
    return Bracket(more_at=more[0], less_at=less[0])


def break_even_of(
    record: MemoryRecord,
    fp32: MemoryRecord,
    bracket: Bracket,
    sides: Mapping[int, Sides],
    *,
    measured: Set[int],
) -> BreakEven:
    """Put the answer together; `sides` holds every batch size that was looked at.

    `record` and `fp32` are the ledgers of the whole step at the batch size asked for. `measured`
    are the batch sizes of which `sides` knows more than the sizes of fake tensors.
    """
    # Sides are measured without an optimizer, whose state is there all the time in both.
    state = sum(line.bytes for line in record.lines if line.category == "optimizer_state")
    crossing = _crossing(bracket, sides)
    per_sample = _saved_per_sample(sides)
    here = sides[record.batch_size]
    found = crossing is not None and bracket.less_at in measured
    measured_at = bracket.less_at if found else None
    measured_bytes = None if measured_at is None else _totals(sides[measured_at], state)
    return BreakEven(
        batch_size=crossing,
        cast_bytes=here.autocast_held["autocast_casts"],
        saved_bytes_per_sample=per_sample,
        measured_at=measured_at,
        measured_bytes=measured_bytes,
        fp32_peak_bytes=fp32.total_peak_bytes,
        why="; ".join(
            [
                _at_hand(here, record, _totals(here, state)),
                _activations(per_sample),
                _answer(bracket, record.precision, measured_bytes),
                _whole_step(record, fp32),
            ]
        ),
    )


def _totals(sides: Sides, state: int) -> tuple[int, int]:
    return sum(sides.autocast.values()) + state, sum(sides.fp32.values()) + state


def _crossing(bracket: Bracket, sides: Mapping[int, Sides]) -> float | None:
    if bracket.more_at is None or bracket.less_at is None:
        return None
    more, less = sides[bracket.more_at].excess, sides[bracket.less_at].excess
    return bracket.more_at + (bracket.less_at - bracket.more_at) * more / (more - less)


def _saved_per_sample(sides: Mapping[int, Sides]) -> float:
    """Slope of the saved activations between the smallest and the largest batch measured."""
    small, large = min(sides), max(sides)
    if small == large:
        return sides[small].activations_saved / small
    return (sides[large].activations_saved - sides[small].activations_saved) / (large - small)


def _in_both(totals: tuple[int, int], precision: str) -> str:
    autocast, fp32 = map(format_bytes, totals)
    return f"{autocast} in {precision} and {fp32} in fp32"


def _at_hand(here: Sides, record: MemoryRecord, totals: tuple[int, int]) -> str:
    """Compare at the batch asked for, by category, and name what the batch does not change."""
    differences = {name: here.autocast[name] - here.fp32[name] for name in here.autocast}
    parts = [
        f"{'+' if size > 0 else '-'}{format_bytes(abs(size))} {name.replace('_', ' ')}"
        for name, size in sorted(differences.items(), key=lambda item: -abs(item[1]))
        if size
    ]
    casts = format_bytes(here.autocast_held["autocast_casts"])
    return (
        f"at batch {record.batch_size} forward and backward hold "
        f"{_in_both(totals, record.precision)} ({', '.join(parts) or 'no difference'}): {casts} of "
        f"{record.precision} weight copies, and {record.precision} gradients until their cast to "
        "fp32, do not shrink with the batch"
    )


def _activations(per_sample: float) -> str:
    if per_sample > 0:
        return f"a sample saves {format_bytes(per_sample)} of activations"
    return "activations are no smaller, since a 16-bit copy of the inputs is saved as well"


def _answer(bracket: Bracket, precision: str, measured: tuple[int, int] | None) -> str:
    if measured is not None:
        return f"measured at batch {bracket.less_at}: {_in_both(measured, precision)}"
    if bracket.less_at is not None:
        return f"{precision} holds no more than fp32 from batch {bracket.less_at} on"
    return f"{precision} holds more up to batch {bracket.more_at}, the largest that was tried"


def _whole_step(record: MemoryRecord, fp32: MemoryRecord) -> str:
    """Compare the peaks of the whole step, and say when autocast cannot change them."""
    both = _in_both((record.total_peak_bytes, fp32.total_peak_bytes), record.precision)
    if record.peak_phase == fp32.peak_phase == "optimizer":
        return f"the whole step peaks in the optimizer ({both}), which autocast does not touch"
    return f"the whole step peaks at {both}"
