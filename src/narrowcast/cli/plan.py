"""`narrowcast plan`: the fastest training that fits a budget, before it is run."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from narrowcast.cli.common import (
    JsonOption,
    RecipeArgument,
    SetOption,
    console,
    emit_json,
    result_console,
    split_names,
)
from narrowcast.errors import UsageError

if TYPE_CHECKING:
    import torch

    from narrowcast.parallel.together import Together
    from narrowcast.plan import Plan
    from narrowcast.recipes.load import Recipe
    from narrowcast.records.plan import PlanRecord

__all__ = ["BudgetOption", "Limit", "PlanOption", "limit_of", "planned", "planning", "register"]

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
        help="In which precisions may be computed, such as fp32,bf16,bf16-split; auto is all the "
        "device can. Of a name only the computation counts: stores and levers are chosen.",
    ),
]
KeepBatchOption = Annotated[
    bool, typer.Option("--keep-batch", help="Never split the batch into micro-batches.")
]
WorldOption = Annotated[
    int,
    typer.Option(
        "--world",
        metavar="N",
        help="Ranks that share each batch, in processes of their own; the budget is that of one.",
    ),
]
ParallelOption = Annotated[
    str | None,
    typer.Option(
        "--parallel",
        metavar="KIND",
        help="How they share the training: ddp or fsdp2; by default that is chosen too.",
    ),
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
    world: WorldOption = 1,
    parallel: ParallelOption = None,
    output: FileOption = None,
    json: JsonOption = None,
) -> None:
    """Find the fastest training that fits a budget: precision, stores, checkpoints, micro-batches.

    Peaks are predicted, speeds are measured on the device at hand, or bounded by a roofline for one
    that is only named. What changes the result is chosen only where it is faster; by a roofline
    alone, stores that round only where no others fit.
    """
    if world > 1:
        # DDP's reducer would advise on stderr against looking for unused parameters; see replicas.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
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
            world=world,
            parallel=parallel,
            options=overrides or (),
            file=str(output or "plan.json"),
            say=say,
        )
    if output is not None:
        write_for_user(output, dumps(record) + "\n", is_record)
    emit_json(record, json)
    if json != "-":
        render_terminal(record, result_console(json))
    kept = f"plan: {output}" if output else "not kept: for the command, add --output plan.json"
    if output is not None or json != "-":
        console().print(kept, markup=False, highlight=False, soft_wrap=True)


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


class Limit(NamedTuple):
    """What a training is to stay within, and why it might not."""

    bytes: int | None = None
    notes: tuple[str, ...] = ()


def limit_of(
    recipe: Recipe,
    device: torch.device,
    together: Together | None,
    file: str | Path | None,
    budget: str | None,
    *,
    accumulate: int,
) -> Limit:
    """Return the budget of a training: as given, or as the plan in a file was found for it.

    A note says in what that plan was found for another training; a name has no budget. `together`
    are the ranks that share the training.
    """
    from narrowcast.plan_files import read_promise
    from narrowcast.recipes.load import option_values
    from narrowcast.units import format_bytes, parse_bytes

    differing: list[str] = []
    if budget is not None:
        found, size = "the plan", parse_bytes(budget)
    else:
        promise = read_promise(file) if isinstance(file, Path) else None
        if promise is None:
            return Limit()
        found, size = str(file), promise.budget_bytes
        differing += promise.differences(
            recipe=recipe.name,
            options=option_values(recipe),
            batch_size=recipe.batch_size,
            devices=_names_of(device),
            **_sharing(together),
        )
    if accumulate > 1:
        differing.append(f"one batch a step, and --accumulate is {accumulate}")
    room = format_bytes(size)
    notes = (f"{found} was found for {each}: {room} may not be enough" for each in differing)
    return Limit(size, tuple(notes))


def _sharing(together: Together | None) -> dict[str, Any]:
    if together is None:
        return {}
    return {"world": together.meeting.world.size, "parallel": together.kind}


def _names_of(device: torch.device) -> set[str]:
    """Return every name by which a plan can have meant the device at hand."""
    from narrowcast.planning.place import place_named
    from narrowcast.precision.device import environment

    names = {device.type, environment(device).device_name}
    try:
        return names | {place_named(str(device)).target}
    except UsageError:  # a GPU that nobody can have planned for by its name
        return names


def _tell(record: PlanRecord) -> None:
    """Say what was chosen, why, and what it changes."""
    lines = [f"plan {record.chosen.name}: {record.why}"]
    lines += [f"- {effect.axis}: {effect.choice}, {effect.says}" for effect in record.effects]
    for line in lines:
        console().print(line, markup=False, highlight=False, soft_wrap=True)
