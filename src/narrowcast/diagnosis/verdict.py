"""From what three trainings did, and from the evidence of kept steps, to one verdict.

in fp32 it fails too                  not a precision problem, whatever else was seen
it fails for everyone to see          the operation with which that began
it seems to work                      what several kept steps lose silently, earliest cause first
nothing is accused                    fine, if the losses are those of fp32 and the budget was
                                      long enough to see a failure; inconclusive otherwise
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from narrowcast.diagnosis.course import Course
from narrowcast.diagnosis.evidence import Evidence
from narrowcast.diagnosis.shadow import Deviation
from narrowcast.formats import float_format
from narrowcast.records.diagnosis import Finding

__all__ = [
    "Budget",
    "far_off",
    "fine",
    "in_steps",
    "inconclusive",
    "not_precision",
    "persistent",
    "too_short",
]

# Steps that must have moved the weights before a training is called fine.
_LEAST_APPLIED = 3
# Beyond a growth of two within the budget it is no noise of batches, and within a sixteenth of the
# format's end five more steps of that kind reach it.
_GROWN = 2.0
_NEAR = 16.0


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Steps that were allowed, and steps that the training is meant to have."""

    allowed: int
    planned: int


def not_precision(failure: str, low: str) -> Finding:
    """Say that fp32 fails as well."""
    seen = f"As asked: {low}." if low else "As asked, it has not failed by then."
    return Finding(
        kind="not a precision problem",
        explanation=(
            f"in fp32, on the same data with the same random numbers, {failure}. {seen} Look at "
            "the learning rate, the data, or a bug: no precision cures this."
        ),
    )


def persistent(by_step: Sequence[Sequence[Finding]]) -> tuple[Finding, ...]:
    """Return what the last kept step is accused of, if at least half of the kept steps are too."""
    if not by_step:
        return ()
    seen = Counter(key for findings in by_step for key in {(f.kind, f.module) for f in findings})
    last = by_step[-1]
    return tuple(f for f in last if 2 * seen[f.kind, f.module] >= len(by_step))


def fine(course: Course, shadow: Deviation, replayed: int) -> Finding:
    """Say what being fine rests on."""
    skipped = len(course.points) - course.applied
    skips = f", {skipped} of them skipped to find the loss scale" if skipped else ""
    return Finding(
        kind="fine",
        explanation=(
            f"{in_steps(len(course.points))}{skips}: the loss went from {course.losses[0]:.4g} to "
            f"{course.losses[-1]:.4g}. At the end it is {shadow.gap:+.2g} from fp32's, where "
            f"{shadow.allowed:.2g} would be noise (fp32 from weights rounded once is "
            f"{shadow.control:.2g} away), and {in_steps(replayed)} replayed operation by operation "
            "show nothing that is lost."
        ),
        figures=_figures(shadow),
    )


def too_short(course: Course, evidence: Sequence[Evidence], budget: Budget) -> Finding | None:
    """Return why the budget was too short to see a failure, with the one that would do."""
    if course.applied == 0 and course.points:
        return _scale_still_falling(course, evidence, budget)
    outgrowing = _outgrowing(evidence, budget)
    if outgrowing is not None:
        return outgrowing
    if course.applied < min(_LEAST_APPLIED, budget.planned):
        enough = min(budget.planned, 20)
        return inconclusive(
            f"{course.applied} of {len(course.points)} steps moved the weights, and nothing failed "
            "in them: that is too few to call it fine",
            enough,
        )
    return None


def inconclusive(why: str, enough: int | None = None) -> Finding:
    """Say what could not be decided, and the budget that would do."""
    budget = f"; {enough} steps would do (--steps {enough})" if enough else ""
    return Finding(
        kind="inconclusive",
        explanation=f"{why}{budget}.",
        figures={"steps that would do": float(enough)} if enough else {},
    )


def far_off(shadow: Deviation) -> Finding:
    """Say that the losses are too high, and that no rule knows why."""
    found = inconclusive(
        f"the loss at the end is {shadow.gap:.3g} above fp32's, where {shadow.allowed:.2g} would "
        f"be noise and fp32 has learnt {shadow.progress:.3g}, and nothing in the replayed steps "
        "explains it: `narrowcast compare` can show whether it stays"
    )
    return Finding(kind=found.kind, explanation=found.explanation, figures=_figures(shadow))


def in_steps(count: int) -> str:
    """Write a number of steps."""
    return "1 step" if count == 1 else f"{count} steps"


def _figures(shadow: Deviation) -> dict[str, float]:
    return {
        "loss above fp32": shadow.gap,
        "control": shadow.control,
        "noise allowed": shadow.allowed,
        "learnt in fp32": shadow.progress,
    }


def _scale_still_falling(course: Course, evidence: Sequence[Evidence], budget: Budget) -> Finding:
    """Every step was skipped, and at a lower scale none would be."""
    scale = course.points[-1].scale
    serves = min((each.low.scale for each in evidence), default=1.0)
    more = max(1, math.ceil(math.log2(scale / serves))) if serves < scale else 1
    enough = len(course.points) + more + 10
    return inconclusive(
        f"all {len(course.points)} steps were skipped while the loss scale came down to "
        f"{scale:g}; at {serves:g}, {more} skips further on, the gradients are finite",
        max(enough, min(budget.planned, 20)),
    )


def _outgrowing(evidence: Sequence[Evidence], budget: Budget) -> Finding | None:
    """Return a finding if activations grow towards the format's end, and reach it as planned."""
    if len(evidence) < 2 or not evidence[0].has_short_range:
        return None
    first, last = evidence[0], evidence[-1]
    limit = float_format(last.compute).max
    before, after = _largest(first), _largest(last)
    gone = last.step - first.step
    if gone < 1 or not before or after < _GROWN * before or after * _NEAR < limit:
        return None
    at = last.step + math.ceil(gone * math.log(limit / after) / math.log(after / before))
    if not budget.allowed < at <= budget.planned:
        return None
    return inconclusive(
        f"the largest {last.compute} value of the forward pass grew from {before:.3g} to "
        f"{after:.3g} between steps {first.step} and {last.step}, and reaches {limit:g} at about "
        f"step {at} if it goes on",
        at + max(10, at // 4),
    )


def _largest(evidence: Evidence) -> float:
    """Return the largest result of a forward operation that is no constant at the format's end."""
    limit = float_format(evidence.compute).max
    return max(
        (
            values.amax
            for op in evidence.low.events
            if op.phase == "forward" and op.dtype == evidence.compute
            for values in op.outputs
            if values.amax < limit
        ),
        default=0.0,
    )
