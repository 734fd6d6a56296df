"""Estimates of a step's seconds from few measurements, which plans share."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import cast

from narrowcast.plan import PLANS, Plan
from narrowcast.planning.space import CHECKPOINT, REMAKE, Space, candidates, plain_plan
from narrowcast.planning.speeds import Speeds, StepTimes
from narrowcast.policy import POLICIES

SPACE = Space(
    policies=(POLICIES["fp32"], POLICIES["bf16"], PLANS["bf16-split"].policy),
    narrow_stores=True,
    activations=((), REMAKE, CHECKPOINT, (*CHECKPOINT, *REMAKE)),
    losses=("whole", "chunked"),
    micro_batches=(1, 2, 4),
    release=True,
    batch_norm=False,
)


@dataclass
class Told:
    """Step times out of the head: a second forward and backward, twice as much with a lever."""

    steps: list[Plan] = field(default_factory=list)
    updates: list[tuple[str, str]] = field(default_factory=list)

    def of_step(self, plan: Plan) -> float:
        self.steps.append(plan)
        base = {"fp32": 4.0, "bf16": 1.0}[plan.policy.compute]
        levers = sum(rule.lever != "narrow_norm" for rule in plan.activations)
        levers += (plan.loss != "whole") + (plan.micro_batches - 1)
        return base * 2**levers + 0.5

    def of_update(self, plan: Plan) -> float:
        self.updates.append((plan.weights, plan.states))
        return 0.5


def speeds(space: Space = SPACE) -> tuple[Speeds, Told]:
    told = Told()
    return Speeds(cast("StepTimes", told), plain_plan(space)), told


def test_all_plans_are_estimated_from_one_measurement_a_choice() -> None:
    """Three policies, three activations, one loss, two splits.

    Plans that share what they compute share what was timed, whatever they are called.
    """
    estimates, told = speeds()

    for plan in candidates(SPACE):
        estimates.of(plan)

    assert len(told.steps) == 3 + 3 + 1 + 2
    assert len(set(told.steps)) == len(told.steps)
    # fp32 weights and bf16 ones with the recipe's optimizer, and every pair of stores
    assert len(told.updates) == 2 + 4 + 3 * 4


def test_the_estimate_is_the_product_of_its_ratios_and_the_update() -> None:
    """Of bf16 a second, twice that with a lever, and the update's half second."""
    estimates, _ = speeds()
    plan = Plan(name="p", policy=POLICIES["bf16"], activations=CHECKPOINT, loss="chunked")

    assert estimates.of(plan) == 1.0 * 2 * 2 + 0.5


def test_the_norms_of_bf16_weights_are_measured_with_the_policy_and_not_as_a_lever() -> None:
    """They belong to the weights: nowhere else is their price looked for."""
    estimates, told = speeds(replace(SPACE, policies=SPACE.policies[::-1]))
    for plan in candidates(SPACE):
        estimates.of(plan)

    def has_norms(plan: Plan) -> bool:
        return any(rule.lever == "narrow_norm" for rule in plan.activations)

    assert all(has_norms(plan) == (plan.policy.param == "bf16") for plan in told.steps)
    assert len(told.steps) == 3 + 3 + 1 + 2


def test_products_in_fp8_are_timed_beside_those_in_bf16() -> None:
    """They are another computation under the same autocast; the stores' updates are shared."""
    told = Told()
    estimates = Speeds(cast("StepTimes", told), PLANS["bf16"])
    for name in ("bf16", "fp8-emulated", "bf16-split", "fp8-split-emulated"):
        estimates.of(PLANS[name])

    assert [plan.policy.linears for plan in told.steps] == ["compute", "fp8-emulated"] * 2
    assert len(told.updates) == 3
