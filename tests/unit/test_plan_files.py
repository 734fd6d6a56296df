"""A plan as a file and as lines of Python."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch import nn

import narrowcast
from narrowcast.engine.stores import planned_optimizer
from narrowcast.errors import UsageError
from narrowcast.plan import AUTO_BLOCKS, PLANS, ActivationRule, Plan
from narrowcast.plan_files import (
    Promise,
    naming_differences,
    read_plan,
    read_promise,
    write_policy,
)
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


def _planned(plan: Plan) -> torch.optim.Optimizer:
    model = Tiny()
    return planned_optimizer(torch.optim.AdamW(model.parameters(), lr=1e-2), model, plan)


def test_a_refusal_says_first_for_which_training_the_plan_was_found() -> None:
    """What fails with this model went with that one; without a difference nothing is added."""
    hints = []
    for notes in ((), ("plan.json was found for recipe 'a', and this is 'b'",)):
        with pytest.raises(UsageError) as raised, naming_differences(notes):
            raise UsageError("no layer looks like a head", hint="name it")
        hints.append(raised.value.hint)

    assert hints == ["name it", "plan.json was found for recipe 'a', and this is 'b'; name it"]


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
    exec(code_of(plan, _planned(plan)), scope)

    engine = scope["engine"]
    assert isinstance(engine, narrowcast.Engine)
    assert engine.plan == plan
    assert engine.applied_steps() == 1
    assert not torch.equal(model.head.weight.float(), before)


def test_the_lines_of_python_have_the_hyperparameters_of_the_recipe() -> None:
    """What is not as the class has it by itself; the learning rate always."""
    model, plan = Tiny(), dataclasses.replace(PLANS["fp32"], weights="fp32", states="int8")
    groups = [{"params": model.blocks.parameters()}, {"params": model.head.parameters(), "lr": 1.0}]
    one = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True)
    two = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95))

    said = code_of(plan, planned_optimizer(one, model, plan))
    assert "lr=0.05" in said
    assert "momentum=0.9" in said
    assert "nesterov=True" in said
    assert "dampening" not in said
    said = code_of(plan, planned_optimizer(two, Tiny(), plan))
    assert "lr=0.001" in said
    assert "betas=(0.9, 0.95,)" in said
    assert "# The recipe has 2 groups of parameters" in said


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


def test_ranks_are_started_by_torchrun_and_train_by_the_command_alone() -> None:
    """The command is whole, and the lines of Python say that there are none."""
    command = command_of(load_recipe("tabular"), None, "p.json", world=2, parallel="fsdp2")

    assert command == (
        "torchrun --nproc-per-node 2 -m narrowcast train tabular --plan p.json --parallel fsdp2"
    )
    code = code_of(FULL, _planned(FULL), parallel="fsdp2")
    assert all(line.startswith("# ") for line in code.splitlines())
    assert "run the command" in code


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


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ('{"name": "x", "policy": {"name": "fp32"}, "states": "own", "states": "int4"}', "states"),
        ('{"name": "x", "policy": {"name": "fp32", "name": "bf16"}}', "name"),
    ],
)
def test_what_a_file_says_twice_is_not_read_once(tmp_path: Path, text: str, key: str) -> None:
    """JSON's readers keep the last of two values; which was meant is for the user to say."""
    file = tmp_path / "plan.json"
    file.write_text(text)

    with pytest.raises(UsageError, match=f"says '{key}' twice"):
        read_plan(file)


PROMISE = Promise(
    budget_bytes=1000, recipe="r", options={"width": 3, "lr": 0.1}, batch_size=8, device="cpu"
)
AS_RECORD = {
    "budget_bytes": 1000, "recipe": "r", "options": {"width": 3, "lr": 0.1}, "batch_size": 8,
    "device": "cpu", "environment": {"device": "cpu", "device_name": "EPYC"}, "chosen": {},
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "device"),
    [
        ({}, "cpu"),
        ({"device": None}, "cpu"),
        ({"device": "h200"}, "h200"),
        ({"device": "cuda:0", "environment": {"device_name": "NVIDIA H200"}}, "NVIDIA H200"),
        ({"device": None, "environment": {"device": "cuda", "device_name": "T4"}}, "T4"),
    ],
)
def test_a_budget_is_read_with_the_training_that_it_is_for(
    tmp_path: Path, changes: dict[str, object], device: str
) -> None:
    """From a plan, which says its device, and from a run.json, whose environment does."""
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(AS_RECORD | changes))

    assert read_promise(file) == dataclasses.replace(PROMISE, device=device)


