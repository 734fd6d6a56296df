"""What a plan changes, in words, and under which name it goes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from narrowcast.errors import NarrowcastError
from narrowcast.parallel.together import KINDS
from narrowcast.plan import (
    AUTO_BLOCKS,
    LEVERS,
    PLANS,
    STATES,
    WEIGHTS,
    ActivationRule,
    Plan,
)
from narrowcast.planning.axes import anonymous, effects_of, is_exact, loss_of, named, short
from narrowcast.policy import POLICIES, Policy

FP32 = PLANS["fp32"]
BF16 = Policy(name="p", param="bf16", compute="bf16")
CHECKPOINT = (ActivationRule(modules=AUTO_BLOCKS, lever="checkpoint"),)


def renamed(plan: Plan) -> Plan:
    """Return the plan and its policy under other names, of which an emulation's must say so."""
    label = "-emulated" if plan.policy.emulates else ""
    return replace(plan, name=f"x{label}", policy=replace(plan.policy, name=f"y{label}"))


def test_plain_fp32_changes_nothing_and_is_exact() -> None:
    """The reference has no effects to list."""
    assert effects_of(FP32, batch_norm=True) == ()
    assert is_exact(FP32, batch_norm=True)


@pytest.mark.parametrize(
    "changes",
    [
        {"activations": CHECKPOINT},
        {"activations": (ActivationRule(modules="a", lever="offload"),)},
        {"loss": "chunked"},
        {"micro_batches": 4},
        {"weights": "fp32", "states": "fp32", "gradients": "release"},
    ],
)
def test_levers_that_only_reorder_sums_are_exact(changes: dict[str, object]) -> None:
    """Checkpointing, offload, chunks, micro-batches and release leave the result as it is."""
    plan = replace(FP32, **changes)  # type: ignore[arg-type]

    assert is_exact(plan, batch_norm=False)
    assert all(effect.exact for effect in effects_of(plan, batch_norm=False))
    assert effects_of(plan, batch_norm=False)


def test_micro_batches_are_lossy_with_batch_norm_and_say_why() -> None:
    """Batch norm sees a part where it would have seen the whole."""
    (effect,) = effects_of(replace(FP32, micro_batches=2), batch_norm=True)

    assert not effect.exact
    assert "statistics of a part" in effect.says


@pytest.mark.parametrize("parallel", KINDS)
def test_sharing_is_an_axis_and_exact_without_batch_norm(parallel: str) -> None:
    """Gradients are added in another order, and nothing else: but batch norm sees a part."""
    (effect,) = effects_of(FP32, batch_norm=False, parallel=parallel, world=4)
    (lossy,) = effects_of(FP32, batch_norm=True, parallel=parallel, world=4)

    assert (effect.axis, effect.choice, effect.exact) == (
        "parallel",
        f"{parallel} on 4 ranks",
        True,
    )
    assert loss_of(FP32, batch_norm=False, parallel=parallel) == 0
    assert not lossy.exact
    assert "a rank's part" in lossy.says
    split = loss_of(replace(FP32, micro_batches=2), batch_norm=True)
    assert loss_of(FP32, batch_norm=True, parallel=parallel) == split


@pytest.mark.parametrize("policy", [p for p in POLICIES.values() if p.name != "fp32"])
def test_every_precision_but_fp32_is_lossy(policy: Policy) -> None:
    """What rounds is said to round."""
    assert not is_exact(Plan(name=policy.name, policy=policy), batch_norm=False)


def test_of_two_plans_the_one_that_keeps_less_is_the_lossier() -> None:
    """Each axis ranks its choices by what they keep."""
    split = Plan(name="p", policy=BF16, weights="split16", states="fp32")

    by_weights = [replace(split, weights=w) for w in ("split16", "split8", "stochastic")]
    by_states = [replace(split, states=s) for s in ("fp32", "bf16", "int8", "int4")]
    for row in (by_weights, by_states):
        losses = [loss_of(plan, batch_norm=False) for plan in row]
        assert losses == sorted(set(losses))
    assert loss_of(PLANS["bf16"], batch_norm=False) < loss_of(split, batch_norm=False)


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("states", STATES)
@pytest.mark.parametrize("policy", [*POLICIES.values(), BF16], ids=lambda p: p.name)
@pytest.mark.parametrize("lever", [None, *LEVERS])
def test_every_choice_that_a_plan_accepts_has_words(
    policy: Policy, weights: str, states: str, lever: str | None
) -> None:
    """No axis is forgotten: whatever Plan takes is worded, counted and named."""
    rules = () if lever is None else (ActivationRule(modules="a", lever=lever),)  # type: ignore[arg-type]
    try:
        plan = Plan(
            name=policy.name, policy=policy, weights=weights, states=states, activations=rules
        )
    except NarrowcastError:
        return

    assert all(e.says and e.choice for e in effects_of(plan, batch_norm=False))
    assert loss_of(plan, batch_norm=False) >= 0
    assert short(plan)


@pytest.mark.parametrize("known", PLANS.values(), ids=lambda p: p.name)
def test_a_known_plan_keeps_its_name_whatever_it_was_called(known: Plan) -> None:
    """fp32 stays fp32, lean stays lean."""
    assert named(renamed(known)) == known


def test_another_plan_is_named_after_its_choices_and_so_is_its_policy() -> None:
    """Evaluations in the training precision are found by the policy's name."""
    plan = named(
        Plan(
            name="p", policy=BF16, weights="split8", states="int4", loss="chunked",
            activations=CHECKPOINT, micro_batches=4,
        )
    )  # fmt: skip

    assert plan.name == "bf16w-split8-int4-checkpoint-chunked-x4"
    assert plan.policy.name == plan.name


@pytest.mark.parametrize("plan", PLANS.values(), ids=lambda p: p.name)
def test_without_a_name_of_its_own_a_plan_equals_all_that_differ_in_names(plan: Plan) -> None:
    """And an error about it names formats that a user knows."""
    assert anonymous(renamed(plan)) == anonymous(plan)
    formats = plan.policy.compute if plan.policy.linears == "compute" else plan.policy.linears
    assert anonymous(plan).policy.name.removesuffix("w") == formats


def test_names_do_not_tell_apart_what_shares_a_measurement() -> None:
    """Plans that differ in stores alone compute alike: their policies are one key."""
    split = Plan(name="a", policy=BF16, weights="split16", states="int8")

    assert anonymous(split).policy == anonymous(replace(split, states="int4")).policy
    assert replace(anonymous(split), states="int4") == anonymous(replace(split, states="int4"))


def test_the_norms_of_bf16_weights_are_in_no_name() -> None:
    """They are no choice; under fp32 weights they are."""
    assert short(PLANS["bf16-split"]) == "bf16w-split16-int8"
    assert short(replace(FP32, activations=PLANS["bf16-split"].activations)) == "fp32-narrow_norm"
