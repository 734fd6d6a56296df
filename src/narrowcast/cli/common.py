"""What the verbs share: the console on stderr, and the options they all take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from narrowcast.cli.json_target import emit_json, prepare_json
from narrowcast.errors import RunDirectoryError

__all__ = [
    "RUNS",
    "AutocastRulesOption",
    "DeterministicOption",
    "DeviceOption",
    "JsonOption",
    "OutputOption",
    "PrecisionOption",
    "RecipeArgument",
    "SeedOption",
    "SetOption",
    "StepsOption",
    "console",
    "emit_json",
    "require_empty",
    "result_console",
    "split_names",
]

_UNFOLDED = 100_000
"""Columns that no line fills."""

RUNS = Path("runs")
"""Where results go that were given no place."""

RecipeArgument = Annotated[
    str,
    typer.Argument(help="A built-in recipe (see `narrowcast recipes`) or a recipe file."),
]
PrecisionOption = Annotated[
    str,
    typer.Option(
        "--precision",
        "-p",
        help="fp32, tf32, fp16, bf16, bf16-true, bf16-split, lean, fp8, fp8-split "
        "(or emulated: fp8-emulated), auto; Lightning's names; or a plan file (*.json).",
    ),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="Set an option of the recipe; repeatable."),
]
DeviceOption = Annotated[
    str | None, typer.Option("--device", help="cpu or cuda; by default the one at hand.")
]
AutocastRulesOption = Annotated[
    str,
    typer.Option(
        "--autocast-rules", help="native, or cuda to rehearse CUDA's cast lists on a CPU."
    ),
]
DeterministicOption = Annotated[
    bool,
    typer.Option(
        "--deterministic/--no-deterministic",
        help="Allow only operations that give the same bits every time; exact resume needs it.",
    ),
]
SeedOption = Annotated[int, typer.Option("--seed", help="Seed of weights, data order and dropout.")]
StepsOption = Annotated[
    int | None, typer.Option("--steps", help="Optimizer steps; by default what the recipe says.")
]
OutputOption = Annotated[
    Path | None,
    typer.Option("--output", "-o", help="Directory for the results; never overwrites another run."),
]
JsonOption = Annotated[
    str | None,
    typer.Option(
        "--json",
        metavar="PATH|-",
        help="Also write the record as JSON; - is stdout.",
        callback=prepare_json,
    ),
]


def console() -> Console:
    """Return a console on stderr, so that stdout stays free for ``--json -``."""
    return _unfolded_elsewhere(Console(stderr=True))


def result_console(json: str | None) -> Console:
    """Return the console for a verb's result: stdout, unless that carries the JSON."""
    return console() if json == "-" else _unfolded_elsewhere(Console())


def _unfolded_elsewhere(out: Console) -> Console:
    """Fold lines on a terminal alone: in a pipe or a file a path or a name stays in one piece."""
    if not out.file.isatty():
        out.width = _UNFOLDED
    return out


def require_empty(output: Path | None) -> None:
    """Raise RunDirectoryError for a place of results that holds something already."""
    if output is not None and output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise RunDirectoryError(
            f"{output} exists and is not an empty directory", hint="choose another --output"
        )


def split_names(text: str) -> tuple[str, ...]:
    """Split a comma-separated list as users type it: 'fp32, bf16' -> ('fp32', 'bf16')."""
    return tuple(part.strip() for part in text.split(",") if part.strip())
