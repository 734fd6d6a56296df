"""`narrowcast compare`: a training in several precisions, judged by a protocol fixed beforehand."""

from __future__ import annotations

import shlex
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, cast

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from narrowcast.cli.common import (
    AutocastRulesOption,
    DeterministicOption,
    DeviceOption,
    JsonOption,
    OutputOption,
    RecipeArgument,
    SetOption,
    StepsOption,
    console,
    emit_json,
    result_console,
    split_names,
)
from narrowcast.cli.precision import plan_called
from narrowcast.errors import PrecisionError, UnknownName, UsageError
from narrowcast.units import format_duration

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import torch

    from narrowcast.comparison.compare import PlannedComparison
    from narrowcast.comparison.study import Assignment, ComparisonEvent
    from narrowcast.plan import Plan
    from narrowcast.policy import AutocastRules
    from narrowcast.records.run import RunRecord

__all__ = ["compare", "register"]


def register(app: typer.Typer) -> None:
    """Add the verb to the command line."""
    app.command(name="compare")(compare)


PrecisionsOption = Annotated[
    str,
    typer.Option(
        "--precisions",
        "-p",
        metavar="P,P,...",
        help="fp32, against which all are judged, and others.",
    ),
]
SeedsOption = Annotated[
    int, typer.Option("--seeds", help="How many seeds; which ones follows from the recipe.")
]
MarginOption = Annotated[
    str | None,
    typer.Option(
        "--margin",
        metavar="0.01|1%",
        help="Largest acceptable harm, in the metric's units or relative to fp32's mean. "
        "Without it no verdict is given.",
    ),
]
MetricOption = Annotated[
    str | None,
    typer.Option("--metric", help="What decides; by default the recipe's first metric."),
]


def compare(
    recipe: RecipeArgument,
    precisions: PrecisionsOption = "fp32,fp16,bf16",
    seeds: SeedsOption = 5,
    margin: MarginOption = None,
    metric: MetricOption = None,
    steps: StepsOption = None,
    overrides: SetOption = None,
    device: DeviceOption = None,
    autocast_rules: AutocastRulesOption = "native",
    deterministic: DeterministicOption = True,
    output: OutputOption = None,
    json: JsonOption = None,
) -> None:
    """Train in several precisions on the same seeds, and say what the results allow to be said.

    The protocol is hashed before the first step; the same command goes on after an interruption.
    """
    from narrowcast.comparison.compare import compare as run
    from narrowcast.comparison.compare import default_directory, plan_comparison
    from narrowcast.precision.device import device_at_hand
    from narrowcast.recipes.load import load_recipe
    from narrowcast.report.html import write_html
    from narrowcast.report.terminal import render_summary

    place = device_at_hand(device)
    planned = plan_comparison(
        load_recipe(recipe, overrides or ()),
        _plans(split_names(precisions), place, autocast_rules),
        seeds=seeds,
        device=place,
        margin=margin,
        metric=metric,
        steps=steps,
        deterministic=deterministic,
    )
    directory = output or default_directory(planned)
    with _watching(planned, directory) as watch:
        record = run(
            planned, directory, observe=watch, command=shlex.join(["narrowcast", *sys.argv[1:]])
        )
    report = directory / "report.html"
    write_html(record, report)
    # The verdict itself is what was asked for: to stdout, unless JSON is to stand there.
    render_summary(record, result_console(json))
    emit_json(record, json)
    _say(console(), f"report: {report} (in the terminal: narrowcast report {directory})")


def _plans(names: tuple[str, ...], device: torch.device, rules: str) -> list[Plan]:
    """Resolve the names that a user typed; `rules` hold for every precision that autocasts."""
    if rules not in ("native", "cuda"):
        raise UnknownName.of("set of autocast rules", rules, ("native", "cuda"))
    plans: list[Plan] = []
    for name in names:
        plan, why = plan_called(name, device)
        if name == "auto" and plan.name in (p.name for p in plans):
            raise UsageError(
                f"auto chooses {plan.name} here, which is named as well: {why}",
                hint="leave out auto, or name the precisions yourself",
            )
        if plan.policy.autocasts:
            policy = replace(plan.policy, autocast_rules=cast("AutocastRules", rules))
            plan = replace(plan, policy=policy)
        plans.append(plan)
    return plans


