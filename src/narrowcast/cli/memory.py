"""`narrowcast memory`: where the peak of one training step goes, and when autocast pays."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from narrowcast.cli.common import (
    AutocastRulesOption,
    DeviceOption,
    JsonOption,
    OutputOption,
    PrecisionOption,
    RecipeArgument,
    SeedOption,
    SetOption,
    console,
    emit_json,
    require_empty,
    result_console,
)
from narrowcast.cli.precision import KeepOption, PolicyOption, asked, chosen_plan

if TYPE_CHECKING:
    from narrowcast.records.memory import MemoryRecord

__all__ = ["register"]

CrossCheckOption = Annotated[
    bool,
    typer.Option(
        help="Repeat the step under torch's own MemTracker and compare the totals (CPU only)."
    ),
]


def register(app: typer.Typer) -> None:
    """Add the verb to the application."""
    app.command("memory")(memory)


def memory(
    recipe: RecipeArgument,
    precision: PrecisionOption = "auto",
    policy: PolicyOption = None,
    overrides: SetOption = None,
    keep_fp32: KeepOption = None,
    device: DeviceOption = None,
    autocast_rules: AutocastRulesOption = "native",
    seed: SeedOption = 0,
    cross_check: CrossCheckOption = True,
    output: OutputOption = None,
    json: JsonOption = None,
) -> None:
    """Measure one training step: parameters, gradients, activations, weight casts and the rest.

    The third step is measured, storage by storage; the lines add up to the peak to the byte. For
    precisions that use autocast it also finds the batch size from which they hold less than fp32.
    """
    require_empty(output)
    from narrowcast.precision.device import device_at_hand
    from narrowcast.profiling import measure_recipe
    from narrowcast.recipes.load import load_recipe

    target = device_at_hand(device)
    plan = chosen_plan(asked(precision, policy), target, rules=autocast_rules, keep_fp32=keep_fp32)
    with console().status("measuring one training step"):
        record = measure_recipe(
            load_recipe(recipe, overrides or ()),
            plan,
            target,
            seed=seed,
            cross_check=cross_check and target.type == "cpu",
        )
    _write(record, output)
    emit_json(record, json)
    if json != "-":
        _print(record, result_console(json))


def _write(record: MemoryRecord, output: Path | None) -> None:
    if output is None:
        return
    from narrowcast.files import write_atomically
    from narrowcast.records.codec import dumps
    from narrowcast.report.html import write_html

    write_atomically(output / "memory.json", dumps(record) + "\n")
    write_html(record, output / "report.html")


def _print(record: MemoryRecord, out: Console) -> None:
    from narrowcast.report.terminal import render_terminal

    render_terminal(record, out)
