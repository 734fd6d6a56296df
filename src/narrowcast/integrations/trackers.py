"""Experiment trackers, as observers of a training's events: TensorBoard, CSV, and any other.

    observe=TensorBoard()
    observe=Hook(lambda step, values: wandb.log(values, step=step))

A run directory holds ``metrics.jsonl`` in any case; these are for the tools that read other forms.
They write into the run directory, and after a resumption go on where the checkpoint stands.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from narrowcast.errors import UnknownName
from narrowcast.files import write_atomically
from narrowcast.integrations.hosts import host_module
from narrowcast.records.run import Evaluation, StepPoint
from narrowcast.training.events import Ended, Event, Observer, Started

__all__ = ["TRACKERS", "Csv", "Hook", "TensorBoard", "all_of", "scalars", "tracker_named"]


def scalars(event: Event) -> dict[str, float]:
    """Return the numbers of a step or an evaluation by name; {} for other events.

    What is not known (the norm of released gradients) is left out; what is not finite is not.
    """
    if isinstance(event, StepPoint):
        numbers = {
            "train/loss": event.loss,
            "train/learning rate": event.learning_rate,
            "train/loss scale": event.loss_scale,
            "train/skipped": float(not event.applied),
            "train/seconds": event.seconds,
        }
        if not (event.applied and math.isnan(event.gradient_norm)):
            numbers["train/gradient norm"] = event.gradient_norm
        return numbers
    if isinstance(event, Evaluation):
        return {f"evaluation/{name} ({event.precision})": x for name, x in event.metrics.items()}
    return {}


class Hook:
    """Hands every step's and every evaluation's numbers to a function of yours."""

    def __init__(self, log: Callable[[int, dict[str, float]], object]) -> None:
        self._log = log

    def __call__(self, event: Event) -> None:
        if isinstance(event, StepPoint | Evaluation):
            self._log(event.step, scalars(event))


class TensorBoard:
    """Writes scalars for TensorBoard into ``tensorboard/`` of the run directory, or `directory`."""

    def __init__(self, directory: Path | None = None) -> None:
        host = host_module("torch.utils.tensorboard", package="tensorboard")
        self._make: Callable[..., Any] = host.SummaryWriter
        self._directory = directory
        self._writer: Any = None

    def __call__(self, event: Event) -> None:
        if isinstance(event, Started):
            folder = self._directory or event.directory / "tensorboard"
            # What was written after the checkpoint that the run goes on from is taken again.
            self._writer = self._make(str(folder), purge_step=event.step + 1)
            self._writer.add_text("run", f"{event.record.recipe}, {event.record.precision}")
        elif isinstance(event, StepPoint | Evaluation):
            for name, number in scalars(event).items():
                self._writer.add_scalar(name, number, event.step)
        elif isinstance(event, Ended) and self._writer is not None:
            self._writer.close()


_COLUMNS = {
    "steps.csv": (
        "step",
        "loss",
        "learning_rate",
        "loss_scale",
        "gradient_norm",
        "applied",
        "reason",
        "seconds",
    ),
    "evaluations.csv": ("step", "precision", "metric", "value", "examples"),
}


class Csv:
    """Writes ``steps.csv`` and ``evaluations.csv`` into the run directory, or `directory`.

    A row a step with the fields of a StepPoint; a row for each metric of each evaluation.
    """

    def __init__(self, directory: Path | None = None) -> None:
        self._directory = directory
        self._files: dict[str, TextIO] = {}

    def __call__(self, event: Event) -> None:
        if isinstance(event, Started):
            folder = self._directory or event.directory
            folder.mkdir(parents=True, exist_ok=True)
            for name, columns in _COLUMNS.items():
                _begin(folder / name, columns, until=event.step)
                self._files[name] = (folder / name).open("a", newline="")
        elif isinstance(event, StepPoint):
            columns = _COLUMNS["steps.csv"]
            self._write("steps.csv", [getattr(event, column) for column in columns])
        elif isinstance(event, Evaluation):
            for metric, value in event.metrics.items():
                row = [event.step, event.precision, metric, value, event.examples]
                self._write("evaluations.csv", row)
        elif isinstance(event, Ended):
            for file in self._files.values():
                file.close()

    def _write(self, name: str, row: list[Any]) -> None:
        file = self._files[name]
        csv.writer(file).writerow(row)
        file.flush()


def _begin(path: Path, columns: tuple[str, ...], *, until: int) -> None:
    """Begin a file, or cut one back to the step that the run goes on from."""
    kept = []
    if path.exists():
        with path.open(newline="") as file:
            kept = [row for row in csv.reader(file) if row and row[0].isdecimal()]
    text = io.StringIO()
    rows = csv.writer(text)
    rows.writerow(columns)
    rows.writerows(row for row in kept if int(row[0]) <= until and len(row) == len(columns))
    write_atomically(path, text.getvalue())


TRACKERS: dict[str, Callable[[], Observer]] = {"csv": Csv, "tensorboard": TensorBoard}


def tracker_named(name: str) -> Observer:
    """Return a tracker that writes into the run directory.

    Raises UnknownName, and UsageError for one whose package is missing.
    """
    if name not in TRACKERS:
        raise UnknownName.of("tracker", name, TRACKERS)
    return TRACKERS[name]()


def all_of(*observers: Observer) -> Observer:
    """Return an observer that tells every event to each of these, in order."""

    def observe(event: Event) -> None:
        for one in observers:
            one(event)

    return observe
