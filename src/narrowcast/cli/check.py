"""`narrowcast check`: what is wrong in a recipe or a training script, before it runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.text import Text

from narrowcast.cli.common import JsonOption, SetOption, emit_json, result_console

if TYPE_CHECKING:
    from narrowcast.records.check import CheckFinding, CheckRecord

__all__ = ["register"]

_STYLES = {"error": "bold red", "warning": "yellow", "notice": "cyan"}

TargetArgument = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE_OR_SCRIPT",
        help="A recipe, or any Python training script; a script is read and never run.",
    ),
]
AssumedOption = Annotated[
    str | None,
    typer.Option(
        "--precision",
        "-p",
        help="What a recipe's traced step computes in, under CUDA's cast lists; fp16 by default.",
    ),
]
TraceOption = Annotated[
    bool,
    typer.Option("--trace/--no-trace", help="Take one small forward pass of a recipe."),
]


def register(app: typer.Typer) -> None:
    """Add the verb to the application."""
    app.command("check")(check)


def check(
    target: TargetArgument,
    precision: AssumedOption = None,
    overrides: SetOption = None,
    trace: TraceOption = True,
    json: JsonOption = None,
) -> None:
    """Look for what goes wrong in mixed precision, each with file, line, reason and fix.

    Exit code 0 if nothing worse than a notice was found, 1 otherwise.
    """
    from narrowcast.preflight.check import DEFAULT_PRECISION
    from narrowcast.preflight.check import check as run

    record = run(target, precision or DEFAULT_PRECISION, overrides=overrides or (), trace=trace)
    emit_json(record, json)
    _print(record, result_console(json))
    if any(f.severity != "notice" for f in record.findings):
        raise typer.Exit(1)


def _print(record: CheckRecord, out: Console) -> None:
    for finding in record.findings:
        _print_finding(finding, out)
    for note in record.notes:
        out.print(Text(f"note: {note}"))
    counts = [
        f"{sum(f.severity == severity for f in record.findings)} {severity}s"
        for severity in _STYLES
    ]
    where = f", one step traced in {record.precision}" if record.precision else ""
    out.print(Text(f"{record.target}: {', '.join(counts)} ({len(record.rules)} rules{where})"))


def _print_finding(finding: CheckFinding, out: Console) -> None:
    out.print(
        Text.assemble(
            (f"{finding.file}:{finding.line}", "bold"),
            "  ",
            (finding.severity, _STYLES[finding.severity]),
            f"  {finding.rule}",
            f"  in {finding.module}" if finding.module else "",
        )
    )
    if finding.code:
        out.print(Text(f"    {finding.code}", style="dim"), soft_wrap=True)
    out.print(Text(f"    {finding.message}"))
    out.print(Text(f"    fix: {finding.fix}"))
