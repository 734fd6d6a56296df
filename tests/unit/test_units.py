"""Amounts of memory and time as people write them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from narrowcast.errors import UsageError
from narrowcast.units import format_bytes, format_duration, format_percent, parse_bytes


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("2GiB", 2 * 1024**3),
        ("150 MiB", 150 * 1024**2),
        ("80gb", 80 * 10**9),
        ("17", 17),
        (".5 KiB", 512),
        ("17B", 17),
    ],
)
def test_amounts_are_read_in_both_families_of_units(text: str, size: int) -> None:
    """GiB is 1024^3 and GB is 10^9, whatever the case."""
    assert parse_bytes(text) == size


@pytest.mark.parametrize(
    "text", ["", "GiB", "2 potatoes", "-1GiB", "1..5MiB", "2 GiB please", "0.5B", "1.5", "1.0 b"]
)
def test_nonsense_is_refused_with_examples(text: str) -> None:
    """A budget is never guessed."""
    with pytest.raises(UsageError, match="not an amount of memory"):
        parse_bytes(text)


@given(st.integers(0, 2**50))
def test_what_is_written_reads_back_within_the_shown_digits(size: int) -> None:
    """Three significant digits survive the way out and in."""
    assert parse_bytes(format_bytes(size)) == pytest.approx(size, rel=6e-3)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0000413, "41.3 us"), (0.02, "20 ms"), (12.0, "12 s"), (185, "3:05"), (3723, "1:02:03")],
)
def test_durations(seconds: float, text: str) -> None:
    """Each magnitude has its unit."""
    assert format_duration(seconds) == text


def test_a_ratio_is_shown_as_a_change() -> None:
    """0.58 of the reference is 42 percent less."""
    assert format_percent(0.58) == "-42.0%"
