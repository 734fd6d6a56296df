"""The command `narrowcast`: one verb per file, and one place that turns errors into exit codes."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

import typer

from narrowcast import __version__
from narrowcast.cli import (
    compare,
    doctor,
    evaluate,
    memory,
    recipes,
    report,
    train,
    verify_resume,
)
from narrowcast.cli.common import console
from narrowcast.errors import NarrowcastError

__all__ = ["app", "main"]

VERBS = (train, evaluate, compare, memory, report, doctor, recipes, verify_resume)

app = typer.Typer(
    name="narrowcast",
    help="Train PyTorch models in mixed precision: it fits, it is proved, and nothing is silent.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _verb in VERBS:
    _verb.register(app)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"narrowcast {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(
        False, "--version", callback=_print_version, is_eager=True, help="Print the version."
    ),
) -> None:
    """Hold the options that belong to no verb."""


def main() -> NoReturn:
    """Run the command line; the exit codes are those of ``narrowcast.errors``, 130 for Ctrl-C."""
    try:
        app(standalone_mode=True)
    except NarrowcastError as error:
        _print_error(error)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        # The reader of our output (head, less) has left; nothing more can be said to it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    sys.exit(0)


def _print_error(error: NarrowcastError) -> None:
    out = console()
    out.print(f"error: {error.message}", style="red", markup=False, highlight=False, soft_wrap=True)
    if error.hint:
        out.print(f"hint: {error.hint}", markup=False, highlight=False, soft_wrap=True)
