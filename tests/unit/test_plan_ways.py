"""Ways to share a training: which there are, what stands against one, and devices by name."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner, Result

from narrowcast.cli import plan as plan_verb
from narrowcast.errors import NarrowcastError, RecipeError, UnknownName, UsageError
from narrowcast.parallel.together import KINDS
from narrowcast.planning.planner import Planner, plan_recipe
from narrowcast.planning.rates import RATES
from narrowcast.planning.ways import kinds_for
from narrowcast.recipes.load import load_recipe
from narrowcast.records.codec import loads
from narrowcast.records.plan import PlanRecord
from narrowcast.report.terminal import render_terminal

REGRESSION = Path(__file__).parents[1] / "recipes" / "regression.py"
SMALL = ["batch_size=64", "width=64"]
ON_8: dict[str, Any] = {"device": "h200", "world": 8, "precisions": ["fp32"], "options": SMALL}


def run(*arguments: str) -> Result:
    app = typer.Typer()
    app.callback()(lambda: None)
    plan_verb.register(app)
    result = CliRunner().invoke(app, arguments)
    if isinstance(result.exception, NarrowcastError):
        raise result.exception
    return result


@pytest.fixture(autouse=True)
def no_process_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here needs ranks."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr(subprocess, "Popen", refuse)


@pytest.mark.parametrize(
    ("world", "parallel", "kinds"),
    [(1, None, ()), (2, None, KINDS), (8, "ddp", ("ddp",)), (2, "fsdp2", ("fsdp2",))],
)
def test_both_ways_are_considered_unless_one_is_asked_for(
    world: int, parallel: str | None, kinds: tuple[str, ...]
) -> None:
    """And one process shares with nobody."""
    assert kinds_for(world, parallel) == kinds


@pytest.mark.parametrize(
    ("world", "parallel", "said"),
    [
        (0, None, "number of ranks is 0"),
        (-2, "ddp", "number of ranks is -2"),
        (1, "ddp", "shares with nobody"),
        (2, "fsdp", "unknown kind of parallel training 'fsdp'"),
    ],
)
def test_ranks_that_cannot_be_are_one_clear_error(
    world: int, parallel: str | None, said: str
) -> None:
    """By the command too, before anything is traced."""
    with pytest.raises(UsageError, match=said) as raised:
        kinds_for(world, parallel)
    words = ["--parallel", parallel] if parallel else []
    with pytest.raises(UsageError, match=said):
        run("plan", "tabular", "--budget", "1GiB", f"--world={world}", *words)

    assert raised.value.hint
    assert isinstance(raised.value, UnknownName) == (parallel == "fsdp")


def test_a_number_of_ranks_that_does_not_divide_the_batch_is_one_clear_error() -> None:
    """Both numbers are named."""
    with pytest.raises(UsageError, match=r"64.*3|3.*64"):
        plan_recipe("tabular", 2**30, device="h200", world=3, options=SMALL)


@pytest.fixture(scope="module")
def on_8() -> PlanRecord:
    return plan_recipe("tabular", 2**30, **ON_8)


@pytest.mark.slow
def test_for_a_gpu_by_name_ranks_are_planned_without_any(on_8: PlanRecord) -> None:
    """Everything fits and nothing is sent for long: the plainer way to share is taken."""
    assert on_8.world == 8
    assert on_8.chosen.parallel == "ddp"
    assert {point.speed for point in on_8.frontier} == {"roofline"}
    assert on_8.chosen.plan["micro_batches"] == 1
    assert "by fsdp2 the fastest that fits is" in on_8.why
    assert on_8.command.startswith("torchrun --nproc-per-node 8 -m narrowcast train")
    assert on_8.command.endswith("--parallel ddp")
    assert [effect.choice for effect in on_8.effects] == ["ddp on 8 ranks"]
    assert on_8.batch_size == 64


@pytest.mark.slow
def test_the_record_of_ranks_comes_back_and_is_shown(on_8: PlanRecord, tmp_path: Path) -> None:
    """As --json gives it, and on a terminal."""
    words = [word for option in SMALL for word in ("--set", option)]
    result = run(
        "plan", "tabular", "--budget", "1GiB", "-p", "fp32", "--device", "h200", "--world", "8",
        *words, "--json", "-",
    )  # fmt: skip
    console = Console(width=100, file=(tmp_path / "out").open("w"), record=True)

    record = loads(PlanRecord, result.stdout)
    render_terminal(record, console)
    console.file.close()

    assert record.chosen == on_8.chosen
    assert record.frontier == on_8.frontier
    assert "8 ranks" in console.export_text()


@pytest.mark.slow
def test_a_way_that_is_asked_for_is_the_only_one() -> None:
    """--parallel restricts, and nothing is said of the other."""
    record = plan_recipe("tabular", 2**30, **ON_8 | {"parallel": "fsdp2"})

    assert {point.parallel for point in (record.chosen, *record.frontier)} == {"fsdp2"}
    assert "ddp" not in record.why


@pytest.mark.slow
def test_an_impossible_budget_names_the_least_of_a_rank_and_how_it_shares() -> None:
    """Given that much, it is met."""
    with pytest.raises(UsageError, match=r"on each of 8 ranks.*the least that fits is") as raised:
        plan_recipe("tabular", 1024, **ON_8)

    assert raised.value.message.endswith(("by ddp", "by fsdp2"))
    least = int(raised.value.message.rpartition("(")[2].split(" ")[0].replace(",", ""))
    record = plan_recipe("tabular", least, **ON_8)
    assert record.chosen.predicted_bytes <= least


@pytest.mark.slow
def test_gradients_are_not_released_and_a_batch_is_split_within_a_ranks_part() -> None:
    """Eight samples are a rank's; a gradient that was used up could not meet others."""
    planner = Planner(load_recipe("tabular", SMALL), device="h200", world=8, precisions=["fp32"])

    for way in planner.ways.values():
        assert not way.space.release
        assert way.space.micro_batches == (1, 2, 4, 8)


