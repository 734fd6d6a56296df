"""Carries a diagnosis out, from the first step to the verdict.

1  the training as asked, until it fails or the budget is used up
2  the same steps in fp32                                    fails as well: no precision problem
3  a kept step replayed, to see that it gives what it gave   it does not: not reproducible
4  the failing step, or several kept ones, by the rules
5  nothing accused: the losses against fp32's and a control's
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves  # torch's only walker of nests

from narrowcast.diagnosis.arms import (
    Suspect,
    full_precision_failure,
    reference_course,
    shadowed,
    suspect_course,
)
from narrowcast.diagnosis.course import Course
from narrowcast.diagnosis.evidence import Evidence
from narrowcast.diagnosis.faint import scale_too_high, underflows
from narrowcast.diagnosis.gather import gather, on_its_own
from narrowcast.diagnosis.judge import findings_of
from narrowcast.diagnosis.raised import constant_that_raised
from narrowcast.diagnosis.shadow import Deviation
from narrowcast.diagnosis.snapshot import Snapshot
from narrowcast.diagnosis.subject import Subject
from narrowcast.diagnosis.thrash import is_restless, thrashing
from narrowcast.diagnosis.updates import holding_matrices, lost_updates
from narrowcast.diagnosis.verdict import (
    Budget,
    far_off,
    fine,
    in_steps,
    inconclusive,
    not_precision,
    persistent,
    too_short,
)
from narrowcast.formats import float_format
from narrowcast.plan import OWN, Plan
from narrowcast.records.diagnosis import Finding
from narrowcast.replay.step import replay_step

__all__ = ["Examined", "examine", "is_all_fp32"]

Observe = Callable[[str], None]

_BLAMELESS = (
    "fine",
    "nothing to diagnose",
    "not reproducible",
    "inconclusive",
    "not a precision problem",
)


@dataclass(frozen=True, kw_only=True)
class Examined:
    """A verdict, and the steps that it rests on."""

    findings: tuple[Finding, ...]
    """The verdict's first."""
    course: Course
    failed_at: int | None = None
    symptom: str = ""
    reference: str = ""
    snapshots: tuple[Snapshot, ...] = ()
    """On which remedies are to be tried."""
    shown: Evidence | None = None
    """The step whose values are to be shown."""
    is_off: bool = False
    """Whether it was the losses that gave it away; remedies are then judged as strictly."""
    notes: tuple[str, ...] = ()

    @property
    def is_curable(self) -> bool:
        """Whether precision is at fault, and there is something to try."""
        return self.findings[0].kind not in _BLAMELESS and bool(self.snapshots)


def is_all_fp32(plan: Plan) -> bool:
    """Whether nothing in a plan is kept in fewer bits than fp32 has, or computed in 16."""
    policy = plan.policy
    return (
        policy.compute in ("fp32", "tf32")
        and policy.param == "fp32"
        and plan.weights in (OWN, "fp32")
        and plan.states in (OWN, "fp32")
    )


def examine(subject: Subject, plan: Plan, steps: int, observe: Observe) -> Examined:
    """Find out why a training fails under a plan, or that it does not, within so many steps."""
    suspect = suspect_course(subject, plan, steps, observe)
    course = suspect.course
    straight = reference_course(subject, plan, steps, observe)
    reference = straight.course
    said = _said(reference)
    failure = full_precision_failure(straight, is_loud=bool(course.symptom))
    # What breaks before the first update, where fp32 goes on, is not what breaks fp32 later.
    is_another = not course.applied and len(reference.points) > len(course.points)
    if failure and not (course.failing is not None and is_another):
        return Examined(
            findings=(not_precision(failure, course.symptom),),
            course=course,
            failed_at=_failed_at(course),
            symptom=course.symptom or failure,
            reference=f"fp32: {failure}",
        )
    if course.raised is not None:
        return _raised(suspect, plan, said)
    observe("replaying a step")
    kept = course.failing or course.samples[-1]
    differs = _difference(subject, plan, kept)
    if differs:
        finding = Finding(kind="not reproducible", explanation=differs)
        return Examined(findings=(finding,), course=course, symptom=course.symptom, reference=said)
    if course.failing is not None:
        found = _loud(subject, plan, course, said)
        if found is not None:
            later = (f"fp32 fails too, later and otherwise: {failure}",) if failure else ()
            return replace(found, notes=(*found.notes, *later))
    budget = Budget(allowed=steps, planned=subject.steps)
    return _silent(subject, plan, suspect, reference, budget=budget, observe=observe)


def _failed_at(course: Course) -> int | None:
    return course.points[-1].step if course.symptom else None


def _said(reference: Course) -> str:
    losses = reference.losses
    return f"fp32: {in_steps(len(losses))}, loss {losses[0]:.4g} to {losses[-1]:.4g}"


