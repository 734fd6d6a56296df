"""From a kept step to evidence: which passes are taken, and at which loss scales.

    as asked, at the scale in force
        overflows?   at the largest scale below that does not; or at the floor, to show where
                 and, where the training's own choice put the floor, below it too
    in fp32, from the same weights
    gradients lost to zero?   at the largest scale of all that does not overflow
    once more, operation by operation

All on engines of their own, whose models nobody trains.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from narrowcast.diagnosis.evidence import Evidence
from narrowcast.diagnosis.faint import lost_by_module
from narrowcast.diagnosis.snapshot import Snapshot
from narrowcast.diagnosis.subject import Rig, Subject
from narrowcast.engine.engine import Engine
from narrowcast.plan import PLANS, Plan
from narrowcast.replay.moment import Moment
from narrowcast.replay.step import StepTrace, replay_step
from narrowcast.scaling.scales import DynamicScale, StaticScale

__all__ = ["FULL", "Scaling", "gather", "largest_finite_scale", "on_its_own", "reference_of"]

FULL = PLANS["fp32"]
"""The plan that evidence is held against."""

# fp16 reaches from 2^-24 to 2^16, so that gradients a scale of 2^32 would not lift over its lower
# end are 2^-56 of its upper one, and below what fp32 can add to anything of size 1.
_LARGEST_SCALE = 2.0**32
_SAMPLES = 4096
# Where each module loses less of its gradient than this, no other scale is looked for.
_LITTLE = 0.1


@dataclass(frozen=True, kw_only=True)
class Scaling:
    """Which loss scales a training may use."""

    floor: float = 1.0
    moves: bool = False
    """Whether the scale follows the gradients."""

    @classmethod
    def of(cls, subject: Subject, plan: Plan) -> Scaling:
        """Return the scaling of a subject's training under a plan."""
        asked = subject.scale_under(plan)
        if asked is None:
            is_dynamic = plan.policy.scaling == "dynamic"
            return cls(floor=DynamicScale().floor, moves=True) if is_dynamic else cls()
        if isinstance(asked, DynamicScale):
            return cls(floor=asked.floor, moves=True)
        if isinstance(asked, StaticScale):
            return cls(floor=asked.scale)
        return cls(floor=float(asked)) if isinstance(asked, (int, float)) else cls()


def on_its_own(subject: Subject, plan: Plan, snapshot: Snapshot, part: int = 0) -> Rig:
    """Return an engine on a fresh model, as it was before a kept step's micro-batch."""
    rig = subject.rig(plan)
    snapshot.put_on(rig.engine, part)
    return rig


def reference_of(subject: Subject, plan: Plan, snapshot: Snapshot, part: int = 0) -> StepTrace:
    """Take a kept step's micro-batch in fp32, from the same weights."""
    full = replace(FULL, micro_batches=plan.micro_batches)
    engine = on_its_own(subject, full, snapshot, part).engine
    return _at(engine, subject, snapshot.moments[part])(1.0)


def gather(
    subject: Subject,
    plan: Plan,
    snapshot: Snapshot,
    *,
    scale: float | None = None,
    reference: StepTrace | None = None,
    look: bool = True,
) -> Evidence:
    """Replay a kept step under a plan: of its micro-batches the first that fails, or the first.

    `scale` is the one to begin with, by default that which was in force; `reference` saves taking
    the first micro-batch in fp32 once more; without `look` no operation is looked at.
    """
    scaling = Scaling.of(subject, plan)
    engine = subject.rig(plan).engine
    is_scaled = plan.policy.scaling != "none"
    begin = 1.0
    if is_scaled:  # one that is asked for here may well lie below what the training allows
        begin = scale if scale is not None else max(snapshot.scale, scaling.floor)
    part, low = _failing_part(engine, subject, snapshot, scaling, begin)
    moment = snapshot.moments[part]
    if len(snapshot.moments) > 1:  # anew: it has passed through the buffers of the others
        engine = on_its_own(subject, plan, snapshot, part).engine
    if reference is None or part:
        reference = reference_of(subject, plan, snapshot, part)
    at, best = _at(engine, subject, moment), None
    if is_scaled and low.is_finite and _loses(low, reference):
        best = largest_finite_scale(at, at_least=low.scale, at_most=_LARGEST_SCALE)
    elif is_scaled and not low.is_finite and math.isfinite(low.loss) and low.scale >= 2:
        best = largest_finite_scale(at, at_least=1.0, at_most=low.scale / 2)
    if look:
        whole = replay_step(engine, subject.compute_loss, moment, scale=low.scale)
        low = replace(whole, gradient_samples=low.gradient_samples)
    return Evidence(
        step=snapshot.step,
        compute=plan.policy.compute,
        floor=scaling.floor,
        scale=begin,
        low=low,
        best=best,
        reference=reference,
    )


def largest_finite_scale(
    at: Callable[[float], StepTrace], *, at_least: float, at_most: float
) -> StepTrace | None:
    """Return the replay at the largest power of two at which all is finite; None if at none.

    What overflows at one scale overflows at every larger one, so the exponents are bisected.
    """
    low, high = math.ceil(math.log2(at_least)), math.floor(math.log2(at_most))
    best = at(2.0**low)
    if not best.is_finite:
        return None
    while low < high:
        middle = (low + high + 1) // 2
        found = at(2.0**middle)
        if found.is_finite:
            low, best = middle, found
        else:
            high = middle - 1
    return best


def _at(engine: Engine, subject: Subject, moment: Moment) -> Callable[[float], StepTrace]:
    """Return what replays a moment at a loss scale, without looking at its operations."""

    def at(scale: float) -> StepTrace:
        return replay_step(
            engine, subject.compute_loss, moment, scale=scale, ranges=None, samples=_SAMPLES
        )

    return at


def _failing_part(
    engine: Engine, subject: Subject, snapshot: Snapshot, scaling: Scaling, scale: float
) -> tuple[int, StepTrace]:
    """Return the first micro-batch that fails, else the one that needs the lowest scale."""
    tried = []
    for part, moment in enumerate(snapshot.moments):
        snapshot.put_on(engine, part)
        at = _at(engine, subject, moment)
        trace = at(scale)
        if not trace.is_finite and scaling.moves and math.isfinite(trace.loss):
            below = None
            if scale > scaling.floor:
                below = largest_finite_scale(at, at_least=scaling.floor, at_most=scale / 2)
            trace = below or at(scaling.floor)
        if not trace.is_finite:
            return part, trace
        tried.append((trace.scale, part, trace))
    _, part, trace = min(tried, key=lambda each: each[:2])
    return part, trace


def _loses(low: StepTrace, reference: StepTrace) -> bool:
    return any(lost.share >= _LITTLE for lost in lost_by_module(low, reference).values())