@pytest.mark.slow
def test_what_one_way_refuses_is_left_out_with_a_note(tmp_path: Path) -> None:
    """An optimizer that needs whole parameters has ddp; asked for fsdp2, it is the error."""
    file = tmp_path / "adafactor.py"
    file.write_text(
        f"{REGRESSION.read_text()}\n\ndef optimizer(model, options):\n"
        "    return torch.optim.Adafactor(model.parameters())\n"
    )
    asked: dict[str, Any] = {"device": "h200", "world": 2, "precisions": ["fp32"]}

    record = plan_recipe(file, 2**30, **asked)
    with pytest.raises(UsageError, match="Adafactor"):
        plan_recipe(file, 2**30, **asked, parallel="fsdp2")

    assert record.chosen.parallel == "ddp"
    assert any("left out fsdp2" in note and "Adafactor" in note for note in record.notes)


@pytest.mark.slow
def test_where_no_way_is_left_what_stands_against_it_is_the_error(tmp_path: Path) -> None:
    """Sparse embeddings under both; a recipe that reads values, as in one process."""
    text = REGRESSION.read_text()
    sparse, reads = tmp_path / "sparse.py", tmp_path / "reads.py"
    sparse.write_text(
        f"{text}\n\nclass Table(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.table = torch.nn.Embedding(50, 64, sparse=True)\n"
        "        self.head = torch.nn.Linear(64, 1)\n\n"
        "    def forward(self, x):\n"
        "        return self.head(self.table(x.abs().long().clamp(max=49)).mean(1))\n\n\n"
        "def model(options):\n    return Table()\n\n\n"
        "def optimizer(model, options):\n"
        "    return torch.optim.SGD(model.parameters(), lr=0.1)\n"
    )
    reads.write_text(
        text.replace(
            "batch\n    return (model", "batch\n    y = y if x.sum() > 0 else -y\n    return (model"
        )
    )

    with pytest.raises(UsageError, match="sparse gradients"):
        plan_recipe(sparse, 2**30, device="h200", world=2)
    with pytest.raises(RecipeError, match="_local_scalar_dense"):
        plan_recipe(reads, 2**30, device="h200", world=2)


def test_a_link_is_slower_than_memory_and_bridges_are_not_counted() -> None:
    """NVLink where the board has it, else PCIe, one way."""
    assert RATES["h200"].link_bytes_per_s == RATES["h100"].link_bytes_per_s == 450e9
    assert RATES["a6000"].link_bytes_per_s == RATES["rtx4090"].link_bytes_per_s == 32e9
    assert RATES["t4"].link_bytes_per_s == 16e9
