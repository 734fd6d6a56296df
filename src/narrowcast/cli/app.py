"""The command `narrowcast`: one verb per file, and one place that turns errors into exit codes."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import typer

from narrowcast import __version__
from narrowcast.cli import (
    check,
    compare,
    diagnose,
    doctor,
    evaluate,
    memory,
    plan,
    predict,
    recipes,
    report,
    train,
    verify_resume,
)
from narrowcast.cli.common import console
from narrowcast.errors import NarrowcastError

__all__ = ["app", "main"]

VERBS = (
    train,
    evaluate,
    compare,
    diagnose,
    check,
    memory,
    predict,
    plan,
    report,
    doctor,
    recipes,
    verify_resume,
)

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
    """Run the command line; the exit codes are those of ``narrowcast.errors``.

    And 130 for Ctrl-C, and 141 where the reader of the output has left (head, less), as of a
    process that SIGPIPE ends.
    """
    with _noting_interrupts() as interrupts:
        try:
            app(standalone_mode=True)
        except SystemExit as leaving:
            # Typer and rich leave with 1 where the output has no reader.
            if _came_from(leaving, BrokenPipeError):
                _leave_unread()
            if not _came_from(leaving, KeyboardInterrupt):
                raise  # a verb that was interrupted in its own way has said so
            _stop()
        except BaseException as error:  # noqa: BLE001 -- what is not ours is raised again
            # An import that Ctrl-C breaks off may go on to raise anything, in our place.
            if interrupts or isinstance(error, KeyboardInterrupt):
                _stop()
            _leave_by(error)
    sys.exit(0)


@contextmanager
def _noting_interrupts() -> Iterator[list[int]]:
    """Hand out a list that grows with every Ctrl-C, which raises KeyboardInterrupt as always."""
    seen: list[int] = []

    def note(number: int, _: object) -> NoReturn:
        seen.append(number)
        raise KeyboardInterrupt

    ours = (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    )
    if ours:
        signal.signal(signal.SIGINT, note)
    try:
        yield seen
    finally:
        if ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def _came_from(error: BaseException | None, kind: type[BaseException]) -> bool:
    """Whether an error of this kind made this one, and nobody took it up (``from None``)."""
    while error is not None:
        if isinstance(error, kind):
            return True
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return False


def _stop() -> NoReturn:
    if sys.stderr is not None:
        sys.stderr.write("stopped\n")
    sys.exit(130)


def _leave_by(error: BaseException) -> NoReturn:
    """Exit as an error asks for; one that is not ours goes on, with its traceback."""
    if isinstance(error, NarrowcastError):
        _print_error(error)
        sys.exit(error.exit_code)
    if isinstance(error, BrokenPipeError):
        _leave_unread()
    raise error


def _leave_unread() -> NoReturn:
    """Exit where nothing more can be said to anyone, what is still buffered included."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(141)


def _print_error(error: NarrowcastError) -> None:
    out = console()
    out.print(f"error: {error.message}", style="red", markup=False, highlight=False, soft_wrap=True)
    if error.hint:
        out.print(f"hint: {error.hint}", markup=False, highlight=False, soft_wrap=True)