class _Watch:
    """Follows a comparison: which run is under way, how fast, and how long the rest will take.

    All runs count alike, by their steps, since every seed goes through all precisions in turn.
    """

    def __init__(self, planned: PlannedComparison, shown: Progress) -> None:
        self.shown = shown
        self.steps = planned.protocol.steps
        self.began: float | None = None
        """When this call itself ended its first step: what came before says nothing of the rate."""
        self.steps_now = 0
        """Steps taken since then."""
        self.position = 0
        self.ended = 0
        self.runs = 0
        self.said = set(planned.notes)
        self.failures: dict[tuple[str, str], int] = {}
        """The first seed on which an arm failed for a reason."""
        self.task: TaskID | None = None

    def __call__(self, event: ComparisonEvent) -> None:
        from narrowcast.comparison.study import RunBegins, RunEnds
        from narrowcast.records.run import StepPoint
        from narrowcast.training.events import Notice, Started

        match event:
            case RunBegins():
                self._begin(event.index, event.total, event.assignment.arm)
            case Started():
                self.position = (self.ended * self.steps) + event.step
            case StepPoint():
                self.position += 1
                if self.began is None:
                    self.began = time.monotonic()
                else:
                    self.steps_now += 1
                self._update()
            case Notice():
                self._note(event.text)
            case RunEnds():
                self.ended += 1
                self.position = self.ended * self.steps
                self._update()
                if event.record.status == "failed":
                    self._failed(event.assignment, event.record)
            case _:
                pass

    def _begin(self, index: int, total: int, arm: str) -> None:
        self.runs = total
        what = f"run {index} of {total}: {arm}"
        if self.task is None:
            self.task = self.shown.add_task(what, total=total * self.steps, rate="", left="")
        self.shown.update(self.task, description=what)

    def _update(self) -> None:
        if self.task is None:
            return
        elapsed = 0.0 if self.began is None else time.monotonic() - self.began
        speed = self.steps_now / elapsed if elapsed > 0 else 0.0
        rest = self.runs * self.steps - self.position
        rate = f"{speed:.3g} steps/s" if speed else ""
        left = f"{format_duration(rest / speed)} left" if speed and rest else ""
        self.shown.update(self.task, completed=self.position, rate=rate, left=left)

    def _failed(self, assignment: Assignment, record: RunRecord) -> None:
        """Tell a failure with its hint; on further seeds, that it was the same."""
        how = "diverged" if record.failure_kind == PrecisionError.__name__ else "failed"
        what = f"{assignment.arm} {how} on seed {assignment.seed}"
        first = self.failures.setdefault((assignment.arm, record.failure), assignment.seed)
        if first != assignment.seed:
            self._note(f"{what} as on seed {first}")
            return
        self._note(f"{what}: {record.failure}")
        if record.failure_hint:
            _say(self.shown.console, f"hint: {record.failure_hint}")

    def _note(self, text: str) -> None:
        if text in self.said:
            return
        self.said.add(text)
        _say(self.shown.console, f"note: {text}")


@contextmanager
def _watching(planned: PlannedComparison, directory: Path) -> Iterator[_Watch]:
    """Show live progress on a terminal, and say how to go on after Ctrl-C."""
    out = console()
    for note in planned.notes:
        _say(out, f"note: {note}")
    shown = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}", markup=False),
        TextColumn("{task.fields[left]}", markup=False),
        console=out if out.is_terminal else Console(quiet=True),
        disable=not out.is_terminal,
        transient=True,
    )
    watch = _Watch(planned, shown)
    try:
        with shown:
            yield watch
    except KeyboardInterrupt:
        _say(
            out,
            f"interrupted: {watch.ended} of {watch.runs} runs in {directory} have ended; "
            "the same command goes on with the rest",
        )
        raise typer.Exit(130) from None


def _say(out: Console, text: str) -> None:
    """Print one line as it is: paths and the recipes' own words are no markup."""
    out.print(text, markup=False, highlight=False, soft_wrap=True)
