"""Which module is at work: in forward by a stack, in backward by the number of the autograd node.

Autograd numbers its nodes in the order of creation. Noting the next number whenever a module
starts or ends cuts the numbers into ranges, one a module call; in backward the number of the node
being executed falls into the range of the module that created it. This needs no hook on tensors,
so it holds for modules that are called several times, return no tensor, or feed nothing back.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.utils.hooks import RemovableHandle

__all__ = ["OUTSIDE", "ROOT", "ModuleTrace", "in_backward"]

OUTSIDE = "(outside modules)"
ROOT = "(model)"

_NextNumber = Callable[[], int]
# Private, but the only view of the counter; torch.fx and AOTAutograd read it in the same way.
_next_node_number: _NextNumber = torch._C._autograd._get_sequence_nr


def in_backward() -> bool:
    """Whether autograd is executing a graph on this thread."""
    return bool(torch._C._current_graph_task_id() != -1)


class _Ranges:
    """Node numbers of one thread, cut at module boundaries."""

    def __init__(self) -> None:
        self.starts: list[int] = []
        self.names: list[str] = []

    def cut(self, name: str) -> None:
        self.starts.append(_next_node_number())
        self.names.append(name)

    def name_of(self, number: int) -> str:
        place = bisect_right(self.starts, number) - 1
        return self.names[place] if place >= 0 else OUTSIDE


class ModuleTrace:
    """Follows module calls while entered; ``current()`` names the innermost module at work.

    `on_call(arguments, outermost=..., module=...)` is called before each forward; before that,
    `on_new(module)` if no `learn` has named the module.
    """

    def __init__(
        self,
        model: nn.Module | None,
        *,
        on_call: Callable[..., None],
        on_new: Callable[[nn.Module], None],
    ) -> None:
        self._names: dict[nn.Module, str] = {}
        self._owners: dict[int, str] = {}
        self._stack: list[str] = []
        self._depth_at_backward = 0
        self._outer_graph = -1
        self._last_backward_name = OUTSIDE
        self.run = 0
        """How many nodes of a graph have run so far, as far as operations showed them."""
        self._number = -1
        self._ranges: dict[int, _Ranges] = {}
        self._forward_thread = threading.get_ident()
        self._on_call = on_call
        self._on_new = on_new
        self._handles: list[RemovableHandle] = []
        if model is not None:
            self.learn(model)

    def learn(self, model: nn.Module) -> None:
        """Give names to a module and all below it; foreign roots are known by their class."""
        prefix = type(model).__name__ if self._names else ""
        for path, module in model.named_modules():
            name = ".".join(part for part in (prefix, path) if part) or ROOT
            self._names.setdefault(module, name)
            for parameter in module.parameters(recurse=False):
                self._owners.setdefault(id(parameter), name)

    def owner_of(self, parameter: torch.Tensor) -> str:
        """Name the module that a parameter is registered in."""
        return self._owners.get(id(parameter), OUTSIDE)

    def name_of(self, module: nn.Module) -> str:
        return self._names.get(module, OUTSIDE)

    def __enter__(self) -> ModuleTrace:
        self._handles = [
            register_module_forward_pre_hook(self._before),
            # Also after an exception: checkpointing ends its recomputation with one.
            register_module_forward_hook(self._after, always_call=True),
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def backward_starts(self) -> None:
        """Note the graph that begins; its nodes were created by the thread that ran forward."""
        self._depth_at_backward = len(self._stack)
        self._outer_graph = torch._C._current_graph_task_id()

    def recomputing(self) -> bool:
        """Whether a module's forward runs inside backward, as checkpointing does."""
        return len(self._stack) > self._depth_at_backward

    def current(self, *, backward: bool) -> str:
        """Name the innermost module at work."""
        if not backward or self.recomputing():
            return self._stack[-1] if self._stack else OUTSIDE
        node = torch._C._current_autograd_node()
        if node is not None:
            number = node._sequence_nr()
            if number != self._number:
                self._number = number
                self.run += 1
            self._last_backward_name = self._maker_of(node, number)
        return self._last_backward_name

    def _maker_of(self, node: Any, number: int) -> str:
        variable = getattr(node, "variable", None)  # AccumulateGrad has one, and no number
        if variable is not None:
            return self.owner_of(variable)
        # A graph inside the graph (reentrant checkpointing) was built by the thread that runs it.
        nested = torch._C._current_graph_task_id() != self._outer_graph
        thread = threading.get_ident() if nested else self._forward_thread
        ranges = self._ranges.get(thread)
        return ranges.name_of(number) if ranges is not None else OUTSIDE

    def _before(self, module: nn.Module, arguments: Any) -> None:
        if module not in self._names:
            self.learn(module)
            self._on_new(module)
        self._on_call(arguments, outermost=not self._stack, module=module)
        self._stack.append(self._names[module])
        self._cut()

    def _after(self, module: nn.Module, _arguments: Any, _result: Any) -> None:
        name = self._names.get(module, OUTSIDE)
        if name in self._stack:  # it is not, if the ledger was entered in the middle of a call
            while self._stack.pop() != name:
                pass
        self._cut()

    def _cut(self) -> None:
        thread = threading.get_ident()
        if not in_backward():
            self._forward_thread = thread
        name = self._stack[-1] if self._stack else OUTSIDE
        self._ranges.setdefault(thread, _Ranges()).cut(name)
