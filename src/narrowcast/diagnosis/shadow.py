"""What the same steps give in fp32, and whether the losses are further off than noise is.

Three trainings of the same data and random numbers are compared: the one under suspicion, one in
fp32, and a control in fp32 that starts from weights rounded once to the low format. The control
shows what a perturbation of that size does to this training by itself, so that the noise which any
training makes of any rounding is not taken for harm. (A control one unit in the last place away, as
in ``training.perturbation``, is closer to fp32 than any 16-bit training can be in its first steps.)

Plain values in, plain values out.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from narrowcast.formats import float_format

__all__ = ["Deviation", "deviation", "divergence", "progress"]

# The losses at the end are those of the last quarter of the steps: a mean over some batches.
_LAST = 4
# Times the control's own distance; a low-precision run is rounded at every operation of every step,
# the control once at the start, so that it may well be some times further off.
_ENVELOPES = 4.0
# Units in the last place of the loss itself by which every 16-bit forward pass may be off.
_ULPS = 4.0
# A quarter of what fp32 has learnt in these steps is what one would call far off.
_SHARE_OF_PROGRESS = 0.25


@dataclass(frozen=True, kw_only=True)
class Deviation:
    """How far the losses at the end are above fp32's, and how far that would be noise."""

    gap: float
    """Mean loss of the last quarter of the steps, minus fp32's on the same batches."""
    control: float
    """The same for the control: root mean square over those steps."""
    allowed: float
    progress: float
    """By how much the loss has fallen in fp32."""

    @property
    def is_far_off(self) -> bool:
        """Whether the loss is higher than fp32's by more than noise explains."""
        return self.gap > self.allowed

    @property
    def is_far_below(self) -> bool:
        """Whether it is lower by as much: no failure, but the two may not learn the same task."""
        return self.gap < -self.allowed


def deviation(
    low: Sequence[float], reference: Sequence[float], control: Sequence[float], *, compute: str
) -> Deviation:
    """Compare losses of equal steps after equal numbers of updates."""
    count = max(1, len(low) // _LAST)
    gaps = [a - b for a, b in zip(low[-count:], reference[-count:], strict=True)]
    noise = [a - b for a, b in zip(control[-count:], reference[-count:], strict=True)]
    gap = statistics.fmean(gaps)
    spread = math.sqrt(statistics.fmean(x * x for x in noise))
    learnt = progress(reference)
    level = abs(statistics.fmean(reference[-count:]))
    allowed = max(
        _ENVELOPES * spread,
        _ULPS * float_format(compute).eps * level,
        _SHARE_OF_PROGRESS * abs(learnt),
    )
    return Deviation(gap=gap, control=spread, allowed=allowed, progress=learnt)


def progress(losses: Sequence[float]) -> float:
    """Return by how much the loss has fallen, from the first quarter to the last: by medians."""
    count = max(1, len(losses) // _LAST)
    return statistics.median(losses[:count]) - statistics.median(losses[-count:])


def divergence(losses: Sequence[float]) -> float:
    """Return how many times its first level the loss has risen above it; 0 where it has not.

    By medians of the first and the last quarter; the spread of the first counts as level too, so
    that a loss near 0 or a noisy one is not called diverging for nothing.
    """
    count = max(1, len(losses) // _LAST)
    first = losses[:count]
    level = max(abs(statistics.median(first)), max(first) - min(first))
    rise = -progress(losses)
    if rise <= 0:
        return 0.0
    return rise / level if level else math.inf
