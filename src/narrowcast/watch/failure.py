"""What counts as failing, decided from figures that a step leaves behind anyway.

A skipped step is ordinary while a loss scale is being found. A failure is what no lower scale can
cure, or has not cured for long, and a loss that a model which learns does not have.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal

from narrowcast.records.run import SkipReason
from narrowcast.replay.moment import Moment

__all__ = ["Failure", "LossLevel", "Symptom", "is_far_off", "skip_symptom"]

Symptom = Literal[
    "non-finite loss",
    "non-finite gradient",
    "skips in a row",
    "scale at its floor",
    "loss above its beginning",
    "loss far off fp32",
]

# As many as the engine lets pass of those that no scale can cure; a scale that began at 2^16 has
# come down to 2^8 by then.
SKIPS_IN_A_ROW = 8
# Losses that make a level: in 16 of a model that learns, one is below the worst of the first 16.
_WINDOW = 16
# Fifty bf16 roundings (2^-9 each) in one direction. A loss is a mean over many numbers, whose
# roundings cancel.
_FAR = 0.1


@dataclass(frozen=True, kw_only=True, eq=False)
class Failure:
    """A step that shows that a training fails, and what it takes to take it again."""

    step: int
    symptom: Symptom
    words: str
    """The symptom with its figures."""
    moments: tuple[Moment, ...]
    """The micro-batches of the step, in their order."""

    @property
    def moment(self) -> Moment:
        """The first micro-batch of the step."""
        return self.moments[0]


def skip_symptom(
    reason: SkipReason, *, row: int, scale: float, floor: float | None
) -> Symptom | None:
    """Return what a skipped step is a symptom of; None while a scale is being found.

    `row` skips in a row end with this one; `floor` is what the scale can come down to, None for
    one that does not move.
    """
    if reason == "non-finite loss":
        return "non-finite loss"
    if reason == "non-finite gradient":
        return "non-finite gradient"
    if floor is not None and scale <= floor:
        return "scale at its floor"
    return "skips in a row" if row >= SKIPS_IN_A_ROW else None


class LossLevel:
    """Tells whether a loss has risen above where it began, and stays there.

    Sixteen losses in a row, each above all of the first sixteen, after sixteen in between had a
    lower median than the first: the model had learned, and is now worse than untrained.
    """

    def __init__(self) -> None:
        self._first: list[float] = []
        self._recent: deque[float] = deque(maxlen=_WINDOW)
        self._added = 0
        self._above = 0
        """Losses in a row above all of the first."""
        self._worst = -math.inf
        self._has_learned = False

    def add(self, loss: float) -> bool:
        """Take in a finite loss; return whether the level is now above the beginning."""
        if not math.isfinite(loss):
            return False
        if len(self._first) < _WINDOW:
            self._first.append(loss)
            self._worst = max(self._worst, loss)
            return False
        self._recent.append(loss)
        self._added += 1
        self._above = self._above + 1 if loss > self._worst else 0
        if not self._has_learned and self._added % _WINDOW == 0:
            self._has_learned = median(self._recent) < median(self._first)
        return self._has_learned and self._above >= _WINDOW

    @property
    def words(self) -> str:
        return (
            f"the last {_WINDOW} losses are {_span(self._recent)}, all above the first {_WINDOW}, "
            f"{_span(self._first)}"
        )


def is_far_off(loss: float, shadow: float) -> bool:
    """Whether a loss is not what fp32 gives on the same weights and batch, but for rounding.

    One that is not finite in either is far off unless both are not.
    """
    if not (math.isfinite(loss) and math.isfinite(shadow)):
        return math.isfinite(loss) != math.isfinite(shadow)
    return abs(loss - shadow) > _FAR * max(abs(loss), abs(shadow))


def _span(losses: Sequence[float] | deque[float]) -> str:
    return f"{min(losses):.4g} to {max(losses):.4g}"
