"""Policies are values: what the names mean, what is refused, which modules stay in fp32."""

from __future__ import annotations

import dataclasses

import pytest
from torch import nn

from narrowcast.errors import UnknownName, UsageError
from narrowcast.policy import ALIASES, POLICIES, Policy, policy_named


@pytest.mark.parametrize(
    ("name", "autocasts", "master", "scaling"),
    [
        ("fp32", False, True, "none"),
        ("tf32", False, True, "none"),
        ("fp16", True, True, "dynamic"),
        ("bf16", True, True, "none"),
        ("bf16-true", False, False, "none"),
    ],
)
def test_the_names_mean_what_the_field_means(
    name: str, autocasts: bool, master: bool, scaling: str
) -> None:
    """Mixed precisions autocast over fp32 master weights; only fp16 needs loss scaling."""
    policy = policy_named(name)

    assert (policy.autocasts, policy.keeps_master, policy.scaling) == (autocasts, master, scaling)


@pytest.mark.parametrize("alias", ALIASES)
def test_lightning_names_are_accepted(alias: str) -> None:
    """People who come from another trainer type what they know."""
    assert policy_named(alias) is POLICIES[ALIASES[alias]]


def test_an_unknown_precision_names_the_nearest() -> None:
    """Exit code 2 and one line with the nearest match."""
    with pytest.raises(UnknownName, match="did you mean 'bf16-true'") as caught:
        policy_named("bf16_true")

    assert caught.value.exit_code == 2


def test_the_name_of_a_plan_is_sent_to_plan_named() -> None:
    """`lean` is a precision wherever a plan may be asked for, and no policy."""
    with pytest.raises(UnknownName, match="plan_named"):
        policy_named("lean")


def test_fp16_without_scaling_is_refused() -> None:
    """Small fp16 gradients would become zero without a word."""
    with pytest.raises(UsageError, match=r"6\.0e-08"):
        Policy(name="mine", compute="fp16")


def test_fp16_weights_are_refused() -> None:
    """Gradients of fp16 weights cannot be unscaled."""
    with pytest.raises(UsageError, match="fp16"):
        Policy(name="mine", param="fp16", compute="fp16", scaling="dynamic")


def test_keep_fp32_takes_globs_and_classes() -> None:
    """A class becomes its qualified name, so that a policy stays a plain value."""
    policy = POLICIES["fp16"].keeping_fp32("head.*", nn.LayerNorm)
    layer_norm = "torch.nn.modules.normalization.LayerNorm"

    assert policy.keep_fp32 == ("head.*", f"class:{layer_norm}")
    assert policy.keeps("head.out", ("torch.nn.modules.linear.Linear",))
    assert policy.keeps("body.norm", (layer_norm, "torch.nn.modules.module.Module"))
    assert not policy.keeps("body.linear", ("torch.nn.modules.linear.Linear",))


def test_a_policy_cannot_be_changed() -> None:
    """Values are replaced, not mutated."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        POLICIES["fp32"].compute = "bf16"  # type: ignore[misc]
