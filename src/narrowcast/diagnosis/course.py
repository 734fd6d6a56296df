"""The steps of a training up to its failure, or to the end of the budget, and what is kept of them.

Steps are taken through the engine as a training takes them. Kept are the figures of all steps, and
whole snapshots of a few: the step that fails, the newest that were skipped late, and samples for
what goes wrong without a word.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from narrowcast.diagnosis.snapshot import (
    Buffers,
    Snapshot,
    copied_buffers,
    copied_weights,
    written_buffers,
)
from narrowcast.diagnosis.subject import Training
from narrowcast.engine.engine import Engine
from narrowcast.errors import PrecisionError, RecipeError
from narrowcast.records.run import SkipReason
from narrowcast.replay.moment import Moment
from narrowcast.training.step import StepTaken

__all__ = ["Course", "Point", "take_course"]

# Skips one to three of a row are how a scale is found (Lightning#9799 is a user whom they alarmed);
# at the fourth the floor is tried, and again whenever four more have followed.
_FIRST_DOUBT = 4
# Late skips that are kept: enough to see whether one scale would have served them all.
_LATE_SKIPS = 3


@dataclass(frozen=True, kw_only=True)
class Point:
    """One optimizer step as it is seen from outside."""

    step: int
    loss: float
    scale: float
    applied: bool
    reason: SkipReason = ""
    parameters: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Course:
    """What a training did within its budget."""

    points: tuple[Point, ...]
    symptom: str = ""
    """What failed, in words; '' where nothing did that can be seen from outside."""
    failing: Snapshot | None = None
    """The step that shows the symptom."""
    samples: tuple[Snapshot, ...] = ()
    """Steps that were chosen beforehand, in order."""
    late_skips: tuple[Snapshot, ...] = ()
    """The newest steps that were skipped after one had been applied."""
    raised: RecipeError | None = None
    """What the recipe's own code raised in the step that would have come next."""

    @property
    def losses(self) -> tuple[float, ...]:
        return tuple(point.loss for point in self.points)

    @property
    def applied(self) -> int:
        """Steps that moved the weights."""
        return sum(point.applied for point in self.points)

    @property
    def episodes(self) -> int:
        """Rows of skipped steps that began after the first applied step."""
        flags = [point.applied for point in self.points]
        return sum(before and not after for before, after in itertools.pairwise(flags))


@dataclass(kw_only=True)
class _Kept:
    """What there is of a course so far."""

    points: list[Point] = field(default_factory=list)
    samples: list[Snapshot] = field(default_factory=list)
    late_skips: deque[Snapshot] = field(default_factory=lambda: deque(maxlen=_LATE_SKIPS))

    def course(
        self,
        symptom: str = "",
        failing: Snapshot | None = None,
        raised: RecipeError | None = None,
    ) -> Course:
        return Course(
            points=tuple(self.points),
            symptom=symptom,
            failing=failing,
            samples=tuple(self.samples),
            late_skips=tuple(self.late_skips),
            raised=raised,
        )


def take_course(
    training: Training,
    steps: int,
    *,
    sample_at: Collection[int] = (),
    fails_at_floor: Callable[[Moment], bool] = lambda moment: False,
    moves: bool = True,
    around: Callable[[int], AbstractContextManager[object]] = lambda step: nullcontext(),
    observe: Callable[[int], None] = lambda step: None,
) -> Course:
    """Take up to `steps` optimizer steps, and stop at the first failure.

    `fails_at_floor` tells of a skipped step whether it would be skipped at the lowest scale too;
    without `moves` there is but one.
    `around` is entered round each step; `observe` is told its number when it is over.
    """
    kept, camera = _Kept(), _Camera(training)
    row = 0
    for number in range(1, steps + 1):
        before = copied_weights(training.engine) if number in sample_at else None
        try:
            with around(number):
                taken = camera.step(number)
        except RecipeError as error:
            lost = Point(step=number, loss=math.nan, scale=_scale(training.engine), applied=False)
            return kept.course(failing=camera.snapshot(lost), raised=error)
        point = _point(number, taken)
        row = 0 if point.applied else row + 1
        is_late = any(each.applied for each in kept.points)
        kept.points.append(point)
        observe(number)
        symptom = _symptom(point, taken.error)
        # A row that the budget cuts short is asked too: is it only a scale that was being found?
        if not symptom and row and (row % _FIRST_DOUBT == 0 or number == steps):
            fails = any(map(fails_at_floor, camera.moments))
            symptom = _doubt(row, point, moves=moves) if fails else ""
        if symptom:
            return kept.course(symptom, failing=camera.snapshot(point))
        if before is not None:
            kept.samples.append(camera.snapshot(point, before))
        elif is_late and not point.applied:
            kept.late_skips.append(camera.snapshot(point))
    return kept.course()


class _Camera:
    """Takes steps of a training, and holds of the newest one what a snapshot needs."""

    def __init__(self, training: Training) -> None:
        self.training = training
        self.moments: list[Moment] = []
        self._losses: tuple[float, ...] = ()
        self._first = copied_buffers(training.engine.model)
        self._buffers: list[Buffers] = []

    def step(self, number: int) -> StepTaken:
        engine = self.training.engine
        self.moments, self._buffers, self._losses = [], [], ()

        def note(part: Any) -> AbstractContextManager[object]:
            place = len(self.moments)
            self.moments.append(Moment.of(engine, part, number, micro_batch=place))
            self._buffers.append(copied_buffers(engine.model))
            return nullcontext()

        taken = self.training.step(note)
        self._losses = taken.losses
        return taken

    def snapshot(self, point: Point, weights: dict[str, Any] | None = None) -> Snapshot:
        """Keep the newest step; one that was skipped has left the weights as they were."""
        return Snapshot(
            step=point.step,
            weights=copied_weights(self.training.engine) if weights is None else weights,
            moments=tuple(self.moments),
            buffers=tuple(written_buffers(self._first, now) for now in self._buffers),
            losses=self._losses,
            scale=point.scale,
            applied=point.applied,
        )


def _scale(engine: Engine) -> float:
    return max(engine.loss_scales().values(), default=1.0)


def _point(number: int, taken: StepTaken) -> Point:
    report = taken.report
    return Point(
        step=number,
        loss=taken.loss,
        scale=report.loss_scale,
        applied=report.applied,
        reason=report.reason,
        parameters=report.parameters,
    )


def _symptom(point: Point, error: PrecisionError | None) -> str:
    """Say what fails at this step, for sure; '' where nothing does."""
    if not math.isfinite(point.loss):
        word = "NaN" if math.isnan(point.loss) else "infinite"
        return f"the loss is {word} at step {point.step}"
    if point.reason == "non-finite gradient":
        return f"the gradients of {_few(point.parameters)} are not finite at step {point.step}"
    return "" if error is None else error.message


def _doubt(row: int, point: Point, *, moves: bool) -> str:
    """Say that a row of skips, which a lower scale might end, is not going to end."""
    rows = f"{row} steps in a row were skipped, the last one" if row > 1 else "a step was skipped,"
    end = "at the lowest scale its gradients overflow as well" if moves else "it never comes down"
    return f"{rows} step {point.step} at loss scale {point.scale:g}, and {end}"


def _few(names: tuple[str, ...]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more if names else "a parameter"
