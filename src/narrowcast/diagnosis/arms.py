"""The trainings that a diagnosis compares: as asked, in fp32, and fp32 as its own control."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from narrowcast.diagnosis.course import Course, take_course
from narrowcast.diagnosis.gather import FULL, Scaling
from narrowcast.diagnosis.shadow import Deviation, deviation, divergence
from narrowcast.diagnosis.subject import Subject, Training
from narrowcast.plan import Plan
from narrowcast.precision.cast import torch_dtype
from narrowcast.ranges.meter import UpdateMeter, WeightUpdates
from narrowcast.replay.moment import Moment
from narrowcast.replay.step import replay_step

__all__ = [
    "Reference",
    "Suspect",
    "full_precision_failure",
    "reference_course",
    "shadowed",
    "suspect_course",
]

Observe = Callable[[str], None]

# A loss that has risen by four times its first level is not learning. Where nothing fails loudly,
# ten times: a good start may be lost by the first steps of Adam and be found again.
_RISEN = {True: 4.0, False: 10.0}
# A training diverges by weights that grow: by half, within a diagnosis, is no regular growth.
_BLOWN_UP = 1.5


@dataclass(frozen=True, kw_only=True)
class Suspect:
    """What the training under suspicion did."""

    training: Training
    course: Course
    updates: tuple[tuple[WeightUpdates, ...], ...]
    """What became of the updates of 16-bit weights, in the steps that were metered."""


def suspect_course(subject: Subject, plan: Plan, steps: int, observe: Observe) -> Suspect:
    """Take up to `steps` steps as asked; samples are the first, the middle and the last."""
    training = subject.begin(plan)
    engine = training.engine
    scaling = Scaling.of(subject, plan)
    sample_at = {1, (steps + 1) // 2, steps}
    has_narrow_weights = any(p.element_size() < 4 for p in engine.model.parameters())
    metered: list[tuple[WeightUpdates, ...]] = []

    @contextmanager
    def around(step: int) -> Iterator[None]:
        # The first step of an optimizer is like no other: its moments are one gradient old.
        if not has_narrow_weights or step not in sample_at or (step == 1 and steps > 1):
            yield
            return
        with UpdateMeter(training.optimizer, engine.model) as meter:
            yield
        metered.append(meter.updates)

    def fails_at_floor(moment: Moment) -> bool:
        trace = replay_step(engine, training.compute_loss, moment, scale=scaling.floor, ranges=None)
        return not trace.is_finite

    course = take_course(
        training,
        steps,
        sample_at=sample_at,
        fails_at_floor=fails_at_floor,
        moves=scaling.moves,
        around=around,
        observe=lambda step: observe(f"{plan.name}: step {step} of {steps}"),
    )
    return Suspect(training=training, course=course, updates=tuple(metered))


@dataclass(frozen=True, kw_only=True)
class Reference:
    """What the training did in fp32."""

    course: Course
    growth: float
    """The size of the weights at the end over that at the start."""


def reference_course(subject: Subject, plan: Plan, steps: int, observe: Observe) -> Reference:
    """Take the same steps in fp32; what the recipe itself raises there is raised."""
    full = replace(FULL, micro_batches=plan.micro_batches)
    training = subject.begin(full)
    before = _size(training)
    course = take_course(
        training, steps, observe=lambda step: observe(f"fp32: step {step} of {steps}")
    )
    if course.raised is not None:
        raise course.raised
    return Reference(course=course, growth=_size(training) / before if before else 1.0)


def _size(training: Training) -> float:
    """Return the L2 norm of all weights."""
    weights = [p.detach() for p in training.engine.model.parameters()]
    wide = ((w, torch.complex128 if w.is_complex() else torch.float64) for w in weights)
    return math.hypot(*(float(torch.linalg.vector_norm(w, dtype=dtype)) for w, dtype in wide))


def full_precision_failure(reference: Reference, *, is_loud: bool) -> str:
    """Say how the training fails in fp32; '' where it does not.

    `is_loud` says whether it failed in low precision for everyone to see. A loss that rises while
    the weights stay what they were rises for another reason, as where it is weighted more and more.
    """
    course = reference.course
    if course.symptom:
        return course.symptom
    risen = divergence(course.losses)
    if risen < _RISEN[is_loud] or reference.growth < _BLOWN_UP:
        return ""
    times = "without bound" if math.isinf(risen) else f"by {risen:.3g} times its first level"
    return (
        f"the loss rises {times}, from {course.losses[0]:.4g} to {course.losses[-1]:.4g}, and the "
        f"weights become {reference.growth:.3g} times as large"
    )


def shadowed(
    subject: Subject, plan: Plan, course: Course, reference: Course, observe: Observe
) -> Deviation:
    """Hold the losses against fp32's after equal numbers of updates, and against a control's."""
    applied = [point.applied for point in course.points]
    observe("fp32 once more, as a control")
    straight = reference.losses if all(applied) else _losses(subject, plan, applied, rounded=False)
    control = _losses(subject, plan, applied, rounded=True)
    return deviation(course.losses, straight, control, compute=plan.policy.compute)


def _losses(
    subject: Subject, plan: Plan, applied: Sequence[bool], *, rounded: bool
) -> tuple[float, ...]:
    """Train in fp32 on those steps alone that were applied, from rounded weights or not."""
    training = subject.begin(replace(FULL, micro_batches=plan.micro_batches))
    if rounded:
        low = torch_dtype(plan.policy.compute)
        with torch.no_grad():
            # No format of 16 bits is complex: such weights are in no way rounded.
            real = (p for p in training.engine.model.parameters() if p.is_floating_point())
            for parameter in real:
                narrow = parameter.to(low)
                parameter.copy_(torch.where(narrow.isfinite(), narrow, parameter))
    return tuple(training.step().loss if each else training.pass_over() for each in applied)
