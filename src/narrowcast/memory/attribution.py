"""From the log of a step to the ledger of its peak: by category, by module and over time.

The log is replayed with the roles that the storages turned out to have, so that a gradient counts
as a gradient from its first byte on, not only after autograd has put it in its place.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence, Set
from typing import NamedTuple

from narrowcast.memory.storages import Holding
from narrowcast.records.memory import CATEGORIES, MemoryLine, ModuleMemory, TimelinePoint

__all__ = ["Moment", "held_at", "lines_of", "modules_of", "peak_of", "timeline_of", "without"]

Log = Sequence[tuple[Holding, int]]


class Moment(NamedTuple):
    """The state after one operation: how far the log had grown, and what was at work."""

    logged: int
    phase: str
    module: str
    bytes: int


def peak_of(moments: Sequence[Moment]) -> int:
    """Return the index of the first moment with the most bytes."""
    return max(range(len(moments)), key=lambda i: (moments[i].bytes, -i))


def held_at(log: Log, moment: Moment) -> dict[Holding, int]:
    """Return the bytes of every storage that was live at a moment."""
    held: dict[Holding, int] = defaultdict(int)
    for holding, change in log[: moment.logged]:
        held[holding] += change
    return {holding: size for holding, size in held.items() if size}


def lines_of(held: dict[Holding, int]) -> tuple[MemoryLine, ...]:
    """Sum by category, every category named, in the order of the tables."""
    totals = dict.fromkeys(CATEGORIES, 0)
    for holding, size in held.items():
        totals[holding.role] += size
    return tuple(MemoryLine(category=name, bytes=size) for name, size in totals.items())


def modules_of(held: dict[Holding, int]) -> tuple[ModuleMemory, ...]:
    """Sum by module and category, largest module first."""
    by_module: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for holding, size in held.items():
        by_module[holding.module][holding.role] += size
    modules = [
        ModuleMemory(
            name=name,
            bytes=sum(parts.values()),
            categories={c: parts[c] for c in CATEGORIES if c in parts},
        )
        for name, parts in by_module.items()
    ]
    return tuple(sorted(modules, key=lambda module: (-module.bytes, module.name)))


def timeline_of(log: Log, moments: Sequence[Moment], most: int) -> tuple[TimelinePoint, ...]:
    """Replay the log and return at most `most` points, the peak and each phase's highest kept."""
    keep = _thinned(moments, most)
    points = []
    totals: dict[str, int] = dict.fromkeys(CATEGORIES, 0)
    done = 0
    for index in keep:
        moment = moments[index]
        for holding, change in log[done : moment.logged]:
            totals[holding.role] += change
        done = moment.logged
        points.append(
            TimelinePoint(
                index=index,
                phase=moment.phase,
                module=moment.module,
                bytes=moment.bytes,
                categories={name: size for name, size in totals.items() if size},
            )
        )
    return tuple(points)


def without(
    hidden: Set[Holding], log: Log, moments: Sequence[Moment]
) -> tuple[list[tuple[Holding, int]], list[Moment]]:
    """Return log and moments as they would be had some holdings never been."""
    kept: list[tuple[Holding, int]] = []
    # Of each prefix of the log: how many of its events stay, and the bytes of those that do not.
    stays, hides = [0], [0]
    for holding, change in log:
        is_hidden = holding in hidden
        if not is_hidden:
            kept.append((holding, change))
        stays.append(len(kept))
        hides.append(hides[-1] + (change if is_hidden else 0))
    return kept, [
        Moment(stays[m.logged], m.phase, m.module, m.bytes - hides[m.logged]) for m in moments
    ]


def _thinned(moments: Sequence[Moment], most: int) -> list[int]:
    """Choose the ends and, from each of equal stretches, the lowest and the highest moment."""
    count = len(moments)
    if count <= most:
        return list(range(count))
    stretches = max((most - 2) // 2, 1)
    chosen = {0, count - 1}
    for k in range(stretches):
        stretch = range(k * count // stretches, (k + 1) * count // stretches)
        chosen |= _extremes(moments, stretch)
    return sorted(chosen)


def _extremes(moments: Sequence[Moment], stretch: Iterable[int]) -> set[int]:
    def height(index: int) -> tuple[int, int]:
        return moments[index].bytes, -index  # the first of equals, as peak_of chooses

    indices = list(stretch)
    return {max(indices, key=height), min(indices, key=height)}
