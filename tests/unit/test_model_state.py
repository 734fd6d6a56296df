"""Buffers that a forward pass makes, resizes or drops: such a run can be resumed and evaluated."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from narrowcast.errors import CheckpointError
from narrowcast.plan import plan_named
from narrowcast.recipes.load import load_recipe
from narrowcast.records.run import RunRecord
from narrowcast.training import checkpoint
from narrowcast.training.evaluation import evaluate_weights
from narrowcast.training.model_state import load_model_state, model_state
from narrowcast.training.run_directory import RunDirectory
from narrowcast.training.train import TrainOptions, train

# Whole trainings or traces: left out of `make check`.
pytestmark = pytest.mark.slow

SMALL = Path(__file__).parents[1] / "small_recipe.py"
CPU = torch.device("cpu")

FORWARDS = {
    "made": "if not hasattr(self, 'cache'):\n"
    "            self.register_buffer('cache', torch.full((6,), 1.5), persistent=PERSISTENT)",
    "grown": "self.cache = torch.cat([self.cache, self.cache[:1]])",
    "dropped": "self.cache = None if self.cache is None or len(self.cache) > 1 else self.cache",
}


def recipe_that(tmp_path: Path, forward: str, *, persistent: bool) -> Path:
    """Write the small recipe with a model whose forward pass treats a buffer in some way."""
    declared = f"        self.register_buffer('cache', torch.ones(2), persistent={persistent})\n"
    body = FORWARDS[forward].replace("PERSISTENT", str(persistent))
    text = SMALL.read_text().replace(
        '        self.register_buffer("seen"',
        f'{"" if forward == "made" else declared}        self.register_buffer("seen"',
    )
    file = tmp_path / f"{forward}.py"
    file.write_text(
        text.replace(
            "        return self.layers(x)",
            f"        {body}\n"
            "        mean = 1.0 if self.cache is None else self.cache.float().mean()\n"
            "        return self.layers(x * mean)",
        )
    )
    return file


def run(recipe: Path, directory: Path, precision: str, **named: object) -> RunRecord:
    return train(
        load_recipe(recipe),
        plan_named(precision),
        TrainOptions(measure=False),
        directory,
        device=CPU,
        **named,  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("persistent", [True, False])
@pytest.mark.parametrize("forward", list(FORWARDS))
@pytest.mark.parametrize("precision", ["bf16", "bf16-true"])
def test_a_resumed_run_has_the_buffers_of_the_forward_pass(
    tmp_path: Path, forward: str, persistent: bool, precision: str
) -> None:
    """Made, grown or dropped, in the state dict or not: stopped and resumed, the same weights."""
    recipe = recipe_that(tmp_path, forward, persistent=persistent)
    whole = run(recipe, tmp_path / "whole", precision)

    run(recipe, tmp_path / "cut", precision, stop_at=5)
    record = run(recipe, tmp_path / "cut", precision, resume=True)

    assert record.resumed_at == (5,)
    assert record.evaluations == whole.evaluations
    weights, same = (checkpoint.load_latest(tmp_path / d / "checkpoints") for d in ("whole", "cut"))
    assert weights["model"].keys() == same["model"].keys()
    assert all(torch.equal(w, same["model"][n]) for n, w in weights["model"].items())
    assert weights["buffers"].keys() == same["buffers"].keys()


@pytest.mark.parametrize("persistent", [True, False])
@pytest.mark.parametrize("forward", ["made", "grown"])
def test_exported_weights_with_such_buffers_are_evaluated(
    tmp_path: Path, forward: str, persistent: bool
) -> None:
    """A buffer of the state dict comes from the file, which is said; another is made again."""
    recipe = recipe_that(tmp_path, forward, persistent=persistent)
    run(recipe, tmp_path / "run", "bf16")

    record = evaluate_weights(
        load_recipe(recipe),
        plan_named("bf16"),
        RunDirectory(tmp_path / "run").weights_path,
        device=CPU,
    )

    said = ("buffers that a forward pass made or resized are from the file: cache",)
    assert record.warnings == (said if persistent else ())


def test_weights_that_are_no_buffers_are_never_made_up(tmp_path: Path) -> None:
    """A parameter that the model lacks is an error, as ever."""
    model = nn.Linear(2, 2, bias=False)
    saved = model_state(nn.Linear(2, 2))

    with pytest.raises(CheckpointError, match="bias"):
        load_model_state(model, saved, CPU)


def test_a_buffer_without_a_module_is_an_error() -> None:
    """It names both; so does one whose name is taken by something else."""
    saved = model_state(nn.Sequential(nn.BatchNorm1d(2, affine=False)))
    other = nn.Linear(2, 2)
    other.cache = 3  # type: ignore[assignment]
    taken = {"model": other.state_dict(), "buffers": {"cache": torch.ones(1)}, "persistent": []}

    with pytest.raises(CheckpointError, match=r"a buffer 0\.running_mean"):
        load_model_state(nn.Linear(2, 2), saved, CPU)
    with pytest.raises(CheckpointError, match="something else there"):
        load_model_state(other, taken, CPU)


def test_buffers_come_back_bit_for_bit_in_their_own_dtype() -> None:
    """Also one whose dtype the forward pass changed, an empty one, and None."""
    kept = nn.Module()
    kept.register_buffer("wide", torch.rand(3, dtype=torch.float64))
    kept.register_buffer("empty", torch.ones(0), persistent=False)
    kept.register_buffer("none", None)
    fresh = nn.Module()
    fresh.register_buffer("wide", torch.zeros(3))
    fresh.register_buffer("none", torch.ones(1))
    fresh.register_buffer("extra", torch.ones(1))

    load_model_state(fresh, model_state(kept), CPU)

    assert torch.equal(fresh.wide, kept.wide)
    assert fresh.wide.dtype is torch.float64
    assert (fresh.empty.shape, fresh.none) == ((0,), None)
    assert "empty" in fresh._non_persistent_buffers_set
    assert not hasattr(fresh, "extra")


EXTRA = """
    def get_extra_state(self):
        return {"calls": 3}

    def set_extra_state(self, state):
        assert state == {"calls": 3}

    def forward(self, x):"""


def test_extra_state_that_no_export_can_hold_is_said(tmp_path: Path) -> None:
    """The weights are evaluated with the model's own, and the record tells that it is so."""
    file = tmp_path / "extra.py"
    file.write_text(SMALL.read_text().replace("\n    def forward(self, x):", EXTRA))
    recipe = load_recipe(file)
    record = run(file, tmp_path / "run", "fp32")
    place = RunDirectory(tmp_path / "run")

    exported = evaluate_weights(recipe, plan_named("fp32"), place.weights_path, device=CPU)
    newest = checkpoint.checkpoints_in(place.checkpoints)[-1]
    stored = evaluate_weights(recipe, plan_named("fp32"), newest, device=CPU)

    assert exported.evaluations[0].metrics == record.evaluations[0].metrics
    assert [text.partition(" is as built")[0] for text in exported.warnings] == ["_extra_state"]
    assert stored.warnings == ()
