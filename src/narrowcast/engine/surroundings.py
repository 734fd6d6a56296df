"""What a part of a training step runs in, as an object that is made once and entered every step.

The smallest step takes 150 us. Setting the switches behind "fp32" takes 30 of them, and a context
manager made of a generator 2 even if it does nothing, each three times a step: both are paid for
only where they have an effect.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from narrowcast.policy import Policy
from narrowcast.precision.cast import numeric_settings, settings_hold

__all__ = ["Forward", "Surroundings"]


class Surroundings:
    """A policy's numeric settings, where they are not in force yet, and one more context."""

    __slots__ = ("_device_type", "_entered", "_inner", "_policy")

    def __init__(
        self, policy: Policy, device_type: str, inner: AbstractContextManager[None] | None = None
    ) -> None:
        self._policy = policy
        self._device_type = device_type
        self._inner = None if isinstance(inner, nullcontext) else inner
        self._entered: list[AbstractContextManager[None] | None] = []

    def __enter__(self) -> None:
        settings = None
        if not settings_hold(self._policy, self._device_type):
            settings = numeric_settings(self._policy)
            settings.__enter__()
        self._entered.append(settings)
        if self._inner is not None:
            self._inner.__enter__()

    def __exit__(self, *error: Any) -> None:
        if self._inner is not None:
            self._inner.__exit__(*error)
        settings = self._entered.pop()
        if settings is not None:
            settings.__exit__(*error)


class Forward:
    """What ``engine.forward()`` returns: the engine knows while it is inside."""

    __slots__ = ("_engine", "_surroundings")

    def __init__(self, engine: Any, surroundings: Surroundings) -> None:
        self._engine = engine
        self._surroundings = surroundings

    def __enter__(self) -> None:
        if self._engine._inside is not None:
            raise self._engine._refusal("engine.forward()", self._engine._inside)
        self._engine._inside = "engine.forward()"
        for lane in self._engine._lanes.values():
            lane.has_forwarded = True
        self._surroundings.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._surroundings.__exit__(*error)
        self._engine._inside = None
