"""Trackers follow a real training of ours: TensorBoard and CSV, also after a resumption."""

from __future__ import annotations

import csv
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from narrowcast.cli.app import main
from narrowcast.errors import UnknownName, UsageError
from narrowcast.integrations.trackers import Csv, Hook, all_of, scalars, tracker_named
from narrowcast.plan import plan_named
from narrowcast.recipes.load import load_recipe
from narrowcast.records.run import Evaluation, StepPoint, parse_metrics
from narrowcast.training.events import Event, Notice, Observer
from narrowcast.training.train import TrainOptions, train

RECIPE = str(Path(__file__).parents[1] / "small_recipe.py")
STEPS = 6


def run(folder: Path, observe: Observer, **more: Any) -> tuple[StepPoint | Evaluation, ...]:
    """Train six steps, or a part of them; returns the points of metrics.jsonl."""
    options = TrainOptions(
        steps=STEPS, evaluate_every=3, checkpoint_every=2, measure=False, watch=0
    )
    cpu = torch.device("cpu")
    plan = plan_named("bf16")
    train(load_recipe(RECIPE), plan, options, folder, device=cpu, observe=observe, **more)
    return parse_metrics((folder / "metrics.jsonl").read_text())


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_csv_holds_each_step_and_each_evaluation(tmp_path: Path) -> None:
    """The numbers of metrics.jsonl, to the last digit."""
    points = run(tmp_path, Csv())

    steps = [p for p in points if isinstance(p, StepPoint)]
    found = rows(tmp_path / "steps.csv")
    assert [(int(r["step"]), float(r["loss"])) for r in found] == [(p.step, p.loss) for p in steps]
    evaluated = {
        (p.step, p.precision, name): value
        for p in points
        if isinstance(p, Evaluation)
        for name, value in p.metrics.items()
    }
    found = rows(tmp_path / "evaluations.csv")
    assert {
        (int(r["step"]), r["precision"], r["metric"]): float(r["value"]) for r in found
    } == evaluated


def test_csv_of_a_resumed_run_is_that_of_an_uninterrupted_one(tmp_path: Path) -> None:
    """Rows beyond the checkpoint are taken again, not twice."""
    run(tmp_path / "whole", Csv())
    run(tmp_path / "halves", Csv(), stop_at=3)
    file = tmp_path / "halves" / "steps.csv"
    file.write_text(file.read_text() + "4,9,9,9,9,True,,9\r\ntorn")  # what a crash left
    run(tmp_path / "halves", Csv(), resume=True)

    def kept(folder: str, name: str) -> list[dict[str, str]]:
        found = rows(tmp_path / folder / name)
        return [{k: v for k, v in row.items() if k != "seconds"} for row in found]

    for name in ("steps.csv", "evaluations.csv"):
        assert kept("whole", name) == kept("halves", name)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of tensorboard's own making
def test_tensorboard_reads_what_was_written(tmp_path: Path) -> None:
    """TensorBoard's own reader finds each loss under its step, once after a resumption."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(tmp_path, tracker_named("tensorboard"), stop_at=3)
    points = run(tmp_path, tracker_named("tensorboard"), resume=True)

    read = EventAccumulator(str(tmp_path / "tensorboard"))
    read.Reload()
    losses = {event.step: event.value for event in read.Scalars("train/loss")}
    wanted = {p.step: p.loss for p in points if isinstance(p, StepPoint)}
    assert losses == pytest.approx(wanted, rel=2**-23)  # TensorBoard keeps fp32
    assert len(read.Scalars("train/loss")) == STEPS
    assert any("evaluation/" in tag and "(fp32)" in tag for tag in read.Tags()["scalars"])


def test_a_hook_gets_every_number(tmp_path: Path) -> None:
    """A function of step and values is all that another tracker needs; several can listen."""
    seen: dict[int, dict[str, float]] = {}
    events: list[Event] = []

    run(
        tmp_path,
        all_of(Hook(lambda step, values: seen.setdefault(step, {}).update(values)), events.append),
    )

    assert sorted(seen) == list(range(1, STEPS + 1))
    assert {"train/loss", "train/gradient norm", "train/skipped"} <= set(seen[1])
    assert any(isinstance(event, StepPoint) for event in events)


def step(**fields: Any) -> StepPoint:
    base = {"step": 1, "loss": 1.0, "loss_scale": 1.0, "seconds": 0.1, "learning_rate": 0.1}
    return StepPoint(**base | {"gradient_norm": 1.0, "applied": True} | fields)


def test_what_is_not_finite_is_told_and_what_is_not_known_left_out() -> None:
    """A NaN norm of a skipped step is a fact; of an applied one it means released gradients."""
    skipped = scalars(step(applied=False, gradient_norm=math.nan, loss=math.inf))
    released = scalars(step(gradient_norm=math.nan))

    assert math.isnan(skipped["train/gradient norm"])
    assert skipped["train/loss"] == math.inf
    assert skipped["train/skipped"] == 1.0
    assert "train/gradient norm" not in released
    assert scalars(Notice(text="")) == {}


def test_a_tracker_that_is_none_or_not_installed_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """The nearest name, or what to install."""
    with pytest.raises(UnknownName, match="did you mean 'tensorboard'"):
        tracker_named("tensorbord")

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UsageError, match="pip install tensorboard"):
        tracker_named("tensorboard")


def test_the_command_line_takes_trackers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """--track csv writes into the run directory; a name that is none is an error, exit code 2."""

    def narrowcast(*words: str) -> int:
        monkeypatch.setattr(sys, "argv", ["narrowcast", "train", RECIPE, "--precision", "fp32"])
        sys.argv += ["--steps", "2", "--no-measure", "--watch", "0", *words]
        with pytest.raises(SystemExit) as left:
            main()
        return int(left.value.code or 0)

    assert narrowcast("--output", str(tmp_path / "run"), "--track", "csv") == 0
    assert narrowcast("--output", str(tmp_path / "none"), "--track", "wandb") == 2
    assert len(rows(tmp_path / "run" / "steps.csv")) == 2
    assert "unknown tracker 'wandb'" in capsys.readouterr().err
