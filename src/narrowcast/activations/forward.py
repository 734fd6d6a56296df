"""What stands in a module's place of ``forward`` while levers are on it.

A wrapper round ``forward``, and neither hooks nor a wrapping module: ``with`` blocks end after a
KeyboardInterrupt too, where hooks do not run; names in the state dict stay; hooks of the module
itself (fp32 islands, the user's) run outside, once. The wrapper is an attribute of the instance:
a deep copy (an EMA) and a pickle take their own along, and the module's class stays what it is.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch
from torch import nn

__all__ = ["Lever", "LeveredForward", "levered", "put", "take_off"]

Forward = Callable[..., Any]


class Lever(Protocol):
    """One way to run a module's forward, round what is inside of it."""

    @property
    def name(self) -> str:
        """The lever's name in a rule."""
        ...

    @property
    def computes(self) -> bool:
        """Whether it changes how the module computes, and so acts in evaluation too."""
        ...

    def run(self, module: nn.Module, inner: Forward, args: Any, kwargs: dict[str, Any]) -> Any:
        """Return what ``inner(*args, **kwargs)`` returns."""
        ...


class LeveredForward:
    """Callable in the place of ``module.forward``: the levers, outermost first, and its own inside.

    Levers on saved tensors act while the module is training and gradients are recorded, and never
    else. The module is held weakly, as it holds this: it must die when its last user lets it go.
    """

    def __init__(self, module: nn.Module, levers: tuple[Lever, ...]) -> None:
        self.levers = levers
        self.was_used = False
        self.replaced: Forward | None = module.__dict__.get("forward")
        """What somebody else had put into the instance before."""
        self._module = weakref.ref(module)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module = self._held()
        saves = module.training and torch.is_grad_enabled()
        if saves:
            self.was_used = True  # written, never read: torch.compile guards on what a graph reads
        call = self.own()
        for lever in reversed(self.levers):
            if saves or lever.computes:
                call = partial(_run, lever, module, call)
        return call(*args, **kwargs)

    def own(self) -> Forward:
        """Return the module's forward without levers."""
        if self.replaced is not None:
            return self.replaced
        module = self._held()
        if torch.compiler.is_compiling():  # which does not know __get__ (torch 2.11)
            return partial(type(module).forward, module)
        own: Forward = type(module).forward.__get__(module)
        return own

    @property
    def __signature__(self) -> inspect.Signature:
        """Show the module's own signature: data collators read it to choose columns."""
        return inspect.signature(self.own())

    def _held(self) -> nn.Module:
        module = self._module()
        assert module is not None, "a levered forward has outlived its module"
        return module

    def __getstate__(self) -> dict[str, Any]:
        """Name the module itself, for which pickle and deepcopy put the new one."""
        return {**self.__dict__, "_module": self._held()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _module=weakref.ref(state["_module"]))


def _run(lever: Lever, module: nn.Module, inner: Forward, *args: Any, **kwargs: Any) -> Any:
    return lever.run(module, inner, args, kwargs)


def levered(module: nn.Module) -> LeveredForward | None:
    """Return the wrapper on this very module, None without one."""
    found = module.__dict__.get("forward")
    return found if isinstance(found, LeveredForward) else None


def put(module: nn.Module, levers: tuple[Lever, ...]) -> None:
    """Put levers on a module that has none."""
    # Not through Module.__setattr__, which looks for parameters and modules.
    object.__setattr__(module, "forward", LeveredForward(module, levers))


def take_off(module: nn.Module) -> None:
    """Take our wrapper off a module, and put back what it replaced."""
    found = levered(module)
    if found is None:
        return
    object.__delattr__(module, "forward")
    if found.replaced is not None:
        object.__setattr__(module, "forward", found.replaced)
