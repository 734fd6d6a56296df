"""The smallest set that makes a test pass, when adding to a set can never make it fail.

The test is the expensive part (a replayed training step), so the search counts it:

    1. gallop      1, 2, 4, ... of the candidates, the likeliest first, until the test passes:
                   where the evidence ranks well, all others are never looked at
    2. QuickXplain halves within that prefix (Junker 2004, "QuickXplain: preferred explanations and
                   relaxations for over-constrained problems", AAAI, figure 1)
    3. proof       each member is left out alone, and the test must fail; and no set whatever that
                   leaves it out may pass, or the answer is not the only one

For k members among N candidates that is at most 2 k log2(N / k) + 2 k calls for step 2 (Junker,
theorem 2), log2 N + 2 for step 1 and 2 k for step 3: within 3 (k + 2) log2 N from N = 8 on.

Candidates are dotted names, and ``a.b`` lies inside ``a``: a set that holds ``a`` holds all of it.
Blocks, modules and operations are therefore one list, in which what is larger stands further back
and is taken only where nothing inside it is enough.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from narrowcast.errors import UsageError

__all__ = ["SearchResult", "lies_in", "smallest_set"]

Test = Callable[[frozenset[str]], bool]


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """The set that was found, what it cost, and what speaks for it."""

    kept: tuple[str, ...]
    """In the order of the candidates."""
    calls: int
    """Tests that were run; a set that was seen before is not tested again."""
    fails_without: dict[str, bool]
    """For each member, whether the test fails when that member alone is left out."""
    unique: bool
    """Whether every set that passes contains all members."""
    alternatives: tuple[tuple[str, ...], ...] = ()
    """Where it is not unique: one other set for each member that can be done without."""

    @property
    def is_minimal(self) -> bool:
        """Whether no member can be left out alone."""
        return all(self.fails_without.values())


def lies_in(name: str, container: str) -> bool:
    """Whether a dotted name is, or is inside, another; all names lie in ''."""
    return not container or name == container or name.startswith((f"{container}.", f"{container}:"))


def smallest_set(candidates: Sequence[str], passes: Test) -> SearchResult | None:
    """Return a set of candidates that passes and of which no member can go, or None if all fail.

    Of such sets it is the smallest of those that were met: where the answer is not unique, one that
    is smaller still may exist.

    `candidates` come in order of preference: the likeliest first, and what contains others after
    them. Raises UsageError for a name given twice, or if the test passes with the empty set.
    """
    if len(set(candidates)) != len(candidates):
        raise UsageError(f"{len(candidates)} candidates, of which some are given twice")
    test = _Counted(passes)
    if test(()):
        raise UsageError(
            "the test passes with nothing kept: there is nothing to search for",
            hint="check that the failure can be repeated before searching for its cause",
        )
    prefix = _gallop(candidates, test)
    if prefix is None:
        return None
    kept = _quickxplain((), (), prefix, test)
    kept = tuple(name for name in candidates if name in kept)
    alternatives = dict.fromkeys(_alternatives(kept, candidates, test))
    unique = not alternatives
    best = min(alternatives, key=len, default=kept)
    if len(best) < len(kept):
        del alternatives[best]
        alternatives[kept] = None
        kept = best
    return SearchResult(
        kept=kept,
        fails_without={
            name: not test(tuple(other for other in kept if other != name)) for name in kept
        },
        calls=test.calls,
        unique=unique,
        alternatives=tuple(alternatives),
    )


def _alternatives(
    kept: Sequence[str], candidates: Sequence[str], test: _Counted
) -> Iterator[tuple[str, ...]]:
    """Yield, for each member that can be done without, a set that passes without it."""
    for name in kept:
        others = [other for other in candidates if not lies_in(name, other)]
        if test(others):
            found = _quickxplain((), (), others, test)
            yield tuple(other for other in candidates if other in found)


class _Counted:
    """A test that remembers its answers, by what a set holds once names inside others are gone."""

    def __init__(self, passes: Test) -> None:
        self._passes = passes
        self._known: dict[frozenset[str], bool] = {}

    @property
    def calls(self) -> int:
        return len(self._known)

    def __call__(self, names: Iterable[str]) -> bool:
        outermost = _outermost(names)
        if outermost not in self._known:
            self._known[outermost] = self._passes(outermost)
        return self._known[outermost]


def _outermost(names: Iterable[str]) -> frozenset[str]:
    """Drop the names that lie inside others."""
    given = frozenset(names)
    return frozenset(name for name in given if given.isdisjoint(_containers(name)))


def _containers(name: str) -> Iterator[str]:
    """Yield every name that this one lies in, but for itself."""
    if name:
        yield ""
    for at, character in enumerate(name):
        if character in ".:":
            yield name[:at]


def _gallop(candidates: Sequence[str], test: _Counted) -> Sequence[str] | None:
    """Return the shortest prefix among those of 1, 2, 4, ... names that passes."""
    size = 1
    while size < len(candidates):
        if test(candidates[:size]):
            return candidates[:size]
        size *= 2
    return candidates if candidates and test(candidates) else None


def _quickxplain(
    background: Sequence[str], added: Sequence[str], names: Sequence[str], test: _Counted
) -> tuple[str, ...]:
    """Return a minimal part of `names` that passes together with `background`.

    `added` is what the background has gained since it was last tested. Of two parts that would do,
    the one of earlier names is taken.
    """
    if added and test(background):
        return ()
    if len(names) == 1:
        return tuple(names)
    middle = len(names) // 2
    first, second = names[:middle], names[middle:]
    from_second = _quickxplain((*background, *first), first, second, test)
    from_first = _quickxplain((*background, *from_second), from_second, first, test)
    return (*from_first, *from_second)
