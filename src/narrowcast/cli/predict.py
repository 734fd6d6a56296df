"""`narrowcast predict`: the ledger of a training step on a device that need not be there."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from narrowcast.cli.common import (
    AutocastRulesOption,
    JsonOption,
    PrecisionOption,
    RecipeArgument,
    SetOption,
    console,
    emit_json,
    result_console,
)
from narrowcast.cli.precision import KeepOption, PolicyOption, adjusted, asked

if TYPE_CHECKING:
    from narrowcast.plan import Plan

__all__ = ["register"]

BatchOption = Annotated[
    int | None,
    typer.Option("--batch", metavar="N", help="Samples a step; by default what the recipe says."),
]
TargetOption = Annotated[
    str,
    typer.Option(
        "--device", help="cpu, cuda (the GPU at hand), or one by name, such as h200 or rtx4090."
    ),
]

WorldOption = Annotated[
    int | None,
    typer.Option("--world", metavar="N", help="Ranks that share each batch; with --parallel."),
]
ParallelOption = Annotated[
    str | None,
    typer.Option(
        "--parallel",
        metavar="KIND",
        help="How they share the training: ddp or fsdp2; the peak is that of one rank.",
    ),
]


def register(app: typer.Typer) -> None:
    """Add the verb to the application."""
    app.command("predict")(predict)


def predict(
    recipe: RecipeArgument,
    precision: PrecisionOption = "auto",
    policy: PolicyOption = None,
    batch: BatchOption = None,
    overrides: SetOption = None,
    keep_fp32: KeepOption = None,
    device: TargetOption = "cpu",
    autocast_rules: AutocastRulesOption = "native",
    world: WorldOption = None,
    parallel: ParallelOption = None,
    json: JsonOption = None,
) -> None:
    """Predict the peak of one training step: nothing is run, and no GPU is needed.

    Two steps are traced on tensors that have sizes and no contents. The lines are those of
    `narrowcast memory`; for a GPU also what its allocator requests, allocates and reserves.
    """
    if parallel is not None:
        # DDP's reducer would advise on stderr against looking for unused parameters; see replicas.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from narrowcast.planning.place import place_named
    from narrowcast.prediction.predict import predict_memory
    from narrowcast.report.terminal import render_terminal

    device = place_named(device).target
    plan = _plan(asked(precision, policy), device, rules=autocast_rules, keep_fp32=keep_fp32 or [])
    with console().status("tracing a training step"):
        record = predict_memory(
            recipe,
            plan,
            device=device,
            batch_size=batch,
            world=world,
            parallel=parallel,
            options=overrides or (),
        )
    emit_json(record, json)
    if json != "-":
        render_terminal(record, result_console(json))


def _plan(name: str | Path, device: str, *, rules: str, keep_fp32: list[str]) -> Plan:
    """Resolve a precision's name, or a file, for a device that need not be there; says which."""
    from narrowcast.plan_files import read_plan
    from narrowcast.prediction.targets import target_named

    plan, why = target_named(device).plan(read_plan(name) if isinstance(name, Path) else name)
    if name == "auto":
        console().print(f"precision {plan.name}: {why}", markup=False, highlight=False)
    return adjusted(plan, rules=rules, keep_fp32=keep_fp32)
