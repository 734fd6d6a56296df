"""A plan as a file and as lines of Python."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch import nn

import narrowcast
from narrowcast.errors import UsageError
from narrowcast.plan import AUTO_BLOCKS, PLANS, ActivationRule, Plan
from narrowcast.plan_files import read_plan, write_policy
from narrowcast.planning.code import code_of, command_of
from narrowcast.policy import POLICIES, Policy
from narrowcast.recipes.load import load_recipe
from narrowcast.records.codec import dumps, to_json

BF16 = Policy(name="p", param="bf16", compute="bf16", keep_fp32=("head",))
FULL = Plan(
    name="p",
    policy=BF16,
    weights="split8",
    states="int4",
    loss="chunked",
    micro_batches=4,
    activations=(
        ActivationRule(modules="blocks.1", lever="checkpoint"),
        ActivationRule(modules=AUTO_BLOCKS, lever="narrow_norm"),
    ),
)


@pytest.mark.parametrize("wrap", ["bare", "record", "run"])
@pytest.mark.parametrize("plan", [FULL, *PLANS.values()], ids=lambda p: p.name)
def test_a_plan_is_read_from_whatever_holds_one(tmp_path: Path, plan: Plan, wrap: str) -> None:
    """A bare plan, what `narrowcast plan` wrote, and a run.json."""
    data = to_json(plan)
    held = {
        "bare": data,
        "record": {"chosen": {"plan": data}, "budget_bytes": 1},
        "run": {"plan": data, "planned_steps": 3},
    }
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(held[wrap]))

    assert read_plan(file) == plan


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "is not JSON"),
        ("[]", "holds no plan"),
        ('{"name": "x", "compute": "fp12"}', "float format"),
        ("{}", "holds no plan"),
        ('{"chosen": {}}', "holds no plan"),
        ('{"policy": {"name": "x"}}', "missing fields"),
        ('{"name": "x", "policy": {"name": "fp32"}, "weights": "int3"}', "weight store"),
        ('{"name": "x", "policy": {"name": "fp32"}, "color": 1}', "unknown fields"),
    ],
)
def test_a_file_without_a_plan_is_one_clear_error(tmp_path: Path, text: str, said: str) -> None:
    """The error names the file, and what is wrong with it."""
    file = tmp_path / "plan.json"
    file.write_text(text)

    with pytest.raises(UsageError, match=said) as raised:
        read_plan(file)
    assert "plan.json" in raised.value.message
    assert raised.value.hint


@pytest.mark.parametrize("wrap", ["bare", "file"])
def test_a_policy_is_read_as_the_plan_that_adds_nothing(tmp_path: Path, wrap: str) -> None:
    """As JSON by hand, and as `diagnose` writes it."""
    policy = POLICIES["fp16"].keeping_fp32("blocks.*.wo", "head:softmax")
    file = tmp_path / "policy.json"
    plan = Plan(name="fp16", policy=policy)
    if wrap == "bare":
        file.write_text(dumps(policy))
    else:
        write_policy(file, plan, why="two culprits", command="narrowcast diagnose x")

    assert read_plan(file) == plan


def test_a_policy_file_overwrites_nothing(tmp_path: Path) -> None:
    """What is there stays."""
    file = tmp_path / "policy.json"
    file.write_text("mine")

    with pytest.raises(UsageError, match="exists"):
        write_policy(file, PLANS["fp16"], why="", command="")
    assert file.read_text() == "mine"


def test_a_policy_that_is_not_allowed_is_one_clear_error(tmp_path: Path) -> None:
    """fp16 without scaling, edited into the file."""
    file = tmp_path / "policy.json"
    file.write_text(dumps(POLICIES["fp16"]).replace("dynamic", "none"))

    with pytest.raises(UsageError, match=r"policy.json.*without loss scaling"):
        read_plan(file)


def test_a_file_that_is_not_there_is_one_clear_error(tmp_path: Path) -> None:
    """Not a traceback."""
    with pytest.raises(UsageError, match="No such file"):
        read_plan(tmp_path / "none.json")


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.GELU()) for _ in range(3))
        self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"micro_batches": 2},
        {"activations": (ActivationRule(modules="blocks.1", lever="checkpoint"),)},
        {"policy": BF16, "weights": "split16", "states": "int8", "loss": "auto"},
        {"policy": BF16, "weights": "split8", "states": "int4", "micro_batches": 2},
        {"weights": "fp32", "states": "bf16", "gradients": "release"},
    ],
)
def test_the_lines_of_python_run_and_make_the_same_plan(changes: dict[str, object]) -> None:
    """What the planner prints trains a model of one's own, with that very plan."""
    plan = dataclasses.replace(PLANS["fp32"], **changes)  # type: ignore[arg-type]
    if plan.policy.keep_fp32:
        plan = dataclasses.replace(plan, policy=dataclasses.replace(plan.policy, keep_fp32=()))
    model = Tiny()
    before = model.head.weight.detach().float().clone()

    def compute_loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(model(batch).float(), torch.zeros(len(batch)).long())

    scope: dict[str, object] = {
        "model": model,
        "optimizer": torch.optim.AdamW(model.parameters(), lr=1e-2),
        "compute_loss": compute_loss,
        "batches": [torch.randn(4, 8, dtype=torch.float32 if plan.policy.param == "fp32" else
                                torch.bfloat16)],
    }  # fmt: skip
    exec(code_of(plan, "AdamW"), scope)

    engine = scope["engine"]
    assert isinstance(engine, narrowcast.Engine)
    assert engine.plan == plan
    assert engine.applied_steps() == 1
    assert not torch.equal(model.head.weight.float(), before)


def test_the_command_says_which_options_are_not_the_usual_ones() -> None:
    """The plan belongs to the recipe with these options, and to no other."""
    small = load_recipe("tabular", ["width=32"])

    assert command_of(small, None, "p.json") == (
        "narrowcast train tabular --set width=32 --plan p.json"
    )
    assert command_of(load_recipe("tabular"), None, "a b.json") == (
        "narrowcast train tabular --plan 'a b.json'"
    )
    assert "size=small" in command_of(load_recipe("austen", ["size=small"]), ["size=small"], "p")


def test_a_recipe_file_is_named_by_its_path(tmp_path: Path) -> None:
    """A file that happens to be called like a built-in recipe is not that one."""
    file = tmp_path / "tabular.py"
    file.write_text((Path(__file__).parents[1] / "recipes" / "regression.py").read_text())

    assert str(file) in command_of(load_recipe(file), None, "p.json")


def test_a_plan_written_as_json_reads_back(tmp_path: Path) -> None:
    """What dumps writes, read_plan reads."""
    file = tmp_path / "p.json"
    file.write_text(dumps(FULL))

    assert read_plan(file) == FULL
