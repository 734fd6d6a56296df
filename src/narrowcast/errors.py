"""Every error that Narrowcast raises on purpose: what happened, what was expected, what to do.

The command line prints ``error: <message>`` and ``hint: <hint>`` and exits with ``exit_code``.

    NarrowcastError           exit 1
    |-- UsageError            exit 2   the request itself makes no sense
    |   `-- UnknownName       exit 2   with the nearest valid name
    |-- UnsupportedPrecision  exit 3   this device cannot do what was asked for
    |-- RecipeError           exit 4   the user's recipe lacks something or raised
    |-- DataError             exit 4   the recipe's data are empty or malformed
    |-- PrecisionError        exit 5   the numbers broke: NaN, inf, too many skips
    |-- RunDirectoryError     exit 6   it holds another run, or cannot be written
    |-- CheckpointError       exit 7   truncated, tampered, or of another run
    |-- ProtocolError         exit 8   a protocol was edited after it was written
    `-- ParallelError         exit 9   a rank is missing, was lost, or went another way

Ctrl-C ends with exit code 130, after the state has been saved.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "CheckpointError",
    "DataError",
    "NarrowcastError",
    "ParallelError",
    "PrecisionError",
    "ProtocolError",
    "RecipeError",
    "RunDirectoryError",
    "UnknownName",
    "UnsupportedPrecision",
    "UsageError",
]


class NarrowcastError(Exception):
    """The root of the tree; ``hint`` says what to do next, in one sentence."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\nhint: {self.hint}" if self.hint else self.message


class UsageError(NarrowcastError):
    """The request makes no sense as it stands."""

    exit_code = 2


class UnknownName(UsageError):
    """A name that is not in the list of valid ones; the hint names the nearest."""

    @classmethod
    def of(cls, kind: str, name: str, known: Iterable[str]) -> UnknownName:
        """Build the error for an unknown `name` of some `kind` (precision, recipe, option, ...)."""
        valid = sorted(known)
        near = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
        guess = f"did you mean {near[0]!r}? " if near else ""
        return cls(f"unknown {kind} {name!r}", hint=f"{guess}valid: {', '.join(valid)}")


class UnsupportedPrecision(NarrowcastError):
    """The device cannot compute in the precision that was asked for."""

    exit_code = 3


class RecipeError(NarrowcastError):
    """A recipe lacks a part, has one of the wrong shape, or raised."""

    exit_code = 4


class DataError(NarrowcastError):
    """A recipe's data are empty or cannot be batched."""

    exit_code = 4


class PrecisionError(NarrowcastError):
    """The numbers broke: a non-finite loss, or more skipped steps in a row than allowed."""

    exit_code = 5


class RunDirectoryError(NarrowcastError):
    """A run directory holds something else, is missing, or cannot be written."""

    exit_code = 6


class CheckpointError(NarrowcastError):
    """A checkpoint is truncated, tampered with, or belongs to another run."""

    exit_code = 7


class ProtocolError(NarrowcastError):
    """A comparison's protocol was changed after it was written down."""

    exit_code = 8


class ParallelError(NarrowcastError):
    """A rank of a parallel training is missing, was lost, or no longer does what the others do."""

    exit_code = 9
