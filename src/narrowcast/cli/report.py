"""`narrowcast report`: show a run, a comparison or a ledger again, from its files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from narrowcast.cli.common import JsonOption, console, emit_json, result_console

__all__ = ["register", "report"]


def register(app: typer.Typer) -> None:
    """Add the verb to the command line."""
    app.command(name="report")(report)


def report(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="DIR", help="A run, a comparison, or a JSON file that one of the verbs wrote."
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="Where the HTML report goes; by default report.html in the directory.",
        ),
    ] = None,
    json: JsonOption = None,
) -> None:
    """Render a report again: to the terminal, and as one HTML file that needs no network."""
    from narrowcast.files import require_replaceable
    from narrowcast.report.html import is_report, write_html_for_user
    from narrowcast.report.sources import read_source
    from narrowcast.report.terminal import render_terminal

    found = read_source(source)
    target = output or found.report_path
    require_replaceable(target, is_report)
    write_html_for_user(found.record, target, points=found.points)
    # The report itself is what was asked for, so it goes to stdout unless JSON is to stand there.
    shown = result_console(json)
    render_terminal(found.record, shown, points=found.points)
    emit_json(found.record, json)
    console().print(f"report: {target}", markup=False, highlight=False, soft_wrap=True)
