"""From runs to an arm: nothing is dropped, and what is thinned keeps what matters."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from narrowcast.comparison.arms import Run, arm_record, losses_differ, same_training, value_of
from narrowcast.comparison.study import Assignment
from narrowcast.plan import PLANS
from narrowcast.records.memory import MemoryLine, MemoryRecord, TimelinePoint
from narrowcast.records.run import Evaluation, StepPoint
from trainings import FakeTrainer


def made(tmp_path: Path, seed: int, **changes: object) -> Run:
    """One run of 10 steps in bf16 with metric `loss`."""
    points: list[StepPoint] = []
    assignment = Assignment(
        arm="bf16", plan=PLANS["bf16"], seed=seed, steps=10, perturb=False, directory=tmp_path
    )
    record = FakeTrainer(change=lambda _: dict(changes))(assignment, points.append)
    return Run(record=record, steps=tuple(points), directory=f"arms/bf16/seed-{seed}")


def evaluation(value: float, *, step: int = 10, precision: str = "fp32") -> Evaluation:
    return Evaluation(step=step, precision=precision, metrics={"loss": value}, examples=10)


def test_values_in_the_two_precisions_are_kept_apart(tmp_path: Path) -> None:
    """`metrics` are evaluated in fp32, the others in the arm's own precision."""
    both = (evaluation(1.0), evaluation(2.0, precision="bf16"))
    runs = [made(tmp_path, 0, evaluations=both)]

    arm = arm_record("bf16", runs, metric="loss", reference=runs)

    assert arm.metrics == {"loss": (1.0,)}
    assert arm.training_precision_metrics == {"loss": (2.0,)}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e39])
def test_a_value_beyond_fp32_is_no_value(tmp_path: Path, value: float) -> None:
    """NaN, infinities and what fp32 cannot hold count as diverged."""
    run = made(tmp_path, 0, evaluations=(evaluation(value),))

    assert value_of(run, "loss") is None
    assert arm_record("bf16", [run], metric="loss", reference=[run]).diverged == (0,)


def test_only_the_evaluation_after_the_last_step_counts(tmp_path: Path) -> None:
    """A value from the middle of the training is not taken for its result."""
    run = made(tmp_path, 0, evaluations=(evaluation(1.0, step=5),))

    assert value_of(run, "loss") is None


def test_a_diverged_run_stays_in_every_list(tmp_path: Path) -> None:
    """Lists run parallel to the seeds, with None for the run that failed; means say how many."""
    runs = [
        made(tmp_path / "0", 0, evaluations=(evaluation(1.0),)),
        made(tmp_path / "1", 1, evaluations=(evaluation(math.nan),)),
        made(tmp_path / "2", 2, evaluations=(evaluation(3.0),), skipped_steps=4),
    ]

    arm = arm_record("bf16", runs, metric="loss", reference=runs)

    assert arm.metrics["loss"] == (1.0, None, 3.0)
    assert arm.metric_means["loss"] == 2.0
    assert arm.metric_sds["loss"] == pytest.approx(math.sqrt(2))
    assert arm.skipped_steps == 4
    assert arm.skipped_steps_per_seed == (0, 0, 4)
    assert arm.total_steps == 30


def test_all_runs_diverged_gives_an_arm_without_numbers(tmp_path: Path) -> None:
    """No mean of nothing, and the metric's name is there all the same."""
    run = made(tmp_path, 0, evaluations=(), peak_bytes=None, step_seconds=None)

    arm = arm_record("bf16", [run], metric="accuracy", reference=[run])

    assert arm.metrics == {"accuracy": (None,)}
    assert arm.metric_means == {"accuracy": None}
    assert arm.peak_bytes is None
    assert arm.step_seconds is None


def test_time_and_memory_are_medians(tmp_path: Path) -> None:
    """One slow run does not make an arm slow; a median of bytes is one of the measured ones."""
    times, peaks = (1.0, 9.0, 1.2), (10, 20, 30)
    runs = [
        made(tmp_path / str(i), i, step_seconds=t, peak_bytes=p)
        for i, (t, p) in enumerate(zip(times, peaks, strict=True))
    ]

    arm = arm_record("bf16", runs, metric="loss", reference=runs)

    assert arm.step_seconds == 1.2
    assert arm.peak_bytes == 20
    assert arm.step_seconds_per_seed == times


def test_one_run_that_missed_its_precision_marks_the_arm(tmp_path: Path) -> None:
    """The precision was honoured only if it was in every run that measured it."""
    counts = {"matmul": {"fp32": 3}}
    runs = [
        made(tmp_path / "0", 0, executed_dtypes=counts, precision_honoured=True),
        made(tmp_path / "1", 1, executed_dtypes=counts, precision_honoured=False),
        made(tmp_path / "2", 2),
    ]

    arm = arm_record("bf16", runs, metric="loss", reference=runs)

    assert arm.precision_honoured is False
    assert arm.executed_dtypes == counts


def test_long_curves_are_thinned_and_keep_their_skips(tmp_path: Path) -> None:
    """A few hundred points: the first, the last, and every step that was not applied."""
    run = made(tmp_path, 0)
    points = tuple(replace(run.steps[0], step=i, applied=i != 777) for i in range(1, 5001))
    long = replace(run, steps=points)

    (curve,) = arm_record("bf16", [long], metric="loss", reference=[long]).curves

    assert len(curve) < 300
    assert (curve[0].step, curve[-1].step) == (1, 5000)
    assert [p.step for p in curve if not p.applied] == [777]


def test_a_thinned_timeline_keeps_the_peak(tmp_path: Path) -> None:
    """The highest point of a timeline survives, whatever its place."""
    timeline = tuple(
        TimelinePoint(
            index=i, phase="forward", module="", bytes=10**6 if i == 1234 else i, categories={}
        )
        for i in range(3000)
    )
    memory = MemoryRecord(
        recipe="fake",
        precision="bf16",
        device="cpu",
        batch_size=4,
        total_peak_bytes=10**6,
        peak_phase="forward",
        peak_module="",
        lines=(MemoryLine(category="parameters", bytes=10**6),),
        modules=(),
        timeline=timeline,
    )
    run = made(tmp_path, 0, memory=memory)

    arm = arm_record("bf16", [run], metric="loss", reference=[run])

    assert len(arm.memory_timeline) <= 240
    assert ("forward", 10**6) in arm.memory_timeline
    assert arm.memory_lines == {"parameters": 10**6}


def test_curves_are_compared_bit_for_bit(tmp_path: Path) -> None:
    """One last bit of one step's loss is a difference; NaN in the same place is none."""
    run = made(tmp_path, 0)
    nudged = list(run.steps)
    nudged[3] = replace(nudged[3], loss=math.nextafter(nudged[3].loss, math.inf))
    nan = tuple(replace(p, loss=math.nan) for p in run.steps)

    assert same_training(run, run)
    assert losses_differ(replace(run, steps=tuple(nudged)), run)
    assert losses_differ(replace(run, steps=run.steps[:-1]), run)
    assert not losses_differ(replace(run, steps=nan), replace(run, steps=nan))
