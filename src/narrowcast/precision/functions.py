"""One function of a module in fp32, while all else that the module does stays in low precision.

Where a module computes by functions (a softmax between two matrix products), an island of the whole
module costs more than is needed. A ``TorchFunctionMode`` is in force while the module runs, and its
children with it, and computes the functions of these names with autocast off, on fp32 inputs.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode  # the only way to see functions that are no modules

from narrowcast.precision.islands import (
    call_traced,
    cast_nest,
    restore_autocast,
    switch_autocast_off,
)

__all__ = [
    "EnterFunctions",
    "FunctionsInForce",
    "LeaveFunctions",
    "functions_in_force",
    "unused_functions",
]


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _name_of(func: Callable[..., Any]) -> str:
    """Return what a function is called; torch.compile takes it as it is when it traces."""
    return str(getattr(func, "__name__", "")).strip("_")


class _InFp32(TorchFunctionMode):
    """Compute some functions in fp32; their results leave in `dtype` (None: in fp32)."""

    def __init__(self, hook: EnterFunctions) -> None:
        super().__init__()
        self.hook = hook

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        name = _name_of(func)
        if name not in self.hook.entries or not self.hook.active:
            return call_traced(func, args, kwargs or {})
        setattr(self.hook.called, name, True)
        states = switch_autocast_off()
        try:
            wide = cast_nest((args, kwargs or {}), torch.float32)
            result = func(*wide[0], **wide[1])
        finally:
            restore_autocast(states)
        return result if self.hook.dtype is None else cast_nest(result, self.hook.dtype)


class _Modes(threading.local):
    """The modes to leave, one for each module that a thread is inside of."""

    def __init__(self) -> None:
        self.stack: list[tuple[nn.Module, _InFp32]] = []


_MODES = _Modes()


class _Names:
    """Names as attributes, which a graph can set and not read; torch.compile guards on a set."""


class EnterFunctions:
    """Forward pre-hook: from here on the functions of these names are computed in fp32.

    `entries` maps names to the entries of keep_fp32 that name them. `dtype` is what the results
    leave in; None where autocast narrows again what must be narrow.
    """

    def __init__(self, entries: Mapping[str, str], dtype: torch.dtype | None) -> None:
        self.entries = dict(entries)
        self.dtype = dtype
        self.active = True
        self.called = _Names()

    def __call__(self, module: nn.Module, args: Any) -> None:
        mode = _InFp32(self)
        mode.__enter__()  # type: ignore[no-untyped-call]
        _MODES.stack.append((module, mode))


class LeaveFunctions:
    """Forward hook, called after exceptions too."""

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        stack = _MODES.stack
        # As with islands, an interruption may have left inner modules' modes behind.
        while stack and any(entered is module for entered, _ in stack):
            entered, mode = stack.pop()
            mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]
            if entered is module:
                return


class FunctionsInForce:
    """The functions that were computed in fp32 where and when this was made."""

    def __init__(self, hooks: Iterable[EnterFunctions]) -> None:
        self._hooks = tuple(hooks)

    @contextmanager
    def again(self) -> Iterator[None]:
        """Compute them in fp32 in a recomputation, which runs inside the module but not by it."""
        with ExitStack() as stack:
            for hook in self._hooks:
                stack.enter_context(_InFp32(hook))
            yield


def functions_in_force() -> FunctionsInForce:
    """Return what is in force in this thread, for a recomputation later."""
    return FunctionsInForce(mode.hook for _, mode in _MODES.stack)


def unused_functions(model: nn.Module) -> dict[str, str]:
    """Map ``module:function`` that was kept and never called to its entry of keep_fp32."""
    return {
        f"{name}:{function}": entry
        for name, module in model.named_modules()
        for hook in module._forward_pre_hooks.values()
        if isinstance(hook, EnterFunctions)
        for function, entry in hook.entries.items()
        if function not in vars(hook.called)
    }
