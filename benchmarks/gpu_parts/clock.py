"""Time that is left, and what repeated timings come to."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Clock", "ratios", "spread"]


@dataclass(frozen=True)
class Clock:
    """A moment of the wall clock by which a part has to be done."""

    until: float

    @property
    def left_s(self) -> float:
        return self.until - time.time()

    def is_over(self, needed_s: float = 0.0) -> bool:
        """Whether less than this is left."""
        return self.left_s <= needed_s

    def share(self, part: float) -> Clock:
        """Return the clock of the first part of what is left."""
        return Clock(time.time() + part * max(self.left_s, 0.0))


def spread(values: Sequence[float]) -> dict[str, float | int]:
    """Return median, quartiles and how many; quartiles are the extremes of fewer than four."""
    if len(values) < 4:
        low, high = min(values), max(values)
    else:
        low, _, high = statistics.quantiles(values, n=4)
    return {"median": statistics.median(values), "low": low, "high": high, "n": len(values)}


def ratios(over: Sequence[float], under: Sequence[float]) -> dict[str, float | int]:
    """Return the spread of paired ratios: round by round, the first over the second."""
    return spread([a / b for a, b in zip(over, under, strict=False)])