def _raised(suspect: Suspect, plan: Plan, said: str) -> Examined:
    """Judge a step that raised, and does not in fp32."""
    course = suspect.course
    error = course.raised
    assert error is not None
    finding = constant_that_raised(error, suspect.training.engine.model, plan.policy.compute)
    step = len(course.points) + 1
    if finding is None:
        error.hint = "; ".join(part for part in (_only_in(plan, step, said), error.hint) if part)
        raise error
    return Examined(
        findings=(finding,),
        course=course,
        failed_at=step,
        symptom=f"step {step} raised {type(error.__cause__).__name__}: {error.__cause__}",
        reference=said,
        snapshots=() if course.failing is None else (course.failing,),
    )


def _only_in(plan: Plan, step: int, said: str) -> str:
    """Say what an error hangs on that is none of the precisions' doing that we know."""
    return (
        f"step {step} in {plan.name} raised it, and none did in fp32 ({said.removeprefix('fp32: ')}"
        "): look at what that line does with a tensor of another dtype"
    )


def _difference(subject: Subject, plan: Plan, kept: Snapshot) -> str:
    """Say how the kept step differs from what was recorded of it; '' where it does not."""
    moment, recorded = kept.moments[0], kept.losses[0]
    losses, untouched = [], _versions(moment.batch)
    for _ in range(2):  # on a fresh model each: what a model keeps to itself is as at first
        engine = on_its_own(subject, plan, kept).engine
        losses.append(replay_step(engine, subject.compute_loss, moment, ranges=None).loss)
    # Split weights are made anew from their masters, and rounded otherwise at exact ties.
    exact = plan.weights in (OWN, "fp32")
    slack = 0.0 if exact else float_format(plan.policy.compute).eps * abs(recorded)
    if all(_is_same(loss, recorded, slack) for loss in losses):
        return ""
    if _versions(moment.batch) != untouched:
        return (
            f"the loss writes into its batch, so that step {kept.step} cannot be taken again: it "
            f"gave {recorded:.9g}, and then {losses[0]:.9g} from what it had left there (work on a "
            "copy: batch.clone())."
        )
    if _is_same(losses[0], losses[1], 0.0):
        return (
            f"the loss of step {kept.step} was {recorded:.9g}, and taken again on a fresh model "
            f"with the same weights, buffers, batch and random states it is {losses[0]:.9g}, the "
            "same each time: it depends on something else, such as a counter in a plain attribute "
            "(register a buffer for it)."
        )
    return (
        f"the loss of step {kept.step} was {recorded:.9g}, and taken again from the same weights, "
        f"batch and random states it is {losses[0]:.9g} and then {losses[1]:.9g}: something draws "
        "random numbers that no seed of Python, numpy or torch decides, or adds up in no fixed "
        "order."
    )


def _versions(batch: Any) -> list[int]:
    """Return torch's counts of the writes into the tensors of a batch."""
    tensors = [leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)]
    return [tensor._version for tensor in tensors if not tensor.is_inference()]


def _is_same(a: float, b: float, slack: float) -> bool:
    if not (math.isfinite(a) and math.isfinite(b)):
        return math.isfinite(a) == math.isfinite(b)
    return abs(a - b) <= slack


def _loud(subject: Subject, plan: Plan, course: Course, said: str) -> Examined | None:
    """Judge the step that failed; None if its replay shows that a lower scale cures it."""
    failing = course.failing
    assert failing is not None
    evidence = gather(subject, plan, failing)
    if not evidence.is_loud:
        return None
    findings = findings_of(evidence)
    earlier: tuple[Finding, ...] = ()
    if not evidence.reference.is_finite or not findings:
        # Its weights had been led astray before: what kept steps lost then comes first.
        kept = [gather(subject, plan, each) for each in course.samples]
        earlier = persistent([findings_of(each) for each in kept])
        findings = () if not evidence.reference.is_finite else findings
    if not findings and not earlier:
        earlier = (
            inconclusive(
                f"{course.symptom}; fp32 from the weights of that step fails as well, though a "
                "training in fp32 from the start does not, and the kept steps before it show "
                "nothing"
            ),
        )
    return Examined(
        findings=_each_once([*earlier, *findings]),
        course=course,
        failed_at=failing.step,
        symptom=course.symptom,
        reference=said,
        snapshots=(failing,),
        shown=evidence,
    )


