"""Keeps an optimizer from being stepped by anybody but the engine while gradients are pending."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer

from narrowcast.errors import UsageError

__all__ = ["StepGuard"]


class StepGuard:
    """Optimizer hook: while gradients are pending, ``optimizer.step()`` is the engine's to call."""

    __slots__ = ("is_armed", "name")

    def __init__(self, name: str) -> None:
        self.name = name
        self.is_armed = False

    def __call__(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self.is_armed:
            raise UsageError(
                f"optimizer {self.name!r} was stepped while gradients of engine.backward were "
                "pending: not yet unscaled, checked or clipped",
                hint="call engine.step() instead of optimizer.step() or scaler.step(optimizer)",
            )
