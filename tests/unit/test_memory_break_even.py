"""The search for the batch size from which autocast pays, on made-up peaks."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from narrowcast.memory.break_even import Bracket, Sides, break_even_of, search
from narrowcast.records.memory import CATEGORIES, MemoryLine, MemoryRecord


@given(
    crossing=st.integers(3, 8000),
    start=st.integers(2, 5000),
    kink=st.floats(0.1, 3.0),
)
def test_the_bracket_holds_the_crossing_and_is_narrow(
    crossing: int, start: int, kink: float
) -> None:
    """Wherever the search starts and however the peak bends, within one per cent or one sample."""
    asked: list[int] = []

    def excess(batch: int) -> int:
        asked.append(batch)
        slope = 1000 if batch < kink * crossing else 3000
        return round((crossing - batch) * slope) if batch != crossing else 0

    bracket = search(excess, start, least=2)

    assert bracket.more_at is not None
    assert bracket.less_at is not None
    assert excess(bracket.more_at) > 0 >= excess(bracket.less_at)
    assert bracket.less_at - bracket.more_at <= max(1, bracket.more_at // 100)
    assert len(asked) <= 50


def test_linear_peaks_are_solved_with_few_measurements() -> None:
    """Each measurement of a real recipe costs a step, so interpolation has to pay."""
    asked: list[int] = []

    def excess(batch: int) -> int:
        asked.append(batch)
        return 1_000_000 - 1_900 * batch  # zero at 526.3

    bracket = search(excess, 8, least=2)

    assert bracket == Bracket(more_at=526, less_at=527)
    assert len(asked) <= 12


def test_autocast_that_always_holds_less_has_no_break_even() -> None:
    """Nothing to find below the smallest batch that can be trained."""
    assert search(lambda batch: -batch, 16, least=2) == Bracket(more_at=None, less_at=2)


@pytest.mark.parametrize("limit", [None, 64])
def test_autocast_that_never_holds_less_is_reported_up_to_what_was_measured(
    limit: int | None,
) -> None:
    """Either the largest batch of all, or the last that fits into memory."""

    def excess(batch: int) -> int | None:
        return 1 if limit is None or batch <= limit else None

    bracket = search(excess, 16, least=2)

    assert bracket == Bracket(more_at=64 if limit else 2**14, less_at=None)


def lines(**sizes: int) -> dict[str, int]:
    return dict.fromkeys(CATEGORIES, 0) | sizes


def sides(batch: int) -> Sides:
    """Casts of 100 bytes whatever the batch; 4 bytes a sample in fp32, 2 under autocast."""
    autocast = lines(activations=2 * batch, autocast_casts=100)
    fp32 = lines(activations=4 * batch)
    return Sides(autocast=autocast, fp32=fp32, autocast_held=autocast, fp32_held=fp32)


def record(batch: int, phase: str, total: int) -> MemoryRecord:
    return MemoryRecord(
        recipe="r", precision="bf16", device="cpu", batch_size=batch, total_peak_bytes=total,
        peak_phase=phase, peak_module="", lines=(MemoryLine(category="optimizer_state", bytes=7),),
        modules=(), timeline=(),
    )  # fmt: skip


def test_the_answer_is_interpolated_between_two_measured_batches() -> None:
    """100 = 2 B at B = 50; both sides there, optimizer state included, are in the record."""
    found = break_even_of(
        record(8, "backward", 123),
        record(8, "backward", 39),
        Bracket(more_at=49, less_at=51),
        {n: sides(n) for n in (8, 49, 51)},
        measured={8, 49, 51},
    )

    assert found.batch_size == 50
    assert (found.cast_bytes, found.saved_bytes_per_sample) == (100, 2)
    assert (found.measured_at, found.measured_bytes) == (51, (209, 211))
    assert found.fp32_peak_bytes == 39
    assert "123 B in bf16 and 39 B in fp32" in found.why
    assert "+100 B autocast casts, -16 B activations" in found.why


def test_sizes_that_were_only_computed_are_not_called_measured() -> None:
    """Above what memory allows, the break-even comes from fake tensors and is not confirmed."""
    found = break_even_of(
        record(8, "backward", 123),
        record(8, "backward", 39),
        Bracket(more_at=49, less_at=51),
        {n: sides(n) for n in (8, 49, 51)},
        measured={8},
    )

    assert found.batch_size == 50
    assert (found.measured_at, found.measured_bytes) == (None, None)
    assert "measured at" not in found.why


def test_a_peak_in_the_optimizer_is_called_by_its_name() -> None:
    """Where the update is the highest phase, autocast saves nothing, and the answer says so."""
    found = break_even_of(
        record(8, "optimizer", 500),
        record(8, "optimizer", 500),
        Bracket(more_at=None, less_at=2),
        {8: sides(8), 2: sides(2)},
        measured={8, 2},
    )

    assert found.batch_size is None
    assert found.measured_at is None
    assert "bf16 holds no more than fp32 from batch 2 on" in found.why
    assert "peaks in the optimizer (500 B in bf16 and 500 B in fp32)" in found.why
