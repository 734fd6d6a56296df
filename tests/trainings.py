"""Trainings that cost nothing: a fake trainer that leaves what a real one leaves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from narrowcast.comparison.study import Assignment
from narrowcast.errors import PrecisionError
from narrowcast.records.codec import dumps, to_json
from narrowcast.records.run import Environment, Evaluation, RunRecord, StepPoint
from narrowcast.training.run_directory import RunDirectory

ENVIRONMENT = Environment(
    device="cpu",
    device_name="test machine",
    threads=1,
    platform="test",
    python="3",
    torch="2",
    narrowcast="0",
)


def no_harm(assignment: Assignment) -> float:
    """fp32's loss depends on the seed; the others lie a little beside it, seed by seed."""
    beside = {"fp32": 0.0, "fp16": 0.3, "bf16": 0.7}[assignment.plan.name]
    wobble = (assignment.seed * 7919 % 13 - 6) / 1000
    return 1 + assignment.seed % 17 / 10 + beside * wobble + 1e-6 * assignment.perturb


@dataclass
class FakeTrainer:
    """Trains nothing: writes run.json and metrics.jsonl with the loss that `loss` says."""

    loss: Callable[[Assignment], float] = no_harm
    change: Callable[[Assignment], dict[str, Any]] = lambda _: {}
    """Fields of the record that differ for an assignment."""
    diverges: Callable[[Assignment], bool] = lambda _: False
    calls: list[tuple[str, int]] = field(default_factory=list)

    def __call__(self, assignment: Assignment, observe: Callable[[Any], None]) -> RunRecord:
        self.calls.append((assignment.arm, assignment.seed))
        final = self.loss(assignment)
        points = [
            StepPoint(
                step=i,
                loss=final + 1 / i,
                loss_scale=1.0,
                gradient_norm=1.0,
                applied=True,
                seconds=0.01,
                learning_rate=0.1,
            )
            for i in range(1, assignment.steps + 1)
        ]
        diverged = self.diverges(assignment)
        record = RunRecord(
            **{
                "recipe": "fake",
                "recipe_path": "fake.py",
                "options": {},
                "precision": assignment.plan.name,
                "plan": to_json(assignment.plan),
                "seed": assignment.seed,
                "planned_steps": assignment.steps,
                "completed_steps": assignment.steps,
                "batch_size": 4,
                "status": "failed" if diverged else "finished",
                "failure": "the loss is NaN" if diverged else "",
                "failure_kind": "PrecisionError" if diverged else "",
                "evaluations": () if diverged else self._evaluations(assignment, final),
                "final_loss": final,
                "peak_bytes": 1000,
                "step_seconds": 0.01,
                "initial_weights_hash": f"weights {assignment.seed} {assignment.perturb}",
                "data_order_hash": f"order {assignment.seed}",
                "perturbation": "a weight" if assignment.perturb else "",
                "environment": ENVIRONMENT,
                "started": "now",
            }
            | self.change(assignment)
        )
        home = RunDirectory(assignment.directory)
        home.write_record(record)
        home.metrics_path.write_text(
            "".join(dumps(p, indent=None) + "\n" for p in (*points, *record.evaluations))
        )
        for point in points:
            observe(point)
        if record.status == "failed":
            raise PrecisionError(record.failure)
        return record

    @staticmethod
    def _evaluations(assignment: Assignment, final: float) -> tuple[Evaluation, ...]:
        step, names = assignment.steps, dict.fromkeys(("fp32", assignment.plan.name))
        return tuple(
            Evaluation(step=step, precision=name, metrics={"loss": final}, examples=10)
            for name in names
        )
