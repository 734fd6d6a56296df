"""Which code carries out a step: our kernels on CUDA where Triton is installed, torch elsewhere."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from narrowcast.optim.rule import Rule
from narrowcast.optim.step import Item, update

__all__ = ["advance", "can_defer"]


def can_defer(rule: Rule, parameter: Tensor) -> bool:
    """Whether the code for this parameter can leave a decision to the device."""
    return False


def advance(rule: Rule, items: Sequence[Item], if_finite: Tensor | None = None) -> None:
    """Take one step of `rule` with every item, in place, on the device's word if it is asked."""
    assert if_finite is None
    update(rule, items)
