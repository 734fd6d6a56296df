"""`--parallel`: one command on several processes, of which rank 0 alone speaks."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from narrowcast.errors import UsageError

if TYPE_CHECKING:
    from narrowcast.parallel.together import Together

__all__ = ["ParallelOption", "Rank", "ranks"]

ParallelOption = Annotated[
    str | None,
    typer.Option(
        "--parallel",
        metavar="KIND",
        help="Share the work with the other processes that torchrun started: ddp (each holds the "
        "whole model) or fsdp2 (each a part of every weight). The recipe's batch is that of all of "
        "them together.",
    ),
]


@dataclass(frozen=True)
class Rank:
    """This process among the others; alone without `together`."""

    together: Together | None = None

    @property
    def is_main(self) -> bool:
        """Whether this process prints and writes."""
        return self.together is None or self.together.is_main

    def device_name(self, asked: str | None) -> str | None:
        """Return the device that is this process's own."""
        return asked if self.together is None else self.together.device_name(asked)

    def directory(self, choose: Callable[[], Path]) -> Path:
        """Let one process choose, for all."""
        if self.together is None:
            return choose()
        return Path(self.together.meeting.from_main("directory", lambda: str(choose())))


@contextmanager
def ranks(kind: str | None, *, budget: str | None = None) -> Iterator[Rank]:
    """Yield this process's place; an error ends all ranks, and the rank that it is of says it."""
    if kind is None:
        yield Rank()
        return
    # What c10d logs of itself on every rank is said once, in our own words; read by torch's import.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from narrowcast.parallel.failures import PeerFailed
    from narrowcast.parallel.together import together_in

    together = together_in(kind, os.environ)
    try:
        with together.meeting.failing_together():
            if budget is not None:
                raise UsageError(
                    "--budget plans for one process, and not for ranks that share a training",
                    hint="train by a plan that there is: --plan FILE, or --precision",
                )
            yield Rank(together)
    except PeerFailed as followed:
        raise typer.Exit(followed.exit_code) from None
