"""Tries what might cure a training on its kept steps, and says what each cure costs.

Memory is the predicted peak of a step under the changed plan, less that of the plan as it was; time
is measured, on the replayed step. The cheapest that works comes first: less memory, less time.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from narrowcast.diagnosis.cures import Cure, can_be_island, cures_for, island
from narrowcast.diagnosis.evidence import parent
from narrowcast.diagnosis.gather import on_its_own
from narrowcast.diagnosis.subject import Subject
from narrowcast.diagnosis.trials import Outcome, Stage
from narrowcast.errors import NarrowcastError
from narrowcast.plan import Plan
from narrowcast.records.diagnosis import Finding, Remedy
from narrowcast.replay.step import replay_step

__all__ = ["Islands", "grown_islands", "step_seconds", "tried_remedies"]

# Modules that overflow one after the other: the second is seen when the first is in fp32. Where it
# goes on, --minimal-fp32 searches.
_MOST_ISLANDS = 12
# The fastest of a few: what else a machine does only ever adds.
_TIMED = 3


@dataclass(frozen=True, kw_only=True)
class Islands:
    """Modules kept in fp32 one after the other, as each let the next failure show."""

    culprits: tuple[Finding, ...] = ()
    tried: tuple[tuple[Cure, Outcome], ...] = ()


def grown_islands(stage: Stage, plan: Plan) -> Islands:
    """Keep the accused module in fp32, and whatever fails then; else what the module stands in."""
    model = stage.subject.rig(plan).engine.model
    culprits: list[Finding] = []
    tried: tuple[tuple[Cure, Outcome], ...] = ()
    next_one: Finding | None = stage.accused
    while next_one is not None and len(culprits) < _MOST_ISLANDS:
        known = [finding.module for finding in culprits]
        if next_one.module in known or not can_be_island(next_one.module, model):
            break
        culprits.append(next_one)
        cure = island([*known, next_one.module], plan)
        outcome = stage.try_plan(cure.plan, look=True)
        tried = ((cure, outcome),)
        next_one = None if outcome.works else next(iter(outcome.findings), None)
    block = parent(stage.accused.module)
    while block and not can_be_island(block, model):
        block = parent(block)
    if block and not any(outcome.works for _, outcome in tried):
        cure = island([block], plan)
        tried = (*tried, (cure, stage.try_plan(cure.plan)))
    return Islands(culprits=tuple(culprits), tried=tried)


def tried_remedies(
    stage: Stage, plan: Plan, islands: Islands, *, observe: Callable[[str], None]
) -> tuple[Remedy, ...]:
    """Try every cure for what the stage accuses: the cheapest that works first, failures last."""
    subject = stage.subject
    on_cpu = subject.device.type == "cpu"
    tried = list(islands.tried)
    for cure in cures_for(stage.accused, plan, on_cpu=on_cpu):
        observe(f"trying {cure.name}")
        tried.append((cure, stage.try_plan(cure.plan, scale=cure.scale)))
    seconds, peak = step_seconds(stage, plan), subject.peak(plan)
    priced = []
    for cure, outcome in tried:
        is_free = cure.plan == plan
        held, taken = (peak, seconds) if is_free else (None, None)
        if outcome.ran and not is_free:
            held, taken = subject.peak(cure.plan), step_seconds(stage, cure.plan)
        remedy = Remedy(
            name=cure.name,
            words=cure.words,
            how=_how(cure, subject),
            memory_bytes=None if held is None or peak is None else held - peak,
            time_ratio=taken / seconds if taken and seconds else None,
            works=outcome.works,
            outcome=outcome.words,
        )
        priced.append((_price(remedy, is_free=is_free), remedy))
    return tuple(remedy for _, remedy in sorted(priced, key=lambda each: each[0]))


def step_seconds(stage: Stage, plan: Plan) -> float | None:
    """Measure forward and backward of the kept step; None where it cannot be run."""
    snapshot = stage.snapshots[0]
    try:
        engine = on_its_own(stage.subject, plan, snapshot).engine
        found = math.inf
        for _ in range(_TIMED):
            began = _now(stage.subject.device)
            replay_step(engine, stage.subject.compute_loss, snapshot.moments[0], ranges=None)
            found = min(found, _now(stage.subject.device) - began)
    except NarrowcastError:
        return None
    return found


def _now(device: torch.device) -> float:
    """Return CPU time, or on CUDA the time when all that was asked for is done."""
    if device.type != "cuda":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


def _how(cure: Cure, subject: Subject) -> str:
    if subject.typed and cure.options:
        return f"narrowcast train {subject.typed} {cure.options}"
    return cure.code


def _price(remedy: Remedy, *, is_free: bool) -> tuple[bool, bool, float, float]:
    """Order what works before what does not; what changes a loss scale alone costs nothing."""
    unknown = math.inf
    memory = unknown if remedy.memory_bytes is None else float(remedy.memory_bytes)
    time = unknown if remedy.time_ratio is None else remedy.time_ratio
    return not remedy.works, not is_free, memory, time
