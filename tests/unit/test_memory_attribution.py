"""From a log of storages to the ledger of the peak, without torch's help."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from narrowcast.memory.attribution import (
    Moment,
    held_at,
    lines_of,
    modules_of,
    peak_of,
    timeline_of,
)
from narrowcast.memory.storages import Holding, Role


def moment(logged: int, size: int, phase: str = "forward") -> Moment:
    return Moment(logged, phase, "m", size)


def test_the_peak_is_the_first_moment_with_the_most_bytes() -> None:
    """Of equal heights the first counts, as with MemTracker, which wants strictly more."""
    moments = [moment(1, 5), moment(2, 9), moment(3, 9), moment(4, 2)]

    assert peak_of(moments) == 1


def test_a_role_that_is_learned_late_counts_from_the_first_byte() -> None:
    """A product of backward that becomes a gradient after the peak was a gradient at the peak."""
    product = Holding(1, 0, Role.TEMPORARY, "layer")
    log = [(product, 100)]
    at_peak = moment(1, 100)

    product.claim(Role.GRADIENT, "layer")
    lines = {line.category: line.bytes for line in lines_of(held_at(log, at_peak))}

    assert (lines["gradients"], lines["temporaries"]) == (100, 0)


def test_modules_hold_what_their_own_operations_made() -> None:
    """By module and category, the largest first, with the same sum as the lines."""
    a, b, c = (Holding(i, 0, Role.ACTIVATION, name) for i, name in enumerate(("x", "y", "y")))
    c.claim(Role.CAST)
    held = {a: 10, b: 20, c: 5}

    modules = modules_of(held)

    assert [(m.name, m.bytes) for m in modules] == [("y", 25), ("x", 10)]
    assert modules[0].categories == {"activations": 20, "autocast_casts": 5}
    assert sum(m.bytes for m in modules) == sum(line.bytes for line in lines_of(held))


@given(
    sizes=st.lists(st.integers(0, 10**12), min_size=1, max_size=3000),
    most=st.integers(4, 500),
)
def test_a_thinned_timeline_keeps_the_peak_and_the_ends(sizes: list[int], most: int) -> None:
    """However long the step, few enough points, in order, and never without the peak."""
    one = Holding(1, 0, Role.TEMPORARY, "m")
    before = [0, *sizes]
    log = [(one, size - last) for size, last in zip(sizes, before, strict=False)]
    moments = [moment(i + 1, size) for i, size in enumerate(sizes)]

    points = timeline_of(log, moments, most)

    indices = [p.index for p in points]
    assert len(points) <= most
    assert indices == sorted(set(indices))
    assert peak_of(moments) in indices
    assert {0, len(moments) - 1} <= set(indices)
    assert all(sum(p.categories.values()) == p.bytes for p in points)


@pytest.mark.parametrize("count", [1, 499, 500])
def test_a_short_timeline_is_kept_whole(count: int) -> None:
    """Nothing is left out that fits."""
    one = Holding(1, 0, Role.TEMPORARY, "m")
    log = [(one, 1)] * count
    moments = [moment(i + 1, i + 1) for i in range(count)]

    assert [p.bytes for p in timeline_of(log, moments, 500)] == list(range(1, count + 1))
