"""Steps until a failure, steps kept whole, and kept steps taken again elsewhere."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diagnosed import WIDTH, Net, adam, batches, plain, squares
from narrowcast.diagnosis.course import take_course
from narrowcast.diagnosis.gather import FULL, gather, largest_finite_scale, on_its_own
from narrowcast.diagnosis.subject import Parts, Subject, subject_of_parts, subject_of_recipe
from narrowcast.plan import PLANS, Plan
from narrowcast.recipes.load import load_recipe
from narrowcast.replay.step import StepTrace, replay_step

CPU = torch.device("cpu")
HALVES = Plan(name="halves", policy=PLANS["bf16"].policy, micro_batches=2)


def subject(
    body: Any = plain, loss: Any = squares, *, scale: Any = None, data: Any = None
) -> Subject:
    parts = Parts(model=lambda: Net(body()), optimizer=adam(), loss=loss)
    return subject_of_parts(
        parts, data or batches(), steps=20, planned=100, seed=0, device=CPU, scale=scale
    )


class Stateful(nn.Module):
    """Draws random numbers, and writes three kinds of buffers: saved, unsaved, and made late."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(WIDTH, WIDTH)
        self.drop = nn.Dropout(0.3)
        self.norm = nn.BatchNorm1d(WIDTH)
        self.register_buffer("seen", torch.zeros(()), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.seen.add_(1)
            if not hasattr(self, "late"):
                self.register_buffer("late", torch.zeros(WIDTH, dtype=x.dtype))
            self.late.add_(0.01)
        return self.norm(self.drop(self.mix(x))) * (1 + self.seen / 100) + self.late  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "plan",
    [PLANS["fp16"], PLANS["bf16"], PLANS["bf16-true"], PLANS["bf16-split"], PLANS["lean"], HALVES],
    ids=lambda plan: plan.name,
)
def test_a_kept_step_taken_again_on_a_fresh_model_gives_its_loss_bit_for_bit(plan: Plan) -> None:
    """With dropout, batch statistics, and buffers that a state dict does not hold."""
    one = subject(Stateful)

    course = take_course(one.begin(plan), 6, sample_at={1, 4, 6})

    assert [kept.step for kept in course.samples] == [1, 4, 6]
    for kept in course.samples:
        for part, (moment, loss) in enumerate(zip(kept.moments, kept.losses, strict=True)):
            engine = on_its_own(one, plan, kept, part).engine
            assert replay_step(engine, one.compute_loss, moment, ranges=None).loss == loss
        assert len(kept.moments) == plan.micro_batches


def test_keeping_steps_changes_nothing() -> None:
    """The losses are those of a course that keeps none."""
    plan = PLANS["bf16-split"]

    kept = take_course(subject(Stateful).begin(plan), 6, sample_at={1, 2, 3, 4, 5, 6})
    free = take_course(subject(Stateful).begin(plan), 6)

    assert kept.losses == free.losses
    assert free.samples == ()


def test_a_buffer_that_the_precision_rounded_is_whole_again_in_the_reference() -> None:
    """What no forward pass writes is left to the fresh model: it may be the fault."""

    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("places", torch.arange(300.0, 300.0 + WIDTH))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.places / 300

    one = subject(Table)
    (kept,) = take_course(one.begin(PLANS["bf16-true"]), 1, sample_at={1}).samples

    model = on_its_own(one, FULL, kept).engine.model

    assert torch.equal(model.get_buffer("body.places"), torch.arange(300.0, 300.0 + WIDTH))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_ends_the_course(value: float) -> None:
    """At its step, which is kept with the weights that it failed with."""
    data = batches(6)
    data[3] = (data[3][0], torch.full((8,), value))

    course = take_course(subject(data=data).begin(PLANS["bf16"]), 6)

    assert len(course.points) == 4
    assert course.symptom == "the loss is NaN at step 4" or "infinite" in course.symptom
    assert course.failing is not None
    assert course.failing.step == 4
    assert course.applied == 3


def test_a_gradient_that_is_not_finite_ends_it_where_no_scale_can_be_lowered() -> None:
    """The root of 0 has no derivative."""

    def roots(model: Any, batch: Any) -> Tensor:
        return (model(batch[0]).float() * 0).abs().sqrt().sum() + squares(model, batch)

    course = take_course(subject(loss=roots).begin(PLANS["bf16"]), 3)

    assert len(course.points) == 1
    assert course.symptom.startswith("the gradients of")


