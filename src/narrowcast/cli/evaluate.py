"""`narrowcast evaluate`: stored weights over the evaluation data, in fp32 and as trained."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from narrowcast.cli.common import DeviceOption, JsonOption, SetOption, emit_json, result_console
from narrowcast.cli.precision import PolicyOption, asked, chosen_plan
from narrowcast.errors import RunDirectoryError, UsageError

if TYPE_CHECKING:
    from narrowcast.records.evaluation import EvaluationRecord
    from narrowcast.training.run_directory import RunDirectory

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
    policy: PolicyOption = None,
    overrides: SetOption = None,
    seed: Annotated[
        int | None, typer.Option("--seed", help="Seed of the data; by default the run's own, or 0.")
    ] = None,
    device: DeviceOption = None,
    deterministic: Annotated[
        bool | None,
        typer.Option(
            "--deterministic/--no-deterministic",
            help="Allow only operations that give the same bits every time; by default as the run "
            "did.",
        ),
    ] = None,
    json: JsonOption = None,
) -> None:
    """Evaluate stored weights in fp32 and in the precision they were trained in."""
    is_asked = precision is not None or policy is not None
    wanted = asked(precision or "auto", policy) if is_asked else None
    if Path(what).is_dir():
        if overrides or seed is not None:
            raise UsageError(
                f"{what} is a run, which is evaluated with its own options and seed",
                hint="leave out --set and --seed, or name the recipe and give --weights",
            )
        record = _of_run(Path(what), weights, wanted, device, deterministic=deterministic)
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
            chosen_plan(wanted or "fp32", place),
            weights,
            device=place,
            seed=seed or 0,
            deterministic=deterministic is not False,
        )
    emit_json(record, json)
    _print(record, result_console(json))


def _of_run(
    directory: Path,
    weights: Path | None,
    precision: str | Path | None,
    device: str | None,
    *,
    deterministic: bool | None,
) -> EvaluationRecord:
    """Evaluate a run as its record describes it; its newest checkpoint if it has not ended."""
    from dataclasses import replace

    from narrowcast.plan import Plan
    from narrowcast.precision.device import device_at_hand, require
    from narrowcast.recipes.load import load_recipe, option_values
    from narrowcast.records.codec import from_json
    from narrowcast.training.evaluation import evaluate_weights
    from narrowcast.training.run_directory import RunDirectory

    run = RunDirectory(directory)
    record = run.read_record()
    place = device_at_hand(device)
    plan = chosen_plan(precision, place) if precision else from_json(Plan, record.plan)
    require(plan.policy, place)
    file = weights or _newest_weights(run)
    source = record.recipe_path or record.recipe
    if record.recipe_path and not Path(source).is_file():
        raise RunDirectoryError(
            f"the recipe that {directory} was trained with is not at {source} any more",
            hint=f"put it back, or give its new place: narrowcast evaluate RECIPE --weights {file}",
        )
    recipe = load_recipe(source, record.options)
    found = evaluate_weights(
        recipe,
        plan,
        file,
        device=place,
        seed=record.seed,
        step=record.completed_steps,
        deterministic=record.deterministic if deterministic is None else deterministic,
    )
    notes = []
    if recipe.source_hash != record.recipe_digest:
        notes.append(f"{recipe.path} has changed since the run was made")
    differing = sorted(dict(option_values(recipe).items() ^ record.options.items()))
    if differing:
        notes.append(f"options are not those of the run: {', '.join(differing)}")
    return replace(found, warnings=(*notes, *found.warnings))


def _newest_weights(run: RunDirectory) -> Path:
    """Return what a run has left of its weights, the newest; it may have got nowhere."""
    from narrowcast.training.checkpoint import checkpoints_in

    stored = [*checkpoints_in(run.checkpoints), run.weights_path]
    there = [path for path in stored if path.exists()]
    if not there:
        raise RunDirectoryError(
            f"{run.path} holds neither weights nor a checkpoint: there is nothing to evaluate",
            hint="continue the run with --resume, or give --weights",
        )
    return there[-1]


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
