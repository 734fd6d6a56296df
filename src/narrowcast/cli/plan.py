"""`narrowcast plan`: the fastest training that fits a budget, before it is run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from narrowcast.cli.common import (
    JsonOption,
    RecipeArgument,
    SetOption,
    console,
    emit_json,
    split_names,
)
from narrowcast.errors import UsageError

if TYPE_CHECKING:
    from narrowcast.plan import Plan
    from narrowcast.records.plan import PlanRecord

__all__ = ["BudgetOption", "PlanOption", "planned", "planning", "register"]

BudgetArgument = Annotated[
    str,
    typer.Option("--budget", metavar="SIZE", help="Memory to fit into: 2GiB, 150MiB, 1.5GB."),
]
PlaceOption = Annotated[
    str | None,
    typer.Option(
        "--device",
        help="cpu, cuda, or a GPU by name, such as h200; by default the device at hand.",
    ),
]
PrecisionsOption = Annotated[
    str,
    typer.Option(
        "--precisions",
        "-p",
        help="What may be chosen from, such as fp32,bf16,bf16-split; auto is all the device can.",
    ),
]
KeepBatchOption = Annotated[
    bool, typer.Option("--keep-batch", help="Never split the batch into micro-batches.")
]
FileOption = Annotated[
    Path | None,
    typer.Option(
        "--output", "-o", metavar="FILE", help="Where the plan goes, for `train --plan FILE`."
    ),
]
PlanOption = Annotated[
    Path | None,
    typer.Option(
        "--plan", metavar="FILE", help="Train by a plan: of `narrowcast plan`, or of a run.json."
    ),
]
BudgetOption = Annotated[
    str | None,
    typer.Option("--budget", metavar="SIZE", help="Train by the fastest plan that fits into this."),
]


def register(app: typer.Typer) -> None:
    """Add the verb to the application."""
    app.command("plan")(plan)


def plan(
    recipe: RecipeArgument,
    budget: BudgetArgument,
    overrides: SetOption = None,
    precisions: PrecisionsOption = "auto",
    keep_batch: KeepBatchOption = False,
    device: PlaceOption = None,
    output: FileOption = None,
    json: JsonOption = None,
) -> None:
    """Find the fastest training that fits a budget: precision, stores, checkpoints, micro-batches.

    Peaks are predicted, speeds are measured on the device at hand, or bounded by a roofline for one
    that is only named. What changes the result is chosen only where it is faster.
    """
    from narrowcast.cli.json_target import is_record
    from narrowcast.files import require_replaceable, write_for_user
    from narrowcast.planning.planner import plan_recipe
    from narrowcast.records.codec import dumps
    from narrowcast.report.terminal import render_terminal
    from narrowcast.units import parse_bytes

    if output is not None:
        require_replaceable(output, is_record)
    with planning() as say:
        record = plan_recipe(
            recipe,
            parse_bytes(budget),
            device=device,
            precisions=split_names(precisions),
            keep_batch=keep_batch,
            options=overrides or (),
            file=str(output or "plan.json"),
            say=say,
        )
    if output is not None:
        write_for_user(output, dumps(record) + "\n", is_record)
    emit_json(record, json)
    if json != "-":
        render_terminal(record, Console())
    if output is not None:
        console().print(f"plan: {output}", markup=False, highlight=False, soft_wrap=True)


@contextmanager
def planning() -> Iterator[Callable[[str], None]]:
    """Show what is being traced and timed, on a terminal as one changing line."""
    out = console()
    with out.status("planning") as status:

        def say(text: str) -> None:
            status.update(f"planning: {text}")

        yield say


def planned(
    recipe: str,
    overrides: list[str] | None,
    *,
    file: Path | None,
    budget: str | None,
    device: str | None,
    release: bool,
    others: dict[str, bool],
) -> Plan | None:
    """Return the plan that `train --plan` or `--budget` asks for; None if neither does.

    `others` are the options that say in another way what a plan says, and whether they were given.
    """
    if file is None and budget is None:
        return None
    asked = "--plan" if file is not None else "--budget"
    given = [name for name, is_given in others.items() if is_given]
    given += ["--budget"] if file is not None and budget is not None else []
    if given:
        raise UsageError(
            f"{asked} and {given[0]} were both given: a plan says all of that itself",
            hint=f"leave out {given[0]}, or {asked}",
        )
    if file is not None:
        from narrowcast.plan_files import read_plan

        return read_plan(file)
    assert budget is not None
    return _fitted(recipe, overrides, budget, device=device, release=release)


def _fitted(
    recipe: str, overrides: list[str] | None, budget: str, *, device: str | None, release: bool
) -> Plan:
    from narrowcast.plan import Plan
    from narrowcast.planning.planner import plan_recipe
    from narrowcast.records.codec import from_json
    from narrowcast.units import parse_bytes

    with planning() as say:
        record = plan_recipe(
            recipe,
            parse_bytes(budget),
            device=device,
            options=overrides or (),
            release=release,
            say=say,
        )
    _tell(record)
    return from_json(Plan, record.chosen.plan)


def _tell(record: PlanRecord) -> None:
    """Say what was chosen, why, and what it changes."""
    lines = [f"plan {record.chosen.name}: {record.why}"]
    lines += [f"- {effect.axis}: {effect.choice}, {effect.says}" for effect in record.effects]
    for line in lines:
        console().print(line, markup=False, highlight=False, soft_wrap=True)
