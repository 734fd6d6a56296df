"""One optimizer step of a training: forward and backward of each micro-batch, then the engine's.

Whoever takes steps of a recipe (the loop, a diagnosis) takes them through here, so that there is
one order of calls and one way in which a step that was given up still counts as tried.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from narrowcast.engine.engine import Engine, StepReport
from narrowcast.errors import PrecisionError
from narrowcast.user_code import user_code

__all__ = ["StepTaken", "Watching", "take_step", "unwatched"]

Watching = Callable[[Any], AbstractContextManager[object]]
"""Gets a micro-batch on its way, and returns what its forward and backward pass run under."""


@dataclass(frozen=True, kw_only=True)
class StepTaken:
    """What one optimizer step gave."""

    losses: tuple[float, ...]
    """One for each micro-batch."""
    report: StepReport
    error: PrecisionError | None = None
    """What the engine gave up with: the step was tried and skipped, and it was the last."""

    @property
    def loss(self) -> float:
        """Mean over the micro-batches."""
        return sum(self.losses) / len(self.losses)


def unwatched(part: Any) -> AbstractContextManager[object]:
    """Watch nothing."""
    return nullcontext()


def take_step(
    engine: Engine,
    compute_loss: Callable[[nn.Module, Any], Tensor],
    next_part: Callable[[], Any],
    *,
    path: Path | None,
    watching: Watching = unwatched,
) -> StepTaken:
    """Take micro-batches from `next_part` until they make a step.

    `path` is the recipe's file, for the traceback of what its code raises.
    """
    losses = []
    step = engine.tried_steps() + 1
    while True:
        part = next_part()
        with watching(part):
            with engine.forward():
                loss = compute_loss(engine.model, part)
            with user_code(path, "the backward pass"):
                engine.backward(loss)
        losses.append(loss.detach())
        try:
            with user_code(path, "the step of optimizer and scheduler"):
                report, error = engine.step(), None
        except PrecisionError as gave_up:
            if engine.tried_steps() != step:
                raise
            report, error = _last_skip(engine), gave_up
        if report.complete:
            values = tuple(loss.item() for loss in losses)
            return StepTaken(losses=values, report=report, error=error)


def _last_skip(engine: Engine) -> StepReport:
    """Return the report of the step with which the engine gave up, from its ledger."""
    skip = engine.skips[-1]
    return StepReport(
        reason=skip.reason,
        step=skip.step,
        loss_scale=skip.loss_scale,
        parameters=skip.parameters,
    )
