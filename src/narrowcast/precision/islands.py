"""What happens at a border between precisions inside a model: casts, and autocast on or off.

Hooks rather than wrapped ``forward`` methods: a deep copy of a prepared model (an EMA, say) takes
its own hooks along, pickling works, and activation checkpointing runs them again by itself, in the
recomputation as in the first forward pass.
"""

from __future__ import annotations

import copy
import dataclasses
import threading
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map  # torch's only walker of nests; knows registered types

__all__ = [
    "HOOKS",
    "CastInputs",
    "CastOutputs",
    "EnterIsland",
    "LeaveIsland",
    "cast_nest",
    "restore_autocast",
    "switch_autocast_off",
]


class CastInputs:
    """Forward pre-hook: floating-point inputs, however nested, arrive in `dtype`."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.active = True

    def __call__(
        self, module: nn.Module, args: Any, kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]] | None:
        return (cast_nest(args, self.dtype), cast_nest(kwargs, self.dtype)) if self.active else None


class CastOutputs:
    """Forward hook: floating-point outputs, however nested, leave in `dtype`."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.active = True

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        return cast_nest(output, self.dtype) if self.active else None


class _AutocastStates(threading.local):
    """Autocast states to return to, one per island that a thread is inside of."""

    def __init__(self) -> None:
        self.stack: list[tuple[nn.Module, list[tuple[str, bool]]]] = []


_STATES = _AutocastStates()
_DEVICE_TYPES = ("cpu", "cuda")


class EnterIsland:
    """Forward pre-hook: autocast off, 16-bit inputs widened to fp32."""

    def __call__(
        self, module: nn.Module, args: Any, kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        _STATES.stack.append((module, switch_autocast_off()))
        return cast_nest(args, torch.float32), cast_nest(kwargs, torch.float32)


class LeaveIsland:
    """Forward hook, called after exceptions too: autocast as it was before the island."""

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        stack = _STATES.stack
        # A KeyboardInterrupt inside an inner island skips its hook; its entry is passed over here.
        while stack and any(entered is module for entered, _ in stack):
            entered, states = stack.pop()
            if entered is module:
                restore_autocast(states)
                return


def switch_autocast_off() -> list[tuple[str, bool]]:
    before = [(kind, torch.is_autocast_enabled(kind)) for kind in _DEVICE_TYPES]
    for kind, enabled in before:
        if enabled:
            torch.set_autocast_enabled(kind, False)
    return before


def restore_autocast(states: list[tuple[str, bool]]) -> None:
    for kind, enabled in states:
        torch.set_autocast_enabled(kind, enabled)


def cast_nest(nest: Any, dtype: torch.dtype) -> Any:
    """Cast the floating-point tensors of a nest of tuples, lists, dicts and dataclasses."""

    def leaf(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(dtype) if value.is_floating_point() else value
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            changed = copy.copy(value)
            for field in dataclasses.fields(value):
                # A frozen dataclass refuses plain assignment; the copy is ours to fill.
                object.__setattr__(
                    changed, field.name, cast_nest(getattr(value, field.name), dtype)
                )
            return changed
        return value

    return tree_map(leaf, nest)


HOOKS = (CastInputs, CastOutputs, EnterIsland, LeaveIsland)
