"""What an update rule is: which moments it keeps, its numbers for one step, and its arithmetic.

A rule knows nothing of stores. It is handed fp32 tensors and changes weight and moments in place,
with the operations of torch's single-tensor optimizers in their order, so that on fp32 stores the
results are torch's, bit for bit.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from narrowcast.errors import UsageError
from narrowcast.optim.states import Moment

__all__ = ["Coefficients", "Rule", "number", "require_betas", "require_number"]

Coefficients = tuple[float, ...]
"""The numbers of one step; tensors with equal ones may be updated together."""


class Rule(ABC):
    """An update rule; has no state of its own."""

    name: str

    @abstractmethod
    def moments(self, group: Mapping[str, Any]) -> tuple[Moment, ...]:
        """Return what this group's hyperparameters need kept from step to step."""

    @abstractmethod
    def coefficients(self, group: Mapping[str, Any], step: int, *, is_fresh: bool) -> Coefficients:
        """Return the numbers of step `step` (from 1); `is_fresh` where moments were just made."""

    @abstractmethod
    def update(
        self,
        weight: Tensor,
        gradient: Tensor,
        moments: Sequence[Tensor],
        coefficients: Coefficients,
    ) -> None:
        """Change fp32 weight and moments in place; the gradient stays as it is."""

    @abstractmethod
    def require_sound(self, group: Mapping[str, Any]) -> None:
        """Raise UsageError unless the group's hyperparameters make sense."""


def number(value: Any) -> float:
    """Return a hyperparameter as a number; a learning rate may be a tensor of one element."""
    return float(value.item()) if isinstance(value, Tensor) else float(value)


def require_number(name: str, value: Any, *, low: float = 0.0, below: float = float("inf")) -> None:
    """Raise UsageError unless `value` is a number in [low, below)."""
    is_one = value.numel() == 1 if isinstance(value, Tensor) else isinstance(value, (int, float))
    if not is_one or isinstance(value, bool) or not low <= number(value) < below:
        shown = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else value
        raise UsageError(
            f"{name} is {shown!r}",
            hint=f"a number of at least {low:g}" + (f" and below {below:g}" if below < 9 else ""),
        )


def require_betas(betas: Any, *, usual: tuple[float, float]) -> None:
    """Raise UsageError unless `betas` is a pair of plain numbers in [0, 1)."""
    if not isinstance(betas, Sequence) or len(betas) != 2:
        raise UsageError(f"betas is {betas!r}", hint=f"a pair of numbers, such as {usual}")
    for i, beta in enumerate(betas):
        if isinstance(beta, Tensor):
            raise UsageError(
                f"betas[{i}] is a tensor", hint="pass plain numbers: their powers are taken"
            )
        require_number(f"betas[{i}]", beta, below=1.0)
