"""A plan is one choice on each axis; two choices that exclude each other are refused by name."""

from __future__ import annotations

from dataclasses import replace

import pytest

from narrowcast.errors import UnknownName, UsageError
from narrowcast.plan import OWN, PLANS, STATES, WEIGHTS, ActivationRule, Plan, plan_named
from narrowcast.policy import ALIASES, POLICIES, Policy
from narrowcast.records.codec import from_json, to_json

BF16 = Policy(name="p", param="bf16", compute="bf16")
SPLIT = Plan(name="p", policy=BF16, weights="split16", states="int8")


@pytest.mark.parametrize("name", POLICIES)
def test_a_policys_name_is_the_plan_that_changes_nothing_else(name: str) -> None:
    """fp32, bf16 and the like leave optimizer, gradients, activations and loss as they are."""
    assert plan_named(name) == Plan(name=name, policy=POLICIES[name])
    assert (plan_named(name).weights, plan_named(name).states) == (OWN, OWN)


@pytest.mark.parametrize("alias", ALIASES)
def test_aliases_of_policies_name_plans_too(alias: str) -> None:
    """Lightning's names stay usable."""
    assert plan_named(alias) == PLANS[ALIASES[alias]]


def test_an_unknown_plan_names_the_nearest() -> None:
    """Typing errors are answered with a guess."""
    with pytest.raises(UnknownName, match="did you mean 'lean'"):
        plan_named("leen")


@pytest.mark.parametrize("plan", PLANS.values(), ids=lambda p: p.name)
def test_a_plan_comes_back_from_json(plan: Plan) -> None:
    """Checkpoints, protocols and plan files hold plans as JSON."""
    assert from_json(Plan, to_json(plan)) == plan


@pytest.mark.parametrize("weights", [w for w in WEIGHTS if w not in (OWN, "fp32")])
@pytest.mark.parametrize("states", [s for s in STATES if s != OWN])
def test_every_pair_of_stores_is_a_plan(weights: str, states: str) -> None:
    """The axes compose."""
    assert replace(SPLIT, weights=weights, states=states).weights == weights


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"weights": "split"}, "did you mean 'split8'|did you mean 'split16'"),
        ({"states": "int2"}, "did you mean 'int"),
        ({"gradients": "drop"}, "choice for gradients"),
        ({"loss": "chunk"}, "did you mean 'chunked'"),
        ({"micro_batches": 0}, "micro_batches is 0"),
        ({"name": "../p"}, "no name for a plan"),
        ({"name": "a\n"}, "no name for a plan"),
        ({"name": ""}, "no name for a plan"),
        ({"name": " "}, "no name for a plan"),
        ({"name": "a" * 400}, "400 characters"),
        ({"name": "\u00e4" * 61}, "no name for a plan"),
        ({"states": OWN}, "one of them is the recipe's own"),
        ({"policy": POLICIES["bf16"]}, "keeps them in fp32"),
        ({"weights": "fp32"}, "keeps them in bf16"),
        ({"gradients": "release", "micro_batches": 2}, "accumulates 2 micro-batches"),
        ({"gradients": "release", "weights": OWN, "states": OWN}, "cannot step during backward"),
        (
            {"gradients": "release", "policy": POLICIES["fp16"], "weights": "fp32"},
            "scales the loss",
        ),
    ],
)
def test_choices_that_exclude_each_other_are_refused(changes: dict[str, object], said: str) -> None:
    """The error names both choices and the reason."""
    with pytest.raises((UsageError, UnknownName), match=said):
        replace(SPLIT, **changes)  # type: ignore[arg-type]


def test_the_longest_name_is_one_that_a_folder_can_have_with_recipe_and_seed() -> None:
    """255 bytes are what file systems allow."""
    assert replace(SPLIT, name="a" * 120).name == "a" * 120
    assert replace(SPLIT, name="\u00e4" * 60).name


@pytest.mark.parametrize(
    ("modules", "lever", "said"),
    [("blocks.*", "checkpint", "did you mean 'checkpoint'"), ("", "offload", "names no module")],
)
def test_a_rule_that_makes_no_sense_is_refused(modules: str, lever: str, said: str) -> None:
    """A rule names modules and one of the levers."""
    with pytest.raises((UsageError, UnknownName), match=said):
        ActivationRule(modules=modules, lever=lever)  # type: ignore[arg-type]