def _silent(
    subject: Subject,
    plan: Plan,
    suspect: Suspect,
    reference: Course,
    *,
    budget: Budget,
    observe: Observe,
) -> Examined:
    """Judge a training that nobody sees failing, by several of its steps and by its losses."""
    course = suspect.course
    kept = _kept(course)
    evidence = []
    for snapshot in kept:
        observe(f"replaying step {snapshot.step}")
        evidence.append(gather(subject, plan, snapshot))
    findings = list(persistent([findings_of(each) for each in evidence]))
    snapshots: tuple[Snapshot, ...] = kept[-1:]
    if is_restless(course):
        restless = _restless(subject, plan, course)
        if restless is not None:
            findings, snapshots = [restless, *findings], (*snapshots, *course.late_skips)
    shadow = shadowed(subject, plan, course, reference, observe) if course.applied else None
    lost = lost_updates(suspect.updates, holding_matrices(suspect.training.engine.model))
    findings = _by_cause([*findings, *lost])
    is_off = not findings and shadow is not None and (shadow.is_far_off or shadow.is_far_below)
    if is_off:
        findings = list(persistent([findings_of(each, is_off=True) for each in evidence]))
    accused = findings[0] if findings else _unaccused(course, evidence, shadow, budget)
    is_seen = bool(findings)
    return Examined(
        findings=_each_once(findings) or (accused,),
        course=course,
        failed_at=kept[-1].step if is_seen else None,
        symptom=_quiet_symptom(shadow) if is_seen else "",
        reference=_said(reference),
        snapshots=snapshots if is_seen else (),
        shown=evidence[-1] if evidence else None,
        is_off=is_off,
        notes=(*_notes(evidence), *_far_below(shadow)),
    )


def _kept(course: Course) -> tuple[Snapshot, ...]:
    """Return the samples that say how training goes on: not the first ones of a calibration."""
    settled = tuple(each for each in course.samples if each.applied)
    return settled or course.samples or ((course.failing,) if course.failing else ())


def _each_once(findings: Sequence[Finding]) -> tuple[Finding, ...]:
    """Keep the first finding of each kind in each module."""
    first: dict[tuple[str, str], Finding] = {}
    for finding in findings:
        first.setdefault((finding.kind, finding.module), finding)
    return tuple(first.values())


def _by_cause(findings: Sequence[Finding]) -> list[Finding]:
    """Order findings by what comes first in a step: forward, update of the weights, backward."""
    order = (
        "positions collapse",
        "low-precision accumulation",
        "lost updates",
        "scale thrashing",
        "scale too low",
        "scale too high",
        "backward underflow",
    )
    return sorted(findings, key=lambda f: order.index(f.kind) if f.kind in order else -1)


def _restless(subject: Subject, plan: Plan, course: Course) -> Finding | None:
    """Find out whether one loss scale would have served all steps."""
    skipped = [gather(subject, plan, each, look=False) for each in course.late_skips]
    # A scale that does not move overflows at some batches and not at others; one has to serve all.
    too_high = [found for each in skipped if (found := scale_too_high(each)) is not None]
    if too_high:
        return min(too_high, key=lambda finding: finding.figures["scale that keeps them"])
    scale = min((each.low.scale for each in skipped), default=1.0)
    lost: tuple[Finding, ...] = ()
    for usual in course.samples:
        if usual.applied and not lost:
            lost = underflows(gather(subject, plan, usual, scale=scale, look=False))
    newest = course.late_skips[-1] if course.late_skips else None
    overflowing = None
    if newest is not None:
        engine = on_its_own(subject, plan, newest).engine
        overflowing = replay_step(
            engine, subject.compute_loss, newest.moments[0], scale=newest.scale
        )
    return thrashing(course, lost, overflowing, scale)


def _unaccused(
    course: Course, evidence: Sequence[Evidence], shadow: Deviation | None, budget: Budget
) -> Finding:
    """Return what is said of a training that no rule accuses."""
    everything = [op.dtype for each in evidence for op in each.low.events]
    if everything and not any(dtype in ("fp16", "bf16") for dtype in everything):
        return Finding(
            kind="nothing to diagnose",
            explanation="every operation of the replayed steps executed in fp32.",
        )
    short = too_short(course, evidence, budget)
    if short is not None:
        return short
    assert shadow is not None, "a training in which no step was applied is too short"
    return far_off(shadow) if shadow.is_far_off else fine(course, shadow, len(evidence))


def _quiet_symptom(shadow: Deviation | None) -> str:
    if shadow is None:
        return ""
    is_noise = not (shadow.is_far_off or shadow.is_far_below)
    far = "no more than noise so far" if is_noise else "more than noise"
    return f"the loss is {shadow.gap:+.3g} from fp32's at the end: {far}"


def _far_below(shadow: Deviation | None) -> tuple[str, ...]:
    if shadow is None or not shadow.is_far_below:
        return ()
    words = (
        f"the loss at the end is {-shadow.gap:.3g} below fp32's, where {shadow.allowed:.2g} would "
        "be noise: the two may not learn the same task, as where a noise or a penalty is lost"
    )
    return (words,)


def _notes(evidence: Sequence[Evidence]) -> tuple[str, ...]:
    """Say which constants are lost without harm so far."""
    seen = {}
    for each in evidence[-1:]:
        for op in each.low.events:
            for lost in op.constants:
                place = f"{op.file.rpartition('/')[2]}:{op.line}" if op.line else op.op
                seen[lost.value, place] = (
                    f"{lost.value:g} at {place} is {lost.becomes:g} in {op.dtype}; it did no harm "
                    "in the replayed steps"
                )
    return tuple(seen.values())
