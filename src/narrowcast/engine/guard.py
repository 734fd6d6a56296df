"""Keeps optimizer, pending gradients and schedule from being moved by anybody but the engine."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer

from narrowcast.errors import UsageError

__all__ = ["ScheduleGuard", "StepGuard", "changed_gradient"]


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


class ScheduleGuard:
    """Steps a scheduler, and knows whether somebody else has stepped it since.

    A schedule that is somewhere else before the engine's first step, or further back, was loaded.
    One without ``last_epoch`` cannot be asked.
    """

    __slots__ = ("_scheduler", "_stands_at")

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler
        self._stands_at: Any = None

    def __call__(self) -> None:
        self._scheduler.step()
        self._stands_at = getattr(self._scheduler, "last_epoch", None)

    def forget(self) -> None:
        """Take the schedule as it stands at the next step."""
        self._stands_at = None

    def require_unmoved(self) -> None:
        """Raise UsageError if the schedule is further than the engine's last step left it."""
        if self._stands_at is not None and self._scheduler.last_epoch > self._stands_at:
            raise UsageError(
                f"the {type(self._scheduler).__name__} stands at {self._scheduler.last_epoch}, and "
                f"the engine left it at {self._stands_at}: somebody else steps it too, and the "
                "learning rate runs ahead of its schedule",
                hint="remove scheduler.step() from the loop, as engine.step() steps the scheduler "
                "with the optimizer; or build the engine without scheduler=",
            )


def changed_gradient(parameter: str, optimizer: str, scale: float) -> UsageError:
    """Build the error for a gradient that was written between the engine's backward and step."""
    state = f"stand at loss scale {scale:g}" if scale != 1.0 else "are in part summed elsewhere"
    return UsageError(
        f"the gradient of {parameter!r} was changed between engine.backward and engine.step, while "
        f"the gradients pending in optimizer {optimizer!r} {state}",
        hint="remove it: to clip, give the engine clip_norm=..., which limits the unscaled norm; "
        "to see the norm, read report.gradient_norm; any other change belongs into a hook "
        "(parameter.register_hook), which sees gradients as they are in backward, scaled",
    )