@pytest.mark.parametrize(
    "changes",
    [
        {"world": 4, "chosen": {"parallel": "fsdp2"}},
        {"ranks": 4, "parallel": "fsdp2", "chosen": None, "planned_steps": 3, "plan": {}},
    ],
    ids=["plan", "run"],
)
def test_a_promise_says_of_how_many_ranks_it_is(tmp_path: Path, changes: dict[str, object]) -> None:
    """From a plan, and from the run.json of a training on ranks."""
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(AS_RECORD | changes))

    promise = read_promise(file)

    assert promise == dataclasses.replace(PROMISE, world=4, parallel="fsdp2")
    assert promise.differences(**SAME, world=4, parallel="fsdp2") == ()  # type: ignore[arg-type]
    for others in ({"world": 2, "parallel": "fsdp2"}, {"world": 4, "parallel": "ddp"}, {}):
        (said,) = promise.differences(**SAME | others)  # type: ignore[arg-type]
        assert said.startswith("fsdp2 on 4 ranks, and this is ")
    (said,) = PROMISE.differences(**SAME, world=2, parallel="ddp")  # type: ignore[arg-type]
    assert said == "one process, and this is ddp on 2 ranks"


@pytest.mark.parametrize("text", [dumps(PLANS["lean"]), '{"budget_bytes": null}', "[1]"])
def test_a_plan_without_a_budget_promises_nothing(tmp_path: Path, text: str) -> None:
    """A bare plan, and the run.json of a training that was given none."""
    file = tmp_path / "plan.json"
    file.write_text(text)

    assert read_promise(file) is None


@pytest.mark.parametrize("key", ["recipe", "options", "batch_size", "device", "environment"])
def test_half_a_promise_is_one_clear_error(tmp_path: Path, key: str) -> None:
    """A budget that is for nothing in particular cannot be held against anything."""
    file = tmp_path / "plan.json"
    broken = {"environment": {"device": "cuda"}, "device": None} if key == "environment" else {}
    data = AS_RECORD | broken
    if key != "environment":
        del data[key]
    if key == "device":
        del data["environment"]
    file.write_text(json.dumps(data))

    with pytest.raises(UsageError, match="does not say for what training"):
        read_promise(file)


SAME = {"recipe": "r", "options": {"width": 3, "lr": 0.1}, "batch_size": 8, "devices": {"cpu"}}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, ()),
        ({"recipe": "q", "options": {"depth": 1}}, ("recipe 'r', and this is 'q'",)),
        ({"options": {"width": 4, "lr": 0.1}}, ("width=3, and this is width=4",)),
        ({"options": {"lr": 0.1}}, ("width=3, and this is width=not there",)),
        ({"batch_size": 16}, ("batches of 8, and these are of 16",)),
        ({"devices": {"cuda", "h200"}}, ("device cpu, and this is another",)),
        (
            {"options": {"width": 4, "lr": 1.0}},
            ("lr=0.1, and this is lr=1.0", "width=3, and this is width=4"),
        ),
    ],
)
def test_every_difference_from_the_training_that_was_planned_is_said(
    changes: dict[str, object], said: tuple[str, ...]
) -> None:
    """Of another recipe the options are others anyway, and are not listed."""
    assert PROMISE.differences(**SAME | changes) == said  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "text",
    [
        '{"chosen": {"plan": 3}}',
        '{"chosen": {"plan": [1]}}',
        '{"planned_steps": 3, "plan": "x"}',
        '{"planned_steps": 3, "plan": null}',
    ],
)
def test_a_plan_that_is_no_object_is_no_plan(tmp_path: Path, text: str) -> None:
    """As where there is none."""
    file = tmp_path / "plan.json"
    file.write_text(text)

    with pytest.raises(UsageError, match="holds no plan"):
        read_plan(file)


@pytest.mark.parametrize("budget", [0, -1])
def test_a_budget_of_nothing_is_one_clear_error(tmp_path: Path, budget: int) -> None:
    """The planner refuses such a budget too."""
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(AS_RECORD | {"budget_bytes": budget}))

    with pytest.raises(UsageError, match=f"budget of {budget} bytes"):
        read_promise(file)
