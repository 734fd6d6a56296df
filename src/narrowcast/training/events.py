"""What a training tells while it runs; whoever started it decides what to print."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from narrowcast.records.run import Evaluation, RunRecord, StepPoint

__all__ = ["Ended", "Event", "Notice", "Observer", "Saved", "Started", "ignore"]


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


Event = Started | Notice | StepPoint | Evaluation | Saved | Ended
Observer = Callable[[Event], None]


def ignore(event: Event) -> None:
    """Observe nothing: the default of every function that takes an observer."""
