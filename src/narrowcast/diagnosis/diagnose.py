"""Why a training breaks in a precision: the verdict with its evidence, and what cures it, tried.

    record = narrowcast.diagnose("train.py", "fp16", steps=50)
    print(record.verdict, record.finding.explanation)

A training is taken as asked and in fp32, its failing step is replayed operation by operation, and
each remedy is tried on that step. Nothing that the caller holds is changed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from narrowcast.diagnosis import minimal
from narrowcast.diagnosis.examine import Examined, examine, is_all_fp32
from narrowcast.diagnosis.gather import FULL
from narrowcast.diagnosis.listing import annotated_source
from narrowcast.diagnosis.remedies import grown_islands, tried_remedies
from narrowcast.diagnosis.shown import boundary_ranges
from narrowcast.diagnosis.subject import (
    ComputeLoss,
    Parts,
    Subject,
    subject_of_parts,
    subject_of_recipe,
)
from narrowcast.diagnosis.trials import Stage
from narrowcast.engine.parts import AskedScale
from narrowcast.errors import RecipeError, UsageError
from narrowcast.plan import Plan
from narrowcast.plan_files import read_plan
from narrowcast.policy import Policy
from narrowcast.precision.device import device_at_hand, environment, require, resolve_plan
from narrowcast.precision.speed import thread_count
from narrowcast.randomness import isolated
from narrowcast.recipes.load import Recipe, load_recipe
from narrowcast.records.codec import to_json
from narrowcast.records.diagnosis import DiagnosisRecord, Finding, ModuleRange
from narrowcast.training.determinism import deterministic

__all__ = ["MOST_STEPS", "diagnose", "diagnose_training"]

MOST_STEPS = 100
"""Steps of a diagnosis that is not told how many: what most failures show within."""

Observe = Callable[[str], None]


NOT_REPRODUCIBLE = "the recipe cannot be trained reproducibly"
"""How `training.determinism` begins what it says of an operation without deterministic kernel."""


def _ignore(words: str) -> None:
    pass


def diagnose(
    recipe: Recipe | str | Path,
    precision: Plan | Policy | str,
    options: Sequence[str] = (),
    *,
    steps: int | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
    minimal_fp32: bool = False,
    observe: Observe | None = None,
    command: str = "",
) -> DiagnosisRecord:
    """Diagnose a recipe in a precision: a name, a plan, or the file of one.

    `options` are ``name=value`` for a recipe that is given by name or path. `steps` is by default
    what the recipe says, at most 100. `minimal_fp32` searches for the smallest set of modules to
    keep in fp32. `observe` is told in words what is going on.

    Raises what loading the recipe raises, RecipeError for what it does wrong in fp32 as well, and
    UnsupportedPrecision if the device cannot compute in that precision.
    """
    if not isinstance(recipe, Recipe):
        recipe = load_recipe(recipe, options)
    elif options:
        raise UsageError(
            f"options {list(options)} for a recipe that is loaded already",
            hint="load it with them, or pass its name or path",
        )
    target = device_at_hand(str(device))
    plan = _plan_of(precision, target)
    subject = subject_of_recipe(recipe, seed=seed, device=target)
    return _record(
        subject, plan, steps, minimal_fp32=minimal_fp32, observe=observe, command=command
    )


def diagnose_training(
    model: nn.Module | Callable[[], nn.Module],
    optimizer: Optimizer | Callable[[nn.Module], Optimizer],
    loss: ComputeLoss,
    batches: Iterable[Any],
    precision: Plan | Policy | str,
    *,
    steps: int | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
    scale: AskedScale = None,
    minimal_fp32: bool = False,
    observe: Observe | None = None,
    name: str = "training",
) -> DiagnosisRecord:
    """Diagnose a training of any model, by ``loss(model, batch)`` and batches that are gone round.

    A model and an optimizer that exist are copied and stay as they are; both may be functions that
    make them. `scale` is the loss scaling that the training has, as ``narrowcast.Engine`` takes it;
    the rest is as in `diagnose`.
    """
    limit = MOST_STEPS if steps is None else _checked(steps)
    own = _device_of(model) if isinstance(model, nn.Module) else None
    target = device_at_hand(str(device or own or "cpu"))
    subject = subject_of_parts(
        Parts(model=model, optimizer=optimizer, loss=loss),
        batches,
        steps=limit,
        planned=max(limit, MOST_STEPS),
        seed=seed,
        device=target,
        scale=scale,
        name=name,
    )
    plan = _plan_of(precision, target)
    return _record(subject, plan, limit, minimal_fp32=minimal_fp32, observe=observe)


def _plan_of(precision: Plan | Policy | str, device: torch.device) -> Plan:
    """Return the plan that is asked for, if the device can compute in it."""
    if isinstance(precision, str) and not precision.endswith(".json"):
        return resolve_plan(precision, device)[0]
    if isinstance(precision, str):
        plan = read_plan(Path(precision))
    elif isinstance(precision, Policy):
        plan = Plan(name=precision.name, policy=precision)
    else:
        plan = precision
    require(plan.policy, device)
    return plan


def _device_of(model: nn.Module) -> torch.device:
    for parameter in model.parameters():
        return parameter.device
    raise UsageError(
        f"{type(model).__name__} has no parameters: there is nothing to train",
        hint="pass the model that the optimizer steps",
    )


def _checked(steps: int) -> int:
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise UsageError(f"steps is {steps!r}", hint="a whole number, 1 or more")
    return steps


@contextmanager
def _surroundings(seed: int) -> Iterator[None]:
    """Allow what a training has: deterministic kernels, one number of threads, seeded streams."""
    with isolated(seed, "training"), thread_count(torch.get_num_threads()), deterministic():
        yield


def _record(
    subject: Subject,
    plan: Plan,
    steps: int | None,
    *,
    minimal_fp32: bool,
    observe: Observe | None,
    command: str = "",
) -> DiagnosisRecord:
    """Put the record together."""
    began = time.perf_counter()
    watcher = observe or _ignore
    limit = min(subject.steps, MOST_STEPS) if steps is None else _checked(steps)
    record = DiagnosisRecord(
        recipe=subject.name,
        recipe_path=str(subject.path or ""),
        typed=subject.typed,
        options=dict(subject.options),
        precision=plan.name,
        plan=to_json(plan),
        compute=plan.policy.compute,
        seed=subject.seed,
        steps=limit,
        verdict="nothing to diagnose",
        finding=_nothing(plan),
        environment=environment(subject.device),
        started=datetime.now(UTC).isoformat(timespec="seconds"),
        command=command,
    )
    if not is_all_fp32(plan):
        with _surroundings(subject.seed):
            record = _diagnosed(record, subject, plan, watcher, minimal_fp32=minimal_fp32)
    if steps is None and limit < subject.steps:
        record = replace(record, notes=(*record.notes, _capped(limit, subject.steps)))
    return replace(record, seconds=time.perf_counter() - began)


def _nothing(plan: Plan) -> Finding:
    return Finding(
        kind="nothing to diagnose",
        explanation=(
            f"precision {plan.name!r} keeps everything in fp32 and computes in "
            f"{plan.policy.compute}, which has its range: if this training fails, precision is "
            "not the reason."
        ),
    )


def _capped(limit: int, planned: int) -> str:
    return f"{limit} of the {planned} steps of the training were taken: --steps takes more"


def _diagnosed(
    record: DiagnosisRecord,
    subject: Subject,
    plan: Plan,
    observe: Observe,
    *,
    minimal_fp32: bool,
) -> DiagnosisRecord:
    """Examine the training, try remedies, and collect what is to be shown."""
    try:
        found = examine(subject, plan, record.steps, observe)
    except RecipeError as error:
        if not error.message.startswith(NOT_REPRODUCIBLE):
            raise
        finding = Finding(kind="not reproducible", explanation=f"{error.message}.")
        return replace(record, verdict=finding.kind, finding=finding)
    first, *others = found.findings
    record = replace(
        record,
        failed_at=found.failed_at,
        symptom=found.symptom,
        verdict=first.kind,
        finding=first,
        others=tuple(others),
        reference=found.reference,
        ranges=_ranges(subject, found),
        lines=annotated_source(found.shown.low.events, found.findings) if found.shown else (),
        scale=found.shown.low.scale if found.shown else 1.0,
        notes=(*record.notes, *found.notes),
    )
    if found.is_curable:
        observe("trying modules in fp32")
        stage = Stage(subject, found.snapshots, first, is_off=found.is_off)
        islands = grown_islands(stage, plan)
        if minimal_fp32:  # by the stage that has counted the replays so far
            culprits = (*islands.culprits, *others)
            record = _with_smallest_set(record, stage, plan, culprits, observe)
        remedies = tried_remedies(stage, plan, islands, observe=observe)
        record = replace(record, remedies=remedies)
    elif minimal_fp32:
        nothing = f"no smallest set was searched for: the verdict is {first.kind!r}"
        record = replace(record, notes=(*record.notes, nothing))
    return record


def _with_smallest_set(
    record: DiagnosisRecord,
    stage: Stage,
    plan: Plan,
    culprits: Sequence[Finding],
    observe: Observe,
) -> DiagnosisRecord:
    """Add the smallest set to keep in fp32, or say that there is none."""
    smallest = minimal.minimal_fp32(
        stage,
        plan,
        minimal.Clues(findings=culprits, ranges=record.ranges),
        under_seed=stage.subject.under_seed,
        steps=record.steps,
        failed_at=record.failed_at,
        observe=observe,
    )
    if smallest is None:
        none = "the kept steps fail with every module in fp32 as well: there is no smallest set"
        return replace(record, notes=(*record.notes, none))
    return replace(record, minimal_fp32=smallest)


def _ranges(subject: Subject, found: Examined) -> tuple[ModuleRange, ...]:
    """Return what passes the modules of the judged step in fp32: what the format had to hold."""
    if found.shown is None:
        return ()
    kept = (*found.snapshots, *found.course.samples)
    snapshot = next((each for each in kept if each.step == found.shown.step), None)
    if snapshot is None:
        return ()
    return boundary_ranges(subject, FULL, snapshot)
