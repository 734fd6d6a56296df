"""Facts about a plan's levers on a model: what it asks of any model, and what is said of it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from narrowcast.activations.forward import levered
from narrowcast.engine.levers import apply_levers
from narrowcast.errors import UsageError
from narrowcast.plan import EVERYWHERE, PLANS, ActivationRule

SPLIT, LEAN = PLANS["bf16-split"], PLANS["lean"]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.mlp = nn.Sequential(nn.Linear(8, 8), nn.RMSNorm(8))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm(x))  # type: ignore[no-any-return]


def blocks(count: int = 2) -> nn.Module:
    return nn.Sequential(*(Block() for _ in range(count)), nn.LayerNorm(8))


def placed(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Map the names of levered modules to their levers, outermost first."""
    return {
        name: tuple(lever.name for lever in forward.levers)
        for name, module in model.named_modules()
        if (forward := levered(module)) is not None
    }


def test_every_norm_is_narrow_in_the_plans_with_bf16_weights() -> None:
    """Those of blocks and the last one, of both kinds: fp32 statistics on a CPU too."""
    model = blocks()
    apply_levers(model, SPLIT)

    norms = ("0.norm", "0.mlp.1", "1.norm", "1.mlp.1", "2")
    assert placed(model) == dict.fromkeys(norms, ("narrow_norm",))


def test_lean_puts_its_levers_inside_of_each_other() -> None:
    """A checkpointed block runs again by itself, and remakes what it would keep."""
    model = blocks()
    apply_levers(model, LEAN)

    assert placed(model) == {
        "": ("remake",),
        "0": ("checkpoint", "remake"),
        "1": ("checkpoint", "remake"),
    } | dict.fromkeys(("0.norm", "0.mlp.1", "1.norm", "1.mlp.1", "2"), ("narrow_norm",))


def test_a_long_list_of_modules_is_cut() -> None:
    """Four names say where a lever is, and a number how often else."""
    notes = apply_levers(blocks(4), SPLIT).notes

    assert notes == ("narrow_norm: 0.norm, 0.mlp.1, 1.norm, 1.mlp.1 and 5 more",)


@pytest.mark.parametrize("plan", [SPLIT, LEAN], ids=lambda plan: plan.name)
@pytest.mark.parametrize(
    ("model", "names"),
    [
        (nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)), ""),
        (nn.Sequential(nn.Conv2d(1, 4, 1), nn.BatchNorm2d(4)), "BatchNorm2d"),
    ],
    ids=["no norms", "batch norms"],
)
def test_a_model_without_such_norms_goes_without_and_it_is_said(
    model: nn.Module, names: str, plan: object
) -> None:
    """Batch norms keep fp32 statistics by themselves; the note names them."""
    (note,) = (n for n in apply_levers(model, plan).notes if "narrow_norm" in n)  # type: ignore[arg-type]

    assert note.startswith("without narrow_norm: none of the model's modules is a norm that")
    assert names in note


def test_norms_that_the_user_keeps_in_fp32_stay_there() -> None:
    """An island wins over what a named plan asks of all norms, and the note lists the others."""
    policy = SPLIT.policy.keeping_fp32("*.norm")
    model = blocks()
    notes = apply_levers(model, SPLIT.with_policy(policy)).notes

    assert placed(model) == dict.fromkeys(("0.mlp.1", "1.mlp.1", "2"), ("narrow_norm",))
    assert notes == ("narrow_norm: 0.mlp.1, 1.mlp.1, 2",)


def test_if_all_norms_are_islands_the_note_says_so() -> None:
    """Nothing is silent: the lever is there for nothing."""
    policy = SPLIT.policy.keeping_fp32("0.norm", "0.mlp.1", "1.norm", "1.mlp.1", "2")
    notes = apply_levers(blocks(), SPLIT.with_policy(policy)).notes

    assert notes == ("narrow_norm: no module, as all of them are fp32 islands",)


def test_a_rule_for_modules_in_particular_is_not_left_out() -> None:
    """Who names modules means them: no norm there is an error, as an island is."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    named = ActivationRule(modules="0", lever="narrow_norm")

    with pytest.raises(UsageError, match="the rule '0'"):
        apply_levers(model, replace(SPLIT, activations=(named,)))


def test_a_model_that_is_never_called_is_named_as_the_whole() -> None:
    """The name of the model itself is empty, which would say nothing."""
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    rule = ActivationRule(modules=EVERYWHERE, lever="remake")
    levers = apply_levers(model, replace(PLANS["fp32"], activations=(rule,)))
    model[0](torch.randn(2, 4))

    assert levers.without_effect() == (
        "remake on the whole model did nothing: the module was not called",
    )
