"""The series of a run, in sixteen bytes a step, and the figures that its record takes from them."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from statistics import fmean, median
from typing import Any

from narrowcast.records.run import Evaluation, StepPoint

__all__ = ["Progress"]

# The steps that build the optimizer's state, warm the caches, and are measured (early_steps).
_UNTYPICAL_STEPS = 3


class Progress:
    """Loss and duration of every step so far."""

    def __init__(self) -> None:
        self._losses = array("d")
        self._seconds = array("d")

    @classmethod
    def of(cls, points: Iterable[StepPoint | Evaluation]) -> Progress:
        """Rebuild the series of a resumed run from its metrics."""
        progress = cls()
        for point in points:
            if isinstance(point, StepPoint):
                progress.add(point)
        return progress

    def add(self, point: StepPoint) -> None:
        self._losses.append(point.loss)
        self._seconds.append(point.seconds)

    def summary(self, *, samples_a_step: int) -> dict[str, Any]:
        """Return final_loss, step_seconds and samples_per_second of a RunRecord; {} before a step.

        The final loss is the mean over the last tenth of the steps, the duration the median without
        the first three, where there are more.
        """
        if not self._losses:
            return {}
        typical = self._seconds[_UNTYPICAL_STEPS:] or self._seconds
        duration = median(typical)
        return {
            "final_loss": fmean(self._losses[-max(1, len(self._losses) // 10) :]),
            "step_seconds": duration,
            "samples_per_second": samples_a_step / duration,
        }
