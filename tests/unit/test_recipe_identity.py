"""What makes a training the same one: the recipe with its helpers, and the data it sees."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from narrowcast.comparison.compare import compare, plan_comparison
from narrowcast.errors import CheckpointError, NarrowcastError, RecipeError
from narrowcast.plan import plan_named
from narrowcast.recipes.load import load_recipe
from narrowcast.training.assembly import TrainOptions, data_digest
from narrowcast.training.train import train

CPU = torch.device("cpu")

RECIPE = """
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.data import TensorDataset

from {helper} import FACTOR

@dataclass
class Options:
    batch_size: int = 4
    steps: int = 4

def model(options):
    return nn.Linear(3, 1)

def data(options):
    x = torch.load(__file__ + ".pt")
    return TensorDataset(x), TensorDataset(x)

def loss(model, batch):
    return FACTOR * model(batch[0]).square().mean()

def metrics(model, batch):
    return {{"size": model(batch[0]).abs().squeeze(1)}}

HIGHER_IS_BETTER = {{"size": False}}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    helper = f"helper_of_{tmp_path.name}"
    path = tmp_path / "own.py"
    path.write_text(RECIPE.format(helper=helper))
    (tmp_path / f"{helper}.py").write_text("FACTOR = 1.0\n")
    write_data(path, 1.0)
    return path


def write_data(path: Path, value: float) -> None:
    torch.save(torch.full((8, 3), value), f"{path}.pt")


def edit_helper(path: Path) -> None:
    (helper,) = path.parent.glob("helper_of_*.py")
    helper.write_text("FACTOR = 1.0 + 1.0\n")


def begin(path: Path, out: Path, *, resume: bool = False) -> None:
    train(
        load_recipe(path),
        plan_named("fp32"),
        TrainOptions(measure=False),
        out,
        device=CPU,
        resume=resume,
        stop_at=None if resume else 2,
    )


def test_a_helper_is_part_of_the_recipe(recipe: Path) -> None:
    """Loading twice gives one hash; editing an imported neighbour gives another, and its values."""
    first, again = load_recipe(recipe), load_recipe(recipe)
    edit_helper(recipe)
    edited = load_recipe(recipe)

    assert first.source_hash == again.source_hash != edited.source_hash
    assert (first.module.FACTOR, edited.module.FACTOR) == (1.0, 2.0)


def test_a_run_does_not_resume_with_an_edited_helper(recipe: Path, tmp_path: Path) -> None:
    """Half of a training with one helper and half with another is no training."""
    begin(recipe, tmp_path / "out")
    edit_helper(recipe)

    with pytest.raises(CheckpointError, match="recipe source"):
        begin(recipe, tmp_path / "out", resume=True)


def test_a_run_does_not_resume_with_other_data(recipe: Path, tmp_path: Path) -> None:
    """The same code that reads another file is another training."""
    begin(recipe, tmp_path / "out")
    write_data(recipe, 2.0)

    with pytest.raises(CheckpointError, match="data"):
        begin(recipe, tmp_path / "out", resume=True)


@pytest.mark.parametrize("edit", [edit_helper, lambda path: write_data(path, 2.0)])
def test_a_comparison_does_not_go_on_with_another_training(
    recipe: Path, tmp_path: Path, edit: object
) -> None:
    """Helpers and data are part of the protocol."""
    plans = [plan_named("bf16")]
    compare(plan_comparison(load_recipe(recipe), plans, seeds=1, device=CPU), tmp_path / "out")
    edit(recipe)  # type: ignore[operator]

    with pytest.raises(NarrowcastError, match="under another protocol"):
        compare(plan_comparison(load_recipe(recipe), plans, seeds=1, device=CPU), tmp_path / "out")


def test_the_hash_of_the_data_follows_from_the_seed(recipe: Path) -> None:
    """It neither draws from the caller's random numbers nor changes when asked again."""
    loaded, before = load_recipe(recipe), torch.get_rng_state()

    assert data_digest(loaded, 3) == data_digest(loaded, 3)
    assert torch.equal(torch.get_rng_state(), before)


def test_data_that_change_with_each_call_are_refused(recipe: Path) -> None:
    """Arms that see other data cannot be compared, and the recipe is told why."""
    text = recipe.read_text().replace(
        'torch.load(__file__ + ".pt")',
        "torch.randn(8, 3, generator=torch.Generator().manual_seed(torch.Generator().seed()))",
    )
    recipe.write_text(text)

    with pytest.raises(RecipeError, match="other data each time"):
        plan_comparison(load_recipe(recipe), [plan_named("bf16")], seeds=1, device=CPU)
