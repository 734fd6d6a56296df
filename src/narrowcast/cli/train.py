"""`narrowcast train`: one training in one precision, followed live, saved, and resumable."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Column

from narrowcast.cli.common import (
    RUNS,
    AutocastRulesOption,
    DeterministicOption,
    DeviceOption,
    JsonOption,
    OutputOption,
    PrecisionOption,
    RecipeArgument,
    SeedOption,
    SetOption,
    StepsOption,
    console,
    emit_json,
    result_console,
)
from narrowcast.cli.plan import BudgetOption, Limit, PlanOption, limit_of, planned
from narrowcast.cli.precision import KeepOption, PolicyOption, asked, chosen_plan
from narrowcast.cli.ranks import ParallelOption, Rank, ranks
from narrowcast.units import format_duration

if TYPE_CHECKING:
    import torch

    from narrowcast.recipes.load import Recipe
    from narrowcast.records.run import Evaluation, RunRecord, StepPoint
    from narrowcast.training.events import Event, Started

__all__ = ["Watch", "register", "train", "watching"]


def register(app: typer.Typer) -> None:
    """Add the verb to the command line."""
    app.command(name="train")(train)


AccumulateOption = Annotated[
    int, typer.Option("--accumulate", metavar="N", help="Micro-batches that make one step.")
]
ClipOption = Annotated[
    float | None,
    typer.Option("--clip-norm", help="Limit the L2 norm of the unscaled gradients to this."),
]
ResumeOption = Annotated[
    bool,
    typer.Option("--resume", help="Go on from the last checkpoint, bit for bit; or begin."),
]
CheckpointOption = Annotated[
    int | None,
    typer.Option(
        "--checkpoint-every", metavar="N", help="Steps between checkpoints; by default a tenth."
    ),
]
EvaluateOption = Annotated[
    int | None,
    typer.Option(
        "--evaluate-every", metavar="N", help="Steps between evaluations; by default only the end."
    ),
]
MeasureOption = Annotated[
    bool,
    typer.Option(
        "--measure/--no-measure",
        help="Measure memory, executed dtypes and what the device does badly, on early steps.",
    ),
]
WatchOption = Annotated[
    int,
    typer.Option(
        "--watch",
        metavar="N",
        help="Look at the values at module borders every N steps, and say where a run that gives "
        "up went wrong; 0: do not.",
    ),
]

CompileOption = Annotated[
    bool,
    typer.Option("--compile", help="Compile the model's calls with torch.compile (inductor)."),
]
ShadowOption = Annotated[
    bool,
    typer.Option(
        "--shadow",
        help="At each look of the watch, compute the loss in fp32 too, and tell if it is another.",
    ),
]

TrackOption = Annotated[
    list[str] | None,
    typer.Option(
        "--track",
        metavar="NAME",
        help="Also write for a tracker, into the run directory: tensorboard, csv. May be repeated.",
    ),
]


def train(
    recipe: RecipeArgument,
    precision: PrecisionOption = "auto",
    policy: PolicyOption = None,
    plan: PlanOption = None,
    budget: BudgetOption = None,
    overrides: SetOption = None,
    steps: StepsOption = None,
    seed: SeedOption = 0,
    accumulate: AccumulateOption = 1,
    clip_norm: ClipOption = None,
    keep_fp32: KeepOption = None,
    device: DeviceOption = None,
    autocast_rules: AutocastRulesOption = "native",
    output: OutputOption = None,
    resume: ResumeOption = False,
    checkpoint_every: CheckpointOption = None,
    evaluate_every: EvaluateOption = None,
    measure: MeasureOption = True,
    watch: WatchOption = 100,
    shadow: ShadowOption = False,
    compiled: CompileOption = False,
    deterministic: DeterministicOption = True,
    parallel: ParallelOption = None,
    track: TrackOption = None,
    json: JsonOption = None,
) -> None:
    """Train a recipe in one precision. Ctrl-C ends the run cleanly; --resume goes on exactly."""
    with ranks(parallel, budget=budget) as rank:
        from narrowcast.training.train import TrainOptions

        options = TrainOptions(
            steps=steps,
            seed=seed,
            accumulate=accumulate,
            clip_norm=clip_norm,
            evaluate_every=evaluate_every,
            checkpoint_every=checkpoint_every,
            measure=measure,
            watch=watch,
            shadow=shadow,
            compile="inductor" if compiled else "",
            deterministic=deterministic,
        )
        place, loaded = _at_hand(rank.device_name(device), recipe, overrides)
        named = asked(precision, policy)
        chosen = planned(
            recipe,
            overrides,
            file=plan,
            budget=budget,
            device=device,
            release=clip_norm is None and accumulate == 1,
            others=_typed(precision, policy, keep_fp32, autocast_rules, resume and budget),
        ) or chosen_plan(named, place, rules=autocast_rules, keep_fp32=keep_fp32)
        limit = limit_of(loaded, place, rank.together, plan or named, budget, accumulate=accumulate)
        where = partial(_default_directory, loaded.name, chosen.name, seed, resume=resume)
        parts = (loaded, chosen, options, directory := output or rank.directory(where))
        record = _followed(rank, track, *parts, device=place, resume=resume, limit=limit)
    _finish(record, directory, json, is_main=rank.is_main)


def _at_hand(
    device: str | None, recipe: str, overrides: list[str] | None
) -> tuple[torch.device, Recipe]:
    """Return the device and the recipe that are asked for."""
    from narrowcast.precision.device import device_at_hand
    from narrowcast.recipes.load import load_recipe

    return device_at_hand(device), load_recipe(recipe, overrides or ())


def _followed(
    rank: Rank,
    track: list[str] | None,
    *parts: Any,
    device: torch.device,
    resume: bool,
    limit: Limit,
) -> RunRecord:
    """Train what the parts say, and show how it goes; on other ranks than 0 in silence."""
    from narrowcast.integrations.trackers import all_of, tracker_named
    from narrowcast.plan_files import naming_differences
    from narrowcast.training.events import ignore
    from narrowcast.training.train import train as training

    trackers = [tracker_named(name) for name in track or ()]
    run = partial(
        training,
        *parts,
        device=device,
        resume=resume,
        budget_bytes=limit.bytes,
        notes=limit.notes,
        command=shlex.join(["narrowcast", *sys.argv[1:]]),
        together=rank.together,
    )
    if not rank.is_main:
        return run(observe=ignore)
    with watching() as follow, naming_differences(limit.notes):
        return run(observe=all_of(follow, *trackers))


def _typed(
    precision: str,
    policy: Path | None,
    keep_fp32: list[str] | None,
    rules: str,
    resumed_budget: str | bool | None,
) -> dict[str, bool]:
    """Say which of the options that a plan decides for were given beside it."""
    return {
        "--precision": precision != "auto",
        "--policy": policy is not None,
        "--keep-fp32": bool(keep_fp32),
        "--autocast-rules": rules != "native",
        "--resume": bool(resumed_budget),
    }


def _default_directory(recipe: str, plan: str, seed: int, *, resume: bool) -> Path:
    """Choose a new directory under runs/, or the newest of this name to go on with."""
    from narrowcast.training.run_directory import default_directory, latest_directory

    stem = f"{recipe}-{plan}-seed{seed}"
    latest = latest_directory(RUNS, stem) if resume else None
    return latest or default_directory(RUNS, stem)


def _finish(record: RunRecord, directory: Path, json: str | None, *, is_main: bool) -> None:
    """Write the report, print the result, and end with 130 if the run was interrupted."""
    from narrowcast.report.html import write_html
    from narrowcast.report.terminal import render_summary
    from narrowcast.training.run_directory import RunDirectory

    if not is_main:
        raise typer.Exit(130 if record.status == "interrupted" else 0)
    place = RunDirectory(directory)
    points = [p for p in place.read_metrics() if p.kind == "step"]
    write_html(record, place.report_path, points=points)
    emit_json(record, json)
    out = console()
    if record.status == "interrupted":
        _say(
            out,
            f"interrupted after step {record.completed_steps} of {record.planned_steps} and "
            f"saved; the same command with --resume --output {directory} goes on",
        )
        raise typer.Exit(130)
    # The result is what was asked for: to stdout, unless JSON is to stand there.
    render_summary(record, result_console(json), points=points)
    _say(out, f"run: {directory} (report: {place.report_path})")


class Watch:
    """Follows one training after another; shows steps, rate, time left, loss, scale and skips."""

    def __init__(self, shown: Progress, out: Console) -> None:
        self._shown = shown
        self._out = out
        self._task = shown.add_task("", total=None, visible=False, rate="", state="")
        self._total = 0
        self._skipped = 0
        self._first: tuple[int, float] | None = None
        """Step and time since when the rate is measured: after the first, slow ones."""

    def __call__(self, event: Event) -> None:
        from narrowcast.records.run import Evaluation, StepPoint
        from narrowcast.training.events import Notice, Started

        match event:
            case Started():
                self._begin(event)
            case StepPoint():
                self._advance(event)
            case Evaluation():
                self._evaluated(event)
            case Notice():
                _say(self._out, f"note: {event.text}")
            case _:
                pass

    def _begin(self, event: Started) -> None:
        record = event.record
        self._total, self._skipped, self._first = record.planned_steps, 0, None
        what = f"{record.recipe} in {record.precision}"
        if event.step == self._total:
            _say(self._out, f"{event.directory}: all {self._total} steps were taken already")
            return
        since = f", from step {event.step} on" if event.step else ""
        where = f"{record.environment.device_name}, in {event.directory}"
        _say(self._out, f"training {what}: {self._total} steps{since}, on {where}")
        self._shown.reset(
            self._task,
            description=record.precision,
            total=self._total,
            completed=event.step,
            visible=True,
        )

    def _advance(self, point: StepPoint) -> None:
        now = time.monotonic()
        self._skipped += not point.applied
        if self._first is None:
            self._first = (point.step, now)
        done, elapsed = point.step - self._first[0], now - self._first[1]
        speed = done / elapsed if elapsed > 0 else 0.0
        left = format_duration(max(1, round((self._total - point.step) / speed))) if speed else ""
        scale = f"  scale {point.loss_scale:g}" if point.loss_scale != 1 else ""
        skips = f"  {self._skipped} skipped" if self._skipped else ""
        self._shown.update(
            self._task,
            completed=point.step,
            rate=f"{speed:.3g} steps/s, {left} left" if speed else "",
            state=f"loss {point.loss:.4g}{scale}{skips}",
        )

    def _evaluated(self, evaluation: Evaluation) -> None:
        if self._shown.disable:
            return
        values = "  ".join(f"{name} {value:.4g}" for name, value in evaluation.metrics.items())
        _say(self._out, f"step {evaluation.step}, evaluated in {evaluation.precision}: {values}")


@contextmanager
def watching() -> Iterator[Watch]:
    """Show live progress on a terminal; elsewhere one line when a training starts."""
    out = console()
    whole = partial(Column, no_wrap=True, overflow="crop")
    shown = Progress(
        TextColumn("{task.description}", markup=False, table_column=whole()),
        BarColumn(bar_width=16, table_column=whole()),
        MofNCompleteColumn(table_column=whole()),
        TextColumn("{task.fields[rate]}", markup=False, table_column=whole()),
        TextColumn("{task.fields[state]}", markup=False, table_column=whole()),
        console=out,
        disable=not out.is_terminal,
        transient=True,
    )
    with shown:
        yield Watch(shown, out)


def _say(out: Console, text: str) -> None:
    """Print one line as it is: paths and the recipes' own words are no markup."""
    out.print(text, markup=False, highlight=False, soft_wrap=True)
