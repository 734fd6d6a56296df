"""How a comparison is carried out: arms x seeds of trainings, as written down, into one record.

    write the protocol down and hash it, or recognise the one that this directory began with
    for each seed:                          seeds outside, so that time affects all arms alike
        for fp32, fp32 perturbed, and each candidate:
            train, or take the run that already ended there
            the same initial weights and data order as fp32 on this seed, or an error
    judge, say what was not tested, write comparison.json

Nothing is lost by an interruption: the same command goes on with the runs that have not ended. Who
trains is an argument, so that all of this is tested with trainings that cost nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from narrowcast.comparison.arms import Run, arm_record, losses_differ
from narrowcast.comparison.checks import (
    Assignment,
    check_is_asked,
    check_started_alike,
    read_points,
)
from narrowcast.comparison.protocol import refuse_anything_else, write_down
from narrowcast.comparison.untested import what_was_not_tested
from narrowcast.comparison.verdicts import (
    differences_per_seed,
    judge,
    standard_deviation_of_difference,
)
from narrowcast.errors import PrecisionError, RecipeError
from narrowcast.files import write_atomically
from narrowcast.plan import Plan
from narrowcast.records.codec import dumps
from narrowcast.records.comparison import ComparisonRecord, ControlRecord, Protocol
from narrowcast.records.run import Environment, RunRecord, StepPoint
from narrowcast.training.events import Event, Hearing, Observer
from narrowcast.training.run_directory import RunDirectory

__all__ = [
    "COMPARISON_FILE",
    "Assignment",
    "ComparisonEvent",
    "ComparisonObserver",
    "RunBegins",
    "RunEnds",
    "Trainer",
    "assignments",
    "carry_out",
    "control_name",
]

COMPARISON_FILE = "comparison.json"


@dataclass(frozen=True, kw_only=True)
class RunBegins:
    """A training of the comparison begins; the events that follow are its own."""

    assignment: Assignment
    index: int
    """Counts from 1."""
    total: int


@dataclass(frozen=True, kw_only=True)
class RunEnds:
    """A training ended, now or (`reused`) in an earlier call of the same comparison."""

    assignment: Assignment
    record: RunRecord
    reused: bool


ComparisonEvent = RunBegins | RunEnds | Event
ComparisonObserver = Callable[[ComparisonEvent], None]
Trainer = Callable[[Assignment, Observer], RunRecord]
"""Trains one assignment, going on with what lies in its directory; may raise PrecisionError."""


def carry_out(
    protocol: Protocol,
    plans: Mapping[str, Plan],
    directory: Path,
    *,
    train: Trainer,
    environment: Environment,
    observe: ComparisonObserver = lambda _: None,
    warnings: Sequence[str] = (),
    command: str = "",
) -> ComparisonRecord:
    """Carry out the protocol in this directory and return the record that comparison.json holds.

    Raises ProtocolError if the protocol was edited or the arms did not start alike,
    RunDirectoryError if the directory holds something else, KeyboardInterrupt after a run was
    interrupted and saved; every other error of a training as it is. A training that diverges is no
    error but a result.
    """
    refuse_anything_else(directory)
    with RunDirectory(directory).lock() as notes:
        protocol = write_down(directory, protocol, now=_now())
        runs = _run_all(protocol, plans, directory, train=train, observe=observe)
        record = _record(
            protocol, runs, environment=environment, warnings=(*warnings, *notes), command=command
        )
        write_atomically(directory / COMPARISON_FILE, dumps(record) + "\n")
    return record


def control_name(protocol: Protocol) -> str:
    """Return the name of the control arm, which is also its folder."""
    return f"{protocol.reference}-perturbed"


def assignments(
    protocol: Protocol, plans: Mapping[str, Plan], directory: Path
) -> tuple[Assignment, ...]:
    """List every training of the comparison in the order in which they are carried out."""
    reference = plans[protocol.reference]
    control = (control_name(protocol), reference, True)
    candidates = [(name, plans[name], False) for name in protocol.arms[1:]]
    return tuple(
        Assignment(
            arm=arm,
            plan=plan,
            seed=seed,
            steps=protocol.steps,
            perturb=perturb,
            directory=directory / "arms" / arm / f"seed-{seed}",
        )
        for seed in protocol.seeds
        for arm, plan, perturb in ((protocol.reference, reference, False), control, *candidates)
    )


def _run_all(
    protocol: Protocol,
    plans: Mapping[str, Plan],
    directory: Path,
    *,
    train: Trainer,
    observe: ComparisonObserver,
) -> dict[str, list[Run]]:
    """Run or reuse every assignment; returns the runs of each arm in the order of the seeds."""
    work = assignments(protocol, plans, directory)
    runs: dict[str, list[Run]] = {a.arm: [] for a in work}
    for index, assignment in enumerate(work, start=1):
        observe(RunBegins(assignment=assignment, index=index, total=len(work)))
        is_reference = assignment.arm == protocol.reference
        stands = not is_reference and runs[protocol.reference][-1].record.status == "finished"
        record = _ended_before(assignment, fp32_stands=stands)
        reused = record is not None
        hearing = Hearing(observe)
        if record is None:
            record = _train_one(assignment, train, hearing, fp32_stands=stands)
        check_is_asked(record, assignment, protocol)
        points = read_points(record, assignment)
        run = Run(
            record=record,
            steps=tuple(p for p in points if isinstance(p, StepPoint)),
            directory=assignment.directory.relative_to(directory).as_posix(),
        )
        runs[assignment.arm].append(run)
        first = runs[protocol.reference][-1]
        check_started_alike(run, first, assignment)
        observe(RunEnds(assignment=assignment, record=record, reused=reused))
        if hearing.stop_asked:  # while this run was being ended: it counts, and no other begins
            raise KeyboardInterrupt
    return runs


def _ended_before(assignment: Assignment, *, fp32_stands: bool) -> RunRecord | None:
    """Return the run that an earlier call of this comparison ended here, if there is one.

    A run whose numbers broke has ended: it gets no second chance. One that failed for a full disk,
    or a mistake in the recipe that fp32 meets too, has not.
    """
    home = RunDirectory(assignment.directory)
    if not home.holds_a_run():
        return None
    record = home.read_record()
    ended = record.status == "finished" or _is_a_result(record, fp32_stands=fp32_stands)
    return record if ended else None


def _is_a_result(record: RunRecord, *, fp32_stands: bool) -> bool:
    """Whether this failure tells something of the arm, and not of the machine or the recipe.

    Too little memory is raised in the recipe's code too, and is no matter of its numbers.
    """
    if record.status != "failed":
        return False
    if record.failure_kind == PrecisionError.__name__:
        return True
    out_of_memory = "raised OutOfMemoryError" in record.failure
    return record.failure_kind == RecipeError.__name__ and fp32_stands and not out_of_memory


def _train_one(
    assignment: Assignment, train: Trainer, observe: Observer, *, fp32_stands: bool
) -> RunRecord:
    """Train, and take a failure of the numbers for the result that it is.

    So is what the recipe raises, once fp32 has finished on the same seed.
    """
    try:
        record = train(assignment, observe)
    except (PrecisionError, RecipeError):
        home = RunDirectory(assignment.directory)
        if not home.holds_a_run():
            raise  # before the first step: there is no training that could have diverged
        record = home.read_record()
        if not _is_a_result(record, fp32_stands=fp32_stands):
            raise
    if record.status == "interrupted":
        raise KeyboardInterrupt
    return record


def _record(
    protocol: Protocol,
    runs: Mapping[str, Sequence[Run]],
    *,
    environment: Environment,
    warnings: Iterable[str],
    command: str,
) -> ComparisonRecord:
    """Aggregate, judge, and say what was not tested."""
    reference = runs[protocol.reference]
    arms = tuple(
        arm_record(name, runs[name], metric=protocol.metric, reference=reference)
        for name in protocol.arms
    )
    control = _control(protocol, runs)
    verdicts = judge(protocol, arms, control.arm)
    return ComparisonRecord(
        protocol=protocol,
        arms=arms,
        control=control,
        verdicts=verdicts,
        untested=what_was_not_tested(
            protocol, arms, verdicts, control=control, environment=environment
        ),
        warnings=tuple(dict.fromkeys((*warnings, *_warnings(runs, control)))),
        environment=environment,
        started=protocol.written,
        finished=_now(),
        command=command,
    )


def _control(protocol: Protocol, runs: Mapping[str, Sequence[Run]]) -> ControlRecord:
    """Compare fp32 with itself perturbed: the noise floor, and whether anything was perturbed."""
    name, reference = control_name(protocol), runs[protocol.reference]
    arm = arm_record(name, runs[name], metric=protocol.metric, reference=reference)
    fp32 = arm_record(protocol.reference, reference, metric=protocol.metric, reference=reference)
    differences = differences_per_seed(protocol.metric, fp32, arm)
    return ControlRecord(
        arm=arm,
        perturbation="; ".join(dict.fromkeys(run.record.perturbation for run in runs[name])),
        loss_changed=tuple(
            losses_differ(run, other) for run, other in zip(runs[name], reference, strict=True)
        ),
        sd_of_difference=standard_deviation_of_difference(differences),
        differences=differences,
    )


def _warnings(runs: Mapping[str, Sequence[Run]], control: ControlRecord) -> Iterable[str]:
    """Yield what the runs warned of, and what makes them not comparable with each other."""
    for arm, members in runs.items():
        for run in members:
            yield from (f"{arm}: {text}" for text in run.record.warnings)
    if not all(control.loss_changed):
        yield (
            "the control's perturbation changed no training loss on "
            f"{control.loss_changed.count(False)} of {len(control.loss_changed)} seeds: the noise "
            "floor is not known on them"
        )
    made_on = {
        (e.device_name, e.torch, e.narrowcast, e.threads)
        for members in runs.values()
        for e in (run.record.environment for run in members)
    }
    if len(made_on) > 1:
        described = "; ".join(" ".join(map(str, machine)) for machine in sorted(made_on))
        yield f"the runs were made on different machines or versions: {described}"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
