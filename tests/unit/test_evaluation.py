"""Metrics over an evaluation set: weighted rightly, in two precisions, without side effects."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from narrowcast.engine.engine import Engine
from narrowcast.errors import RecipeError
from narrowcast.policy import policy_named
from narrowcast.recipes.load import Recipe, load_recipe
from narrowcast.training.evaluation import evaluate_model

RECIPE = """
from dataclasses import dataclass
import torch
from torch import nn

@dataclass
class Options:
    batch_size: int = 4

def model(options):
    return nn.Sequential(nn.Linear(2, 1), nn.Dropout(0.5))

def data(options):
    x = torch.arange(20.0).reshape(10, 2)
    return list(x), list(x)

def loss(model, batch):
    return model(batch).square().mean()

def metrics(model, batch):
    METRICS
"""


def recipe_with(tmp_path: Path, metrics: str) -> Recipe:
    file = tmp_path / "mine.py"
    file.write_text(RECIPE.replace("METRICS", metrics))
    return load_recipe(file)


def engine_for(recipe: Recipe, precision: str = "fp32") -> Engine:
    model = recipe.build_model()
    return Engine(model, recipe.build_optimizer(model), policy_named(precision))


def test_the_last_smaller_batch_counts_by_its_samples(tmp_path: Path) -> None:
    """Batches of 4, 4 and 2: per-sample values and batch means give the mean over 10 samples."""
    recipe = recipe_with(
        tmp_path,
        "return {'each': batch[:, 0], 'mean': batch[:, 0].mean(), 'number': float(batch[0, 0])}",
    )
    engine = engine_for(recipe)
    _, data = recipe.load_data()
    x = torch.stack(data)
    with torch.no_grad():
        loss = engine.model.eval()(x).square().mean().item()

    (found,) = evaluate_model(recipe, engine, data, step=7)

    assert (found.step, found.precision, found.examples) == (7, "fp32", 10)
    assert found.metrics["each"] == pytest.approx(9.0)  # the mean of 0, 2, ..., 18
    assert found.metrics["mean"] == pytest.approx(9.0)
    assert found.metrics["number"] == pytest.approx((4 * 0 + 4 * 8 + 2 * 16) / 10)
    assert found.metrics["loss"] == pytest.approx(loss, rel=1e-6)


def test_the_recipes_own_metrics_come_first_and_may_be_called_loss(tmp_path: Path) -> None:
    """The first key is the primary metric; a metric named loss replaces the mean loss."""
    recipe = recipe_with(tmp_path, "return {'zeta': batch[:, 0], 'loss': batch[:, 0] * 0 + 3}")
    engine = engine_for(recipe)

    (found,) = evaluate_model(recipe, engine, recipe.load_data()[1], step=0)

    assert list(found.metrics) == ["zeta", "loss"]
    assert found.metrics["loss"] == 3.0


@pytest.mark.parametrize(
    ("precision", "labels"),
    [
        ("fp32", ["fp32"]),
        ("fp16", ["fp32", "fp16"]),
        ("bf16", ["fp32", "bf16"]),
        ("bf16-true", ["fp32", "bf16-true"]),
    ],
)
def test_each_evaluation_is_labelled_with_the_precision_it_ran_in(
    tmp_path: Path, precision: str, labels: list[str]
) -> None:
    """fp32 once; another policy in fp32 and in its own, which really differ."""
    recipe = recipe_with(tmp_path, "return {'each': model(batch)[:, 0].float()}")
    engine = engine_for(recipe, precision)

    found = evaluate_model(recipe, engine, recipe.load_data()[1], step=0)

    assert [e.precision for e in found] == labels
    assert len({e.metrics["loss"] for e in found}) == len(labels)


def test_an_evaluation_leaves_no_trace(tmp_path: Path) -> None:
    """Random states, weights and training mode are as before, whatever a metric draws."""
    recipe = recipe_with(tmp_path, "torch.rand(3); return {'each': batch[:, 0] * torch.rand(())}")
    engine = engine_for(recipe, "bf16-true")
    engine.model[1].eval()
    weights = {n: t.clone() for n, t in engine.model.state_dict().items()}
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    data = recipe.load_data()[1]

    first = evaluate_model(recipe, engine, data, step=0)
    drawn = torch.rand(3)
    second = evaluate_model(recipe, engine, data, step=0)

    assert torch.equal(drawn, expected)
    assert first == second
    assert [m.training for m in engine.model] == [True, False]
    assert all(torch.equal(t, weights[n]) for n, t in engine.model.state_dict().items())


def test_an_evaluation_that_is_asked_to_stop_gives_nothing(tmp_path: Path) -> None:
    """Half an evaluation is no evaluation."""
    recipe = recipe_with(tmp_path, "return {'each': batch[:, 0]}")
    asked = iter([False, True])

    found = evaluate_model(
        recipe, engine_for(recipe), recipe.load_data()[1], step=0, should_stop=lambda: next(asked)
    )

    assert found == ()


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        ("return {'each': batch[:1, 0]}", r"metric 'each' has shape \(1,\) for a batch of 4"),
        ("return {f'at {batch[0, 0]}': batch[:, 0]}", "for one batch and"),
    ],
    ids=["shape", "names"],
)
def test_metrics_that_do_not_add_up_are_the_recipes_error(
    tmp_path: Path, metrics: str, message: str
) -> None:
    """Another number of values than samples, or other metrics from batch to batch."""
    recipe = recipe_with(tmp_path, metrics)

    with pytest.raises(RecipeError, match=message):
        evaluate_model(recipe, engine_for(recipe), recipe.load_data()[1], step=0)