@pytest.mark.parametrize(("fails", "steps"), [(False, 12), (True, 4)])
def test_a_row_of_four_skips_is_asked_whether_the_floor_would_cure_it(
    fails: bool, steps: int
) -> None:
    """If not, the course ends there; otherwise it goes on until the scale has come down."""
    asked = []

    def fails_at_floor(moment: Any) -> bool:
        asked.append(moment.step)
        return fails

    course = take_course(
        subject(loss=lambda m, b: squares(m, b) * 400).begin(PLANS["fp16"]),
        12,
        fails_at_floor=fails_at_floor,
    )

    assert asked[0] == 4
    assert len(course.points) == steps
    assert bool(course.symptom) is fails
    assert fails or course.applied


def test_a_row_that_the_budget_cuts_short_is_asked_too() -> None:
    """So that two steps are enough to see an overflow that no scale cures."""
    course = take_course(
        subject(loss=lambda m, b: squares(m, b) * 400).begin(PLANS["fp16"]),
        2,
        fails_at_floor=lambda moment: True,
    )

    assert "at the lowest scale" in course.symptom


def test_late_skips_are_kept_and_those_of_the_calibration_are_not() -> None:
    """The newest three of those that came after a step was applied."""
    data = [(x, y * (3000.0 if i in (5, 9) else 1.0)) for i, (x, y) in enumerate(batches(12))]

    course = take_course(subject(data=data).begin(PLANS["fp16"]), 12)

    assert course.episodes >= 1
    assert course.late_skips
    assert all(not kept.applied and kept.step > 1 for kept in course.late_skips)


def test_a_training_under_the_same_plan_begins_anew_each_time() -> None:
    """Same data, same weights, same random numbers, whoever took steps before."""
    one = subject(Stateful)

    first, second = (take_course(one.begin(PLANS["bf16"]), 4).losses for _ in range(2))

    assert first == second


def test_a_subject_of_a_recipe_trains_as_the_recipe_does() -> None:
    """Each training loads the recipe anew, and a fresh model is as it was before its first step."""
    recipe = load_recipe(Path(__file__).parents[1] / "small_recipe.py")
    one = subject_of_recipe(recipe, seed=3, device=CPU)

    courses = [take_course(one.begin(PLANS["fp16"]), 4, sample_at={3}) for _ in range(2)]
    (kept,) = courses[0].samples
    engine = on_its_own(one, PLANS["fp16"], kept).engine
    again = replay_step(engine, one.compute_loss, kept.moments[0], ranges=None)

    assert courses[0].losses == courses[1].losses
    assert again.loss == kept.losses[0]
    assert one.peak(PLANS["fp16"]) is not None


@pytest.mark.parametrize("limit", range(-3, 12))
@pytest.mark.parametrize("highest", [0, 1, 7])
def test_the_largest_finite_scale_is_found_in_few_replays(limit: int, highest: int) -> None:
    """One at the lowest, and the logarithm of the exponents; None where none serves."""
    asked = []

    def at(scale: float) -> StepTrace:
        asked.append(scale)
        loss = 1.0 if scale <= 2.0**limit else math.inf
        return StepTrace(precision="", scale=scale, loss=loss, gradients={})

    found = largest_finite_scale(at, at_least=1.0, at_most=2.0**highest)

    if limit < 0:
        assert found is None
    else:
        assert found is not None
        assert found.scale == 2.0 ** min(limit, highest)
    assert len(asked) <= 1 + math.ceil(math.log2(highest + 1))
    assert all(math.frexp(scale)[0] == 0.5 for scale in asked)


def test_evidence_is_taken_at_the_scale_at_which_training_goes_on() -> None:
    """Below the one in force where that overflows; at the floor where nothing serves."""
    one = subject(loss=lambda m, b: squares(m, b) * 400)
    (kept,) = take_course(one.begin(PLANS["fp16"]), 1, sample_at={1}).samples

    usable = gather(one, PLANS["fp16"], kept)
    hopeless = gather(
        subject(loss=lambda m, b: squares(m, b) * 3e7), PLANS["fp16"], kept, look=False
    )

    assert usable.scale == 65536
    assert 1 < usable.low.scale < 65536
    assert not usable.is_loud
    assert usable.low.events
    assert hopeless.is_loud
    assert hopeless.low.scale == hopeless.floor == 1
    assert hopeless.low.events == ()


def test_of_several_micro_batches_the_one_that_fails_is_shown() -> None:
    """The second half of the batch holds the row that overflows."""
    data = batches(1)
    data[0][0][6] *= 1e30
    plan = replace(HALVES, policy=PLANS["fp16"].policy)
    one = subject(data=data)
    kept = take_course(one.begin(plan), 1).failing

    assert kept is not None
    found = gather(one, plan, kept)

    assert found.is_loud
    assert not math.isfinite(found.low.loss)
