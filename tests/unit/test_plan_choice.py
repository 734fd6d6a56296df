"""The choice among plans whose peaks and speeds are known."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from narrowcast.plan import PLANS
from narrowcast.planning.choice import (
    LEAST_NOISE,
    Candidate,
    choose,
    frontier,
    leagues,
    worth_a_look,
)

PLAIN = Candidate(
    plan=PLANS["fp32"], bytes=100, traced=True, seconds=1.0, speed="measured", loss=0, levers=0
)


def candidates() -> st.SearchStrategy[list[Candidate]]:
    """Lists of candidates that differ in everything that a choice looks at."""
    one = st.builds(
        lambda size, seconds, loss, levers, spread: replace(
            PLAIN, bytes=size, seconds=seconds, loss=loss, levers=levers, spread=spread
        ),
        st.integers(1, 1000),
        st.floats(1e-3, 10),
        st.integers(0, 6),
        st.integers(0, 6),
        st.floats(0, 0.3),
    )
    return st.lists(one, min_size=1, max_size=12)


@given(candidates())
def test_the_choice_is_as_fast_as_the_fastest_but_for_the_noise(found: list[Candidate]) -> None:
    """Accuracy decides between plans that the clock cannot tell apart, and never beyond that."""
    chosen, noise, why = choose(found)

    fastest = min(c.seconds for c in found)
    assert chosen in found
    assert chosen.seconds <= fastest * (1 + noise)
    assert noise >= LEAST_NOISE
    assert why


@given(candidates())
def test_of_equally_fast_plans_none_changes_the_result_less(found: list[Candidate]) -> None:
    """Near-ties go to the most accurate plan."""
    chosen, noise, _ = choose(found)

    limit = min(c.seconds for c in found) * (1 + noise)
    assert chosen.loss == min(c.loss for c in found if c.seconds <= limit)


def test_an_exact_plan_wins_a_near_tie_and_loses_a_clear_one() -> None:
    """Four per cent are noise; eight are not."""
    lossy = replace(PLAIN, loss=2, levers=1, seconds=1.0, plan=PLANS["bf16"])

    assert choose([lossy, replace(PLAIN, seconds=1.04)])[0].loss == 0
    assert choose([lossy, replace(PLAIN, seconds=1.08)])[0].loss == 2


def test_of_two_ways_to_share_the_plainer_wins_a_near_tie() -> None:
    """fsdp2 is one choice more than ddp; where it is faster beyond the noise it is taken."""
    ddp = replace(PLAIN, parallel="ddp", seconds=1.04)
    fsdp2 = replace(PLAIN, parallel="fsdp2", levers=1)

    chosen, _, why = choose([fsdp2, ddp])

    assert chosen == ddp
    assert "fp32 by fsdp2" in why
    assert choose([fsdp2, replace(ddp, seconds=1.08)])[0] == fsdp2
    assert len({candidate.setup for candidate in (PLAIN, ddp, fsdp2)}) == 3


def test_the_reason_says_that_accuracy_decided_and_against_which_plan() -> None:
    """A choice that is not the fastest names the fastest and the noise."""
    lossy = replace(PLAIN, loss=2, levers=1, plan=PLANS["bf16"])

    _, _, why = choose([lossy, replace(PLAIN, seconds=1.04)])

    assert "bf16" in why
    assert "changes the result less" in why
    assert "5%" in why


@given(candidates())
def test_no_plan_beats_one_of_the_frontier_in_both(found: list[Candidate]) -> None:
    """The frontier holds the fastest plan and the smallest, and nothing that is beaten."""
    edge = frontier(found)

    assert edge[0].seconds == min(c.seconds for c in found)
    assert edge[-1].bytes == min(c.bytes for c in found)
    for point in edge:
        assert not any(c.seconds <= point.seconds and c.bytes < point.bytes for c in found)
    assert [c.bytes for c in edge] == sorted({c.bytes for c in edge}, reverse=True)


@given(candidates(), st.integers(1, 1000))
def test_what_is_worth_a_look_holds_the_choice(found: list[Candidate], budget: int) -> None:
    """With exact estimates, nothing that is passed over could have been chosen."""
    ranked = sorted(found, key=lambda c: (c.seconds, c.loss, c.levers))
    fitting = [c for c in ranked if c.bytes <= budget]

    shortlist = worth_a_look(
        ranked, lambda c: c if c.bytes <= budget else None, most=len(found), slack=0.6
    )

    assert bool(shortlist) == bool(fitting)
    if fitting:
        best, mine = choose(fitting)[0], choose(shortlist)[0]
        assert (mine.seconds, mine.loss) == (best.seconds, best.loss)


def test_peaks_are_settled_only_as_far_as_they_are_needed() -> None:
    """A slower plan that is no more accurate is passed over, its peak unsettled."""
    asked: list[float] = []

    def fits(candidate: Candidate) -> Candidate:
        asked.append(candidate.seconds)
        return candidate

    ranked = [replace(PLAIN, seconds=seconds) for seconds in (1.0, 1.2, 1.25, 3.0)]

    assert [c.seconds for c in worth_a_look(ranked, fits, most=5, slack=0.3)] == [1.0]
    assert asked == [1.0]


@pytest.mark.parametrize("most", [1, 2, 3])
def test_no_more_finalists_than_asked_for(most: int) -> None:
    """Each finalist costs steps."""
    ranked = [replace(PLAIN, seconds=1 + i / 1000, loss=9 - i) for i in range(9)]

    assert len(worth_a_look(ranked, lambda c: c, most=most, slack=0.3)) == most


@given(candidates(), st.integers(0, 3), st.integers(1, 1000))
def test_a_roofline_alone_buys_no_store_that_rounds_more(
    found: list[Candidate], levels: int, budget: int
) -> None:
    """The first league of which one fits holds all that fit with the least lossy stores."""
    ranked = [replace(c, speed="roofline", stores_loss=c.loss % (levels + 1)) for c in found]

    fitting = [c for c in ranked if c.bytes <= budget]
    first = next((g for g in leagues(ranked) if any(c.bytes <= budget for c in g)), [])

    assert sorted(map(id, (c for g in leagues(ranked) for c in g))) == sorted(map(id, ranked))
    if fitting:
        least = min(c.stores_loss for c in fitting)
        assert [c for c in first if c.bytes <= budget] == [
            c for c in fitting if c.stores_loss == least
        ]


def test_where_steps_are_timed_all_stores_compete() -> None:
    """What the clock says of a store is a reason to choose it."""
    ranked = [replace(PLAIN, stores_loss=2), replace(PLAIN, seconds=2.0, speed="estimated")]

    assert leagues(ranked) == [ranked]


def test_a_plan_needs_what_it_took_where_that_is_more_than_was_predicted() -> None:
    """And never less than the prediction: a single step may have missed its peak."""
    assert replace(PLAIN, measured_bytes=150).need == 150
    assert replace(PLAIN, measured_bytes=50).need == PLAIN.need == 100
