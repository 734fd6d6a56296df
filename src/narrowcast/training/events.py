"""What a training tells while it runs; whoever started it decides what to print."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from narrowcast.records.run import Evaluation, RunRecord, StepPoint

__all__ = [
    "Ended",
    "Event",
    "Hearing",
    "Notice",
    "Observer",
    "Saved",
    "Started",
    "ignore",
]


@dataclass(frozen=True, kw_only=True)
class Started:
    """The first step is about to be taken; `step` is not 0 if the run was resumed."""

    record: RunRecord
    directory: Path
    step: int


@dataclass(frozen=True, kw_only=True)
class Notice:
    """Something that a person should know and that the record keeps: a caution, a surprise."""

    text: str


@dataclass(frozen=True, kw_only=True)
class Saved:
    """A checkpoint is on the disk."""

    step: int
    path: Path


@dataclass(frozen=True, kw_only=True)
class Ended:
    """The run is over, or interrupted; a run that failed raises after this."""

    record: RunRecord
    stop_asked: bool = False
    """Whether Ctrl-C came, be it too late for this run: whoever has more to run should stop."""


Event = Started | Notice | StepPoint | Evaluation | Saved | Ended
Observer = Callable[[Event], None]


class Hearing:
    """An observer that passes everything on, and remembers whether somebody asked to stop."""

    def __init__(self, observe: Observer) -> None:
        self._observe = observe
        self.stop_asked = False

    def __call__(self, event: Event) -> None:
        if isinstance(event, Ended):
            self.stop_asked |= event.stop_asked
        self._observe(event)


def ignore(event: Event) -> None:
    """Observe nothing: the default of every function that takes an observer."""
