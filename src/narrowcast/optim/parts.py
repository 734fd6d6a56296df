"""Parameters that are parts of larger ones: what a step must know of the whole.

Rounding noise is a function of an element's place, and which store a tensor gets depends on its
size. Both are those of the whole parameter, so that a sharded training rounds as one that is not.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

__all__ = ["Part", "mark_part", "part_of", "whole_numel"]

_MARK = "_narrowcast_part"


@dataclass(frozen=True, slots=True)
class Part:
    """Consecutive elements of a row-major whole."""

    start: int
    """Elements of the whole that come before."""
    whole: int
    """Elements of the whole."""


def mark_part(parameter: Tensor, part: Part) -> None:
    """Note of which whole a parameter is a part; a copy of the parameter keeps the note."""
    setattr(parameter, _MARK, part)


def part_of(parameter: Tensor) -> Part | None:
    """Return what `mark_part` noted; None for a parameter that is whole."""
    found: Part | None = getattr(parameter, _MARK, None)
    return found


def whole_numel(parameter: Tensor) -> int:
    """Return the number of elements of the whole."""
    part = part_of(parameter)
    return parameter.numel() if part is None else part.whole
