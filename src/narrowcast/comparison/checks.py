"""What a run must be to count: the one that the protocol asks for, unedited, begun as fp32 was.

These checks find mistakes and careless edits. They are no signature: who edits every file that says
the same thing is not found out.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from narrowcast.comparison.arms import Run
from narrowcast.errors import ProtocolError
from narrowcast.plan import Plan
from narrowcast.records.codec import RecordError, to_json
from narrowcast.records.comparison import Protocol
from narrowcast.records.run import Evaluation, RunRecord, StepPoint
from narrowcast.training.run_directory import RunDirectory

__all__ = ["Assignment", "check_is_asked", "check_started_alike", "read_points"]


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """One training that the protocol asks for."""

    arm: str
    """The precision, or the control's name; also the name of its folder."""
    plan: Plan
    seed: int
    steps: int
    perturb: bool
    directory: Path


def check_is_asked(record: RunRecord, assignment: Assignment, protocol: Protocol) -> None:
    """Raise ProtocolError unless the run is the one that the protocol asks for."""
    asked = {
        "precision": assignment.plan.name,
        "seed": assignment.seed,
        "planned_steps": assignment.steps,
        "options": protocol.options,
        "plan": to_json(assignment.plan),
        "recipe_digest": protocol.recipe_digest,
        "deterministic": protocol.training.get("deterministic", True),
    }
    wrong = [
        f"{name} is {getattr(record, name)!r}, {value!r} asked"
        for name, value in asked.items()
        if getattr(record, name) != value
    ]
    if wrong:
        raise ProtocolError(
            f"{assignment.directory} holds a run that the protocol does not ask for: "
            f"{'; '.join(wrong):.400}",
            hint="it was replaced or edited; remove that directory, and it will be run again",
        )


def read_points(record: RunRecord, assignment: Assignment) -> tuple[StepPoint | Evaluation, ...]:
    """Read metrics.jsonl; raises ProtocolError unless its evaluations are those of run.json."""
    hint = "one of the two was edited or damaged; remove that directory, and it will be run again"
    home = RunDirectory(assignment.directory)
    try:
        points = home.read_metrics()
    except RecordError as error:
        raise ProtocolError(f"{home.metrics_path}: {error.message}", hint=hint) from None
    # As JSON, in which NaN is equal to itself.
    told = [to_json(p) for p in points if isinstance(p, Evaluation)]
    if told != [to_json(e) for e in record.evaluations]:
        raise ProtocolError(
            f"{assignment.directory}: the evaluations in run.json are not those in metrics.jsonl",
            hint=hint,
        )
    return points


def check_started_alike(run: Run, reference: Run, assignment: Assignment) -> None:
    """Raise ProtocolError unless the run began and went on as fp32 did on the same seed.

    The control's weights are other ones by design. The data order can be compared only where both
    runs took the same number of steps; a run that failed took fewer. Evaluation data may have been
    exchanged while the comparison was interrupted.
    """
    ours, theirs = run.record, reference.record
    same_length = ours.completed_steps == theirs.completed_steps
    evaluated, evaluated_there = _evaluated_on(ours), _evaluated_on(theirs)
    for what, mine, other, comparable in (
        (
            "initial fp32 weights",
            ours.initial_weights_hash,
            theirs.initial_weights_hash,
            not assignment.perturb,
        ),
        ("order of samples", ours.data_order_hash, theirs.data_order_hash, same_length),
        (
            "evaluation samples",
            evaluated,
            evaluated_there,
            bool(evaluated and evaluated_there),
        ),
    ):
        if comparable and mine != other:
            raise ProtocolError(
                f"{assignment.arm} did not have the same {what} as {theirs.precision} on seed "
                f"{assignment.seed}: {mine[:12]} and {other[:12]}",
                hint="make the recipe draw all randomness from torch's, numpy's or Python's global "
                "generators, which are seeded, and from nothing else, and leave its data alone "
                "until all runs have ended",
            )


def _evaluated_on(record: RunRecord) -> str:
    """Return the hash of the samples of the last evaluation; empty where there was none."""
    return record.evaluations[-1].data_hash if record.evaluations else ""
