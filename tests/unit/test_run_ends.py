"""How a run ends badly, or for the second time: the record tells, and the hints lead out."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from narrowcast.errors import PrecisionError, RecipeError, RunDirectoryError
from narrowcast.plan import plan_named
from narrowcast.recipes.load import load_recipe
from narrowcast.records.run import RunRecord
from narrowcast.training import checkpoint
from narrowcast.training.events import Ended, Event, Hearing, Saved
from narrowcast.training.run_directory import RunDirectory
from narrowcast.training.train import TrainOptions, train

SMALL = Path(__file__).parents[1] / "small_recipe.py"
LOSS = "    return F.cross_entropy(model(x), y)\n"
SCHEDULER = "    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)\n"
OPTIMIZER = "    return torch.optim.AdamW(model.parameters(), lr=options.lr)\n"


def run(directory: Path, recipe: Path = SMALL, *, seed: int = 0, **named: Any) -> RunRecord:
    return train(
        load_recipe(recipe),
        plan_named("fp32"),
        TrainOptions(measure=False, seed=seed),
        directory,
        device=torch.device("cpu"),
        **named,
    )


def changed(tmp_path: Path, old: str, new: str, more: str = "") -> Path:
    """Return a copy of the small recipe with a part replaced and text added."""
    file = tmp_path / "changed.py"
    text = SMALL.read_text()
    assert old in text
    file.write_text(text.replace(old, new) + more)
    return file


def fill_disk(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a run fail at its first checkpoint."""

    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", refuse)
        with pytest.raises(RunDirectoryError, match="No space left"):
            run(directory)


def test_a_disk_full_at_the_first_checkpoint_is_no_dead_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without --resume the hint names it, and with it the run begins again and says so."""
    fill_disk(tmp_path / "run", monkeypatch)

    with pytest.raises(RunDirectoryError) as caught:
        run(tmp_path / "run")
    record = run(tmp_path / "run", resume=True)

    assert "begin it with --resume" in caught.value.hint
    assert record.status == "finished"
    assert "nothing to resume" in record.warnings[0]


def test_only_the_same_run_begins_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another seed is told what differs, and to go elsewhere."""
    fill_disk(tmp_path / "run", monkeypatch)

    with pytest.raises(RunDirectoryError, match="took no step: seed differ") as caught:
        run(tmp_path / "run", seed=1, resume=True)

    assert "--output" in caught.value.hint
    assert RunDirectory(tmp_path / "run").read_record().status == "failed"


def test_resuming_a_finished_run_changes_no_file(tmp_path: Path) -> None:
    """Not a byte of what it left, nor the time of a file."""

    def state() -> dict[str, tuple[bytes, int]]:
        files = [p for p in (tmp_path / "run").rglob("*") if p.is_file() and p.name != ".lock"]
        return {str(p): (p.read_bytes(), p.stat().st_mtime_ns) for p in files}

    first = run(tmp_path / "run")
    before = state()

    second = run(tmp_path / "run", resume=True)

    assert second == first
    assert second.resumed_at == ()
    assert state() == before


def test_a_finished_run_without_its_weights_gets_them_again(tmp_path: Path) -> None:
    """The last checkpoint has them."""
    run(tmp_path / "run")
    weights = tmp_path / "run/weights.safetensors"
    before = weights.read_bytes()
    weights.unlink()

    run(tmp_path / "run", resume=True)

    assert weights.read_bytes() == before


def test_a_final_metric_that_is_nan_is_said(tmp_path: Path) -> None:
    """The steps were taken, so the run is finished; its warnings name the metric."""
    old = "(model(x).argmax(-1) == y).float()"
    recipe = changed(tmp_path, old, f"{old} * float('nan')")

    record = run(tmp_path / "run", recipe)

    assert record.status == "finished"
    assert any("accuracy = nan" in text for text in record.warnings)


