"""What happens at a border between precisions inside a model: casts, and autocast on or off.

Hooks rather than wrapped ``forward`` methods: a deep copy of a prepared model (an EMA, say) takes
its own hooks along, pickling works, and activation checkpointing runs them again by itself, in the
recomputation as in the first forward pass.
"""

from __future__ import annotations

import copy
import dataclasses
import threading
from collections.abc import Callable, Iterable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
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
    "unused_islands",
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


AutocastStates = list[Any]
"""By type of device whether autocast was on; inside of a graph the contexts to leave."""


class _AutocastStates(threading.local):
    """Autocast states to return to, one per island that a thread is inside of."""

    def __init__(self) -> None:
        self.stack: list[tuple[nn.Module, AutocastStates]] = []


_STATES = _AutocastStates()
_DEVICE_TYPES = ("cpu", "cuda")


class EnterIsland:
    """Forward pre-hook: autocast off, 16-bit inputs widened to fp32.

    `entry` is the entry of keep_fp32 that made the island.
    """

    def __init__(self, entry: str) -> None:
        self.entry = entry
        self.was_entered = False

    def __call__(
        self, module: nn.Module, args: Any, kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        self.was_entered = True  # written, never read: torch.compile guards on what a graph reads
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


def unused_islands(model: nn.Module, is_read: Callable[[nn.Parameter], bool]) -> dict[str, str]:
    """Map islands that were never entered, though their weights were read, to their entries.

    A weight of such a module is used by another (``F.linear(x, self.head.weight)``), or its
    children are called and it is not (a ModuleList): there is no edge at which to switch. Weights
    of an island that was entered are safe, however many islands hold them; a branch that did not
    run reads none.
    """
    hooks = {
        name: hook
        for name, module in model.named_modules()
        for hook in module._forward_pre_hooks.values()
        if isinstance(hook, EnterIsland)
    }
    safe = {
        id(weight)
        for name, hook in hooks.items()
        if hook.was_entered
        for weight in model.get_submodule(name).parameters()
    }
    return {
        name: hook.entry
        for name, hook in hooks.items()
        if any(
            id(weight) not in safe and is_read(weight)
            for weight in model.get_submodule(name).parameters()
        )
    }


def switch_autocast_off() -> AutocastStates:
    """Switch autocast off for all types of device; returns what `restore_autocast` takes."""
    if torch.compiler.is_compiling():
        mode = _Off()
        mode.__enter__()  # type: ignore[no-untyped-call]
        return [mode]
    before = [(kind, torch.is_autocast_enabled(kind)) for kind in _DEVICE_TYPES]
    for kind, enabled in before:
        if enabled:
            torch.set_autocast_enabled(kind, False)
    return before


def restore_autocast(states: AutocastStates) -> None:
    for state in reversed(states):
        if isinstance(state, tuple):
            torch.set_autocast_enabled(*state)
        else:
            state.__exit__(None, None, None)


class _Off(TorchFunctionMode):
    """Autocast off round every function: torch 2.11 can trace no switch, nor a context in parts."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            return call_traced(func, args, kwargs or {})


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _method_of(func: Callable[..., Any]) -> str:
    """Name a method of tensors that torch writes in Python; '' for every other function."""
    name = getattr(func, "__name__", "")
    return name if isinstance(func, FunctionType) and getattr(Tensor, name, None) is func else ""


def call_traced(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a function that a mode was given, in a way that torch.compile can trace."""
    # It knows such a method by its name, and breaks the graph inside of it (torch 2.13).
    if torch.compiler.is_compiling() and (method := _method_of(func)):
        return getattr(args[0], method)(*args[1:], **kwargs)
    return func(*args, **kwargs)


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
