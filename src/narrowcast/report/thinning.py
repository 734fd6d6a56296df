"""Long curves made short enough to draw without hiding what happened."""

from __future__ import annotations

import math
from collections.abc import Sequence

from narrowcast.records.run import StepPoint

__all__ = ["MOST_POINTS", "thinned"]

MOST_POINTS = 2000
"""A page with four such curves still draws within a second on a phone; screens are narrower."""


def thinned(points: Sequence[StepPoint], most: int = MOST_POINTS) -> tuple[StepPoint, ...]:
    """Keep about `most` points: of every stretch the first and both extremes, and every odd one.

    A spike, a skipped step and a loss that is not finite are never thinned away, so the result can
    be longer than `most` in a run that has many of them.
    """
    if len(points) <= most:
        return tuple(points)
    stretch = math.ceil(len(points) / max(most // 3, 1))
    kept: set[int] = {len(points) - 1}
    for start in range(0, len(points), stretch):
        block = range(start, min(start + stretch, len(points)))
        finite = [i for i in block if math.isfinite(points[i].loss)]
        kept.add(start)
        kept.update(i for i in block if not points[i].applied or not math.isfinite(points[i].loss))
        if finite:
            kept.add(min(finite, key=lambda i: points[i].loss))
            kept.add(max(finite, key=lambda i: points[i].loss))
    return tuple(points[i] for i in sorted(kept))