def test_the_step_with_which_a_run_gives_up_is_counted(tmp_path: Path) -> None:
    """No more skipped steps than steps, and metrics.jsonl has the last one too."""
    recipe = changed(tmp_path, LOSS, LOSS.rstrip("\n") + " * float('nan')\n")

    with pytest.raises(PrecisionError):
        run(tmp_path / "run", recipe)

    place = RunDirectory(tmp_path / "run")
    record, points = place.read_record(), place.read_metrics()
    assert (record.status, record.failure_kind) == ("failed", "PrecisionError")
    assert record.skipped_steps == record.completed_steps == len(points) == 8
    assert points[-1].kind == "step"
    assert (points[-1].applied, points[-1].reason) == (False, "non-finite loss")


@pytest.mark.parametrize("moment", ["export", "end"])
def test_ctrl_c_while_a_run_is_being_ended_is_handed_on(tmp_path: Path, moment: str) -> None:
    """The run is finished; whoever would train another one hears that somebody asked to stop."""
    heard = Hearing(lambda _: None)

    def observe(event: Event) -> None:
        if isinstance(event, Saved) and event.step == 12 and moment == "export":
            os.kill(os.getpid(), signal.SIGINT)
        if isinstance(event, Ended) and moment == "end":
            os.kill(os.getpid(), signal.SIGINT)
        heard(event)

    if moment == "end":
        with pytest.raises(KeyboardInterrupt):  # as always: nobody has taken the signal over
            run(tmp_path / "run", observe=observe)
    else:
        run(tmp_path / "run", observe=observe)

    assert heard.stop_asked == (moment == "export")
    assert RunDirectory(tmp_path / "run").read_record().status == "finished"


def test_writes_of_the_model_in_evaluation_are_noticed_once(tmp_path: Path) -> None:
    """nn.Embedding(max_norm=...) in bf16-true: the run ends well, and its record tells."""
    recipe = changed(
        tmp_path,
        "    return Net(options.width)",
        "    return Renormed(options.width)",
        "\n\nclass Renormed(Net):\n"
        "    def __init__(self, width):\n        super().__init__(width)\n"
        "        self.embedding = nn.Embedding(4, 6, max_norm=0.5)\n\n"
        "    def forward(self, x):\n"
        "        return super().forward(x + self.embedding((x[:, 0] > 0).long()))\n",
    )

    record = train(
        load_recipe(recipe),
        plan_named("bf16-true"),
        TrainOptions(measure=False, evaluate_every=4),
        tmp_path / "run",
        device=torch.device("cpu"),
    )

    said = [text for text in record.warnings if "forward pass writes embedding.weight" in text]
    assert (record.status, len(said)) == ("finished", 1)


def test_a_scheduler_that_raises_is_the_recipes_error(tmp_path: Path) -> None:
    """OneCycleLR made for too few steps; the step before was applied, and is counted."""
    recipe = changed(
        tmp_path,
        SCHEDULER,
        "    return torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=5)\n",
    )

    with pytest.raises(RecipeError, match="optimizer and scheduler raised ValueError"):
        run(tmp_path / "run", recipe)

    assert RunDirectory(tmp_path / "run").read_record().applied_steps == 6


def test_an_optimizer_that_raises_is_the_recipes_error(tmp_path: Path) -> None:
    """With the user's own line."""
    recipe = changed(
        tmp_path,
        OPTIMIZER,
        "    return Broken(model.parameters(), lr=options.lr)\n",
        "\n\nclass Broken(torch.optim.SGD):\n"
        "    def step(self, closure=None):\n        raise KeyError('momentum')\n",
    )

    with pytest.raises(RecipeError, match="raise KeyError"):
        run(tmp_path / "run", recipe)


def test_a_backward_that_raises_is_the_recipes_error(tmp_path: Path) -> None:
    """A custom autograd function is the user's code too."""
    recipe = changed(
        tmp_path,
        LOSS,
        "    return Broken.apply(F.cross_entropy(model(x), y))\n",
        "\n\nclass Broken(torch.autograd.Function):\n"
        "    @staticmethod\n    def forward(ctx, x):\n        return x.clone()\n\n"
        "    @staticmethod\n    def backward(ctx, gradient):\n"
        "        raise IndexError('no such axis')\n",
    )

    with pytest.raises(RecipeError, match="the backward pass raised IndexError: no such axis"):
        run(tmp_path / "run", recipe)
