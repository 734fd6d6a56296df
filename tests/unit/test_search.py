"""The smallest set is right, proved, and cheap, on tests that are known to be monotone."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from narrowcast.errors import UsageError
from narrowcast.search import lies_in, smallest_set


def test_every_name_lies_in_the_whole_and_in_itself() -> None:
    """A common beginning is not enough."""
    assert lies_in("a.b", "")
    assert lies_in("a.b", "a.b")
    assert lies_in("a.b:softmax", "a.b")
    assert not lies_in("a.bc", "a.b")


def needs_all(*needed: str) -> Callable[[frozenset[str]], bool]:
    """Pass when every needed name lies in the set."""
    return lambda kept: all(any(lies_in(name, k) for k in kept) for name in needed)


def ranked(names: list[str], first: set[str], rng: random.Random) -> list[str]:
    """Put the culprits somewhere in the first twentieth (or as near as there is room)."""
    room = max(len(first), math.ceil(0.05 * len(names)))
    others = [name for name in names if name not in first]
    rng.shuffle(others)
    head = [*first, *others[: room - len(first)]]
    rng.shuffle(head)
    return [*head, *others[room - len(first) :]]


def bound(k: int, n: int) -> float:
    """Return the calls that issue 4 allows."""
    return 3 * (k + 2) * math.log2(n)


@pytest.mark.parametrize("n", [8, 10, 50, 200, 1000])
@pytest.mark.parametrize("k", [1, 2, 3, 8])
@pytest.mark.parametrize("ranking", ["good", "random", "worst"])
def test_exactly_the_culprits_are_found_within_the_bound(n: int, k: int, ranking: str) -> None:
    """Every call counts, those of the proof too, and the bound holds for the worst ranking."""
    rng = random.Random(f"{n} {k} {ranking}")
    names = [f"m{i}" for i in range(n)]
    for _ in range(10):
        culprits = set(rng.sample(names, k))
        if ranking == "good":
            order = ranked(names, culprits, rng)
        else:
            order = rng.sample(names, n)
            if ranking == "worst":
                order.sort(key=lambda name: name in culprits)

        result = smallest_set(order, needs_all(*culprits))

        assert result is not None
        assert set(result.kept) == culprits
        assert result.unique
        assert result.is_minimal
        assert result.calls <= bound(k, n)


def test_a_block_is_taken_only_where_nothing_inside_it_is_enough() -> None:
    """What the block computes itself, outside its children, needs the block."""
    order = ["a.x", "a.y", "b.x", "b.y", "a", "b", ""]

    inside = smallest_set(order, needs_all("b.y"))
    own = smallest_set(order, lambda kept: bool(kept & {"b", ""}))

    assert inside is not None
    assert inside.kept == ("b.y",)
    assert inside.unique
    assert own is not None
    assert own.kept == ("b",)
    assert own.unique


def test_operations_lie_in_their_module() -> None:
    """``module:function`` is smaller than the module."""
    order = ["a:softmax", "a:matmul", "a", ""]

    result = smallest_set(order, needs_all("a:matmul"))

    assert result is not None
    assert result.kept == ("a:matmul",)


def test_an_answer_that_is_not_the_only_one_says_so() -> None:
    """One of two is enough: the other is given as the alternative."""
    result = smallest_set(["a", "b", "c"], lambda kept: bool(kept & {"a", "c"}))

    assert result is not None
    assert result.kept == ("a",)
    assert not result.unique
    assert result.alternatives == (("c",),)
    assert result.is_minimal


def test_a_smaller_set_that_does_without_a_member_is_taken() -> None:
    """The likeliest two would do together; one of the others does alone."""
    result = smallest_set(
        ["a", "b", "c", "d"], lambda kept: {"a", "b"} <= kept or bool(kept & {"d"})
    )

    assert result is not None
    assert result.kept == ("d",)
    assert not result.unique
    assert ("a", "b") in result.alternatives
    assert result.is_minimal


def test_nothing_helps() -> None:
    """Keeping everything fails as well: the cause lies elsewhere."""
    assert smallest_set(["a", "b", "c"], lambda _: False) is None
    assert smallest_set([], lambda _: False) is None


def test_a_test_that_passes_anyway_is_refused() -> None:
    """There is no failure to explain."""
    with pytest.raises(UsageError, match="passes with nothing kept"):
        smallest_set(["a"], lambda _: True)
    with pytest.raises(UsageError, match="given twice"):
        smallest_set(["a", "a"], lambda _: False)


@given(
    groups=st.lists(st.sets(st.integers(0, 19), min_size=1, max_size=4), min_size=1, max_size=4),
    order=st.permutations(range(20)),
)
@settings(deadline=None)
def test_what_is_found_is_minimal_for_any_monotone_test(
    groups: list[set[int]], order: list[int]
) -> None:
    """One of each group is needed: the set passes, no member is idle, and uniqueness is exact."""
    wanted = [{f"m{i}" for i in group} for group in groups]

    def passes(kept: frozenset[str]) -> bool:
        return all(kept & group for group in wanted)

    result = smallest_set([f"m{i}" for i in order], passes)

    assert result is not None
    assert passes(frozenset(result.kept))
    assert result.is_minimal
    assert result.unique == all({name} in wanted for name in result.kept)
    for other in result.alternatives:
        assert passes(frozenset(other))
        assert set(other) != set(result.kept)
