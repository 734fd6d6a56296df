"""The figures that a record takes from the series of a run."""

from __future__ import annotations

import math

import pytest

from narrowcast.records.run import Evaluation, StepPoint
from narrowcast.training.progress import Progress


def point(step: int, *, loss: float, seconds: float) -> StepPoint:
    return StepPoint(
        step=step, loss=loss, loss_scale=1.0, gradient_norm=1.0, applied=True, seconds=seconds,
        learning_rate=0.1,
    )  # fmt: skip


def test_nothing_is_said_before_the_first_step() -> None:
    """There is no loss and no duration to give."""
    assert Progress().summary(samples_a_step=8) == {}


def test_final_loss_is_the_mean_over_the_last_tenth() -> None:
    """Of 40 steps the last four; of fewer than 20 the last one."""
    points = [point(n, loss=float(n), seconds=1.0) for n in range(1, 41)]

    assert Progress.of(points).summary(samples_a_step=1)["final_loss"] == 38.5
    assert Progress.of(points[:9]).summary(samples_a_step=1)["final_loss"] == 9.0


def test_step_time_is_the_median_without_the_first_three() -> None:
    """They build the optimizer's state and are measured; an outlier does not move the median."""
    seconds = [9.0, 8.0, 7.0, 0.2, 0.1, 0.3, 50.0]
    points = [point(n, loss=1.0, seconds=s) for n, s in enumerate(seconds, start=1)]

    summary = Progress.of(points).summary(samples_a_step=8)

    assert summary["step_seconds"] == 0.25
    assert summary["samples_per_second"] == 32.0


def test_a_run_of_three_steps_has_only_those() -> None:
    """Better a rough figure than none."""
    points = [point(n, loss=1.0, seconds=float(n)) for n in (1, 2, 3)]

    assert Progress.of(points).summary(samples_a_step=1)["step_seconds"] == 2.0


def test_a_loss_that_is_not_a_number_is_not_averaged_away() -> None:
    """A NaN in the last tenth makes the final loss NaN."""
    points = [point(n, loss=math.nan if n == 40 else 1.0, seconds=1.0) for n in range(1, 41)]

    assert math.isnan(Progress.of(points).summary(samples_a_step=1)["final_loss"])


def test_evaluations_are_no_steps() -> None:
    """The series is rebuilt from metrics.jsonl, where both stand."""
    evaluation = Evaluation(step=1, precision="fp32", metrics={"loss": 9.0}, examples=1)

    progress = Progress.of([point(1, loss=2.0, seconds=1.0), evaluation])

    assert progress.summary(samples_a_step=1)["final_loss"] == pytest.approx(2.0)
