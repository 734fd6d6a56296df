"""`narrowcast evaluate`: stored weights over the evaluation data, in fp32 and as trained."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from narrowcast.cli.common import (
    DeviceOption,
    JsonOption,
    SetOption,
    console,
    emit_json,
)
from narrowcast.cli.precision import chosen_policy
from narrowcast.errors import UsageError

if TYPE_CHECKING:
    from narrowcast.records.evaluation import EvaluationRecord

__all__ = ["evaluate", "register"]


def register(app: typer.Typer) -> None:
    """Add the verb to the command line."""
    app.command(name="evaluate")(evaluate)


def evaluate(
    what: Annotated[
        str,
        typer.Argument(metavar="RUN|RECIPE", help="A run's directory, or a recipe with --weights."),
    ],
    weights: Annotated[
        Path | None,
        typer.Option("--weights", metavar="FILE", help="Weights or a checkpoint (safetensors)."),
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option("--precision", "-p", help="By default the run's own; fp32 for a recipe."),
    ] = None,
    overrides: SetOption = None,
    seed: Annotated[
        int | None, typer.Option("--seed", help="Seed of the data; by default the run's own, or 0.")
    ] = None,
    device: DeviceOption = None,
    json: JsonOption = None,
) -> None:
    """Evaluate stored weights in fp32 and in the precision they were trained in."""
    if Path(what).is_dir():
        if overrides or seed is not None:
            raise UsageError(
                f"{what} is a run, which is evaluated with its own options and seed",
                hint="leave out --set and --seed, or name the recipe and give --weights",
            )
        record = _of_run(Path(what), weights, precision, device)
    elif weights is None:
        raise UsageError(
            f"{what} is no run directory, and no --weights were given",
            hint="narrowcast evaluate runs/... , or narrowcast evaluate RECIPE --weights FILE",
        )
    else:
        from narrowcast.precision.device import device_at_hand
        from narrowcast.recipes.load import load_recipe
        from narrowcast.training.evaluation import evaluate_weights

        place = device_at_hand(device)
        record = evaluate_weights(
            load_recipe(what, overrides or ()),
            chosen_policy(precision or "fp32", place),
            weights,
            device=place,
            seed=seed or 0,
        )
    emit_json(record, json)
    _print(record, console() if json == "-" else Console())


def _of_run(
    directory: Path, weights: Path | None, precision: str | None, device: str | None
) -> EvaluationRecord:
    """Evaluate a run as its record describes it; its newest checkpoint if it has not ended."""
    from dataclasses import replace

    from narrowcast.policy import Policy
    from narrowcast.precision.device import device_at_hand, require
    from narrowcast.recipes.load import load_recipe
    from narrowcast.records.codec import from_json
    from narrowcast.training.checkpoint import checkpoints_in
    from narrowcast.training.evaluation import evaluate_weights
    from narrowcast.training.run_directory import RunDirectory

    run = RunDirectory(directory)
    record = run.read_record()
    place = device_at_hand(device)
    policy = chosen_policy(precision, place) if precision else from_json(Policy, record.policy)
    require(policy, place)
    stored = [*checkpoints_in(run.checkpoints), run.weights_path]
    file = weights or [path for path in stored if path.exists()][-1]
    overrides = [f"{name}={value}" for name, value in record.options.items() if value is not None]
    recipe = load_recipe(record.recipe_path or record.recipe, overrides)
    found = evaluate_weights(
        recipe, policy, file, device=place, seed=record.seed, step=record.completed_steps
    )
    if recipe.source_hash == record.recipe_digest:
        return found
    return replace(found, warnings=(f"{recipe.path} has changed since the run was made",))


def _print(record: EvaluationRecord, out: Console) -> None:
    names = list(record.evaluations[0].metrics)
    table = Table(title=f"{record.weights}", title_justify="left")
    table.add_column("evaluated in")
    for name in names:
        table.add_column(name, justify="right")
    table.add_column("examples", justify="right")
    for evaluation in record.evaluations:
        values = [f"{evaluation.metrics[name]:.6g}" for name in names]
        table.add_row(evaluation.precision, *values, str(evaluation.examples))
    out.print(table)
    for warning in record.warnings:
        out.print(f"note: {warning}", markup=False, highlight=False, soft_wrap=True)
