"""`narrowcast verify-resume`: proof, on one's own recipe, that a resumed run is the same run."""

from __future__ import annotations

import tempfile
from contextlib import nullcontext
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.text import Text

from narrowcast.cli.common import (
    AutocastRulesOption,
    DeterministicOption,
    DeviceOption,
    JsonOption,
    OutputOption,
    PrecisionOption,
    RecipeArgument,
    SeedOption,
    SetOption,
    emit_json,
    result_console,
)
from narrowcast.cli.precision import KeepOption, PolicyOption, asked, chosen_plan
from narrowcast.errors import PrecisionError
from narrowcast.units import format_bytes

if TYPE_CHECKING:
    from narrowcast.records.verify import VerifyRecord

__all__ = ["register", "verify_resume"]


def register(app: typer.Typer) -> None:
    """Add the verb to the command line."""
    app.command(name="verify-resume")(verify_resume)


def verify_resume(
    recipe: RecipeArgument,
    precision: PrecisionOption = "auto",
    policy: PolicyOption = None,
    overrides: SetOption = None,
    steps: Annotated[
        int | None, typer.Option("--steps", help="Steps of each run; by default at most 20.")
    ] = None,
    seed: SeedOption = 0,
    keep_fp32: KeepOption = None,
    device: DeviceOption = None,
    autocast_rules: AutocastRulesOption = "native",
    deterministic: DeterministicOption = True,
    output: OutputOption = None,
    json: JsonOption = None,
) -> None:
    """Run, run again, stop half-way and resume in a new process; compare every bit.

    Exit code 0 if the resumed run is exact, 5 if it is not or the recipe is not deterministic.
    """
    from pathlib import Path

    from narrowcast.cli.train import watching
    from narrowcast.precision.device import device_at_hand
    from narrowcast.training.assembly import TrainOptions
    from narrowcast.training.verify import verify_resume as verify

    place = device_at_hand(device)
    plan = chosen_plan(asked(precision, policy), place, rules=autocast_rules, keep_fp32=keep_fp32)
    options = TrainOptions(steps=steps, seed=seed, deterministic=deterministic)
    kept = nullcontext(str(output)) if output else tempfile.TemporaryDirectory()
    with kept as directory, watching() as watch:
        record = verify(
            recipe,
            overrides or (),
            plan,
            options,
            Path(directory),
            device=place,
            observe=watch,
        )
    emit_json(record, json)
    _print(record, result_console(json))
    if record.verdict != "EXACT":
        raise typer.Exit(PrecisionError.exit_code)


def _print(record: VerifyRecord, out: Console) -> None:
    style = "bold cyan" if record.verdict == "EXACT" else "bold red"
    what = f"{record.recipe} in {record.precision}, {record.steps} steps"
    at = f"stopped at {record.interrupted_at}"
    out.print(Text.assemble((record.verdict, style), f"  {what}, {at}: {record.why}"))
    difference = record.difference
    if difference is None:
        out.print(
            f"compared: {record.tensors} tensors of {format_bytes(record.bytes)}, and "
            f"{record.values} other values",
            highlight=False,
        )
        return
    since = f"; the metrics differ from step {difference.step} on" if difference.step else ""
    out.print(Text(f"first difference: {difference.name}: {difference.what}{since}"))
