"""Sees every operation of a step below autograd: what it made, what it read, in which phase.

Phases are found, not told. Autograd says when it executes a graph; a module's forward outside of
one begins (or goes on with) the forward phase; what comes after backward until then belongs to the
update: unscaling, clipping, the optimizer.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import _engine_run_backward
from torch.utils._python_dispatch import TorchDispatchMode

from narrowcast.memory.attribution import Moment
from narrowcast.memory.modules import OUTSIDE, ModuleTrace, in_backward
from narrowcast.memory.storages import Holding, Role, StorageBook, tensors_in

__all__ = ["BACKWARD", "FORWARD", "OPTIMIZER", "Watch"]

FORWARD, BACKWARD, OPTIMIZER = "forward", "backward", "optimizer"

_aten = torch.ops.aten
_DEVICE = torch.ops.prim.device.default
_ENGINE = _engine_run_backward.__code__
# What is found on the stack between a mode and the mode above it, or the engine.
_BETWEEN = ("torch._ops", "torch._compile", "torch._dynamo.eval_frame")
# Their argument was made a moment ago, below the dispatcher: it is new, not found.
_BIRTHS = {_aten.lift_fresh.default, _aten.lift_fresh_copy.default, _aten.lift.default}


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees every operation below autograd and notes what it made, read and left alive."""

    def __init__(self, book: StorageBook, trace: ModuleTrace) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.moments: list[Moment] = []
        self.highest = 0
        """Most bytes that a mode sees, torch's MemTracker too, before `_see_sum` corrects them."""
        self.phase = FORWARD
        self.is_paused = False
        """Whether operations go by unseen; what dies meanwhile is noted."""
        self._quiet = False
        self._unpacked = False
        self._book = book
        self._trace = trace
        self._recomputed: list[Holding] = []

    def mark(self, module: str) -> None:
        """Note the state as it is now."""
        book = self._book
        self.highest = max(self.highest, book.total)
        self.moments.append(Moment(len(book.log), self.phase, module, book.total))

    def forget(self) -> None:
        """Drop the moments so far."""
        self._book.settle()
        self.moments.clear()
        self.highest = 0

    def pack(self, tensor: Tensor) -> Tensor:
        """Learn what autograd saves, and hold it without its graph: an output would keep itself."""
        holding = self._book.find(tensor)
        if holding is not None:
            holding.claim(Role.ACTIVATION)
        if not tensor.requires_grad:
            return tensor
        self._quiet = True  # this operation is ours and not the step's
        try:
            return tensor.detach()
        finally:
            self._quiet = False

    def unpack(self, tensor: Tensor) -> Tensor:
        """Give back what was saved; autograd detaches it first, because there are hooks."""
        self._unpacked = True
        return tensor

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _DEVICE:  # a fake tensor is asked where it is, which is no operation
            return args[0].device
        # Wrapper subclasses (DTensor and the like) come apart first; their parts are seen here.
        if any(hasattr(kind, "__tensor_flatten__") for kind in types):
            return NotImplemented
        kwargs = kwargs or {}
        self._book.settle()
        unpacked, self._unpacked = self._unpacked, False
        hidden = self.is_paused or self._quiet
        if hidden or (unpacked and func is _aten.detach.default):
            return func(*args, **kwargs)
        module = self._locate()
        if func not in _BIRTHS:
            _each(args, self._book.read, module)
            if kwargs:
                _each(tuple(kwargs.values()), self._book.read, module)
        result = func(*args, **kwargs)
        _each(result, self._book.made, module)
        if func is _aten._to_copy.default:
            self._see_copy(args[0], result)
        if self._trace.recomputing() and self.phase == BACKWARD:
            self._remember(result)
        self.mark(module)
        if func is _aten.add.Tensor and self.phase == BACKWARD and len(args) == 2:
            self._see_sum(args[0], args[1], result)
        return result

    def _see_sum(self, old: Any, new: Any, total: Tensor) -> None:
        """Know a sum that autograd would make in place of `old`, if no mode were watching.

        Where two gradients of one tensor meet, it adds the second to the first, if the first has
        no other owner (torch/csrc/autograd/input_buffer.cpp, can_accumulate_inplace). Any mode
        makes a third tensor of it, which a step without a ledger does not take. The first has no
        other owner if it goes before anything else is done (`StorageBook.expect`).
        """
        if torch.is_grad_enabled() or not (isinstance(old, Tensor) and isinstance(new, Tensor)):
            return
        first, made = self._book.find(old), self._book.find(total)
        if (
            first is not None
            and made is not None
            and first.run != self._trace.run  # else a product within the formula of this node
            and old.shape == new.shape
            and old.layout is new.layout is torch.strided
            and not old._is_view()  # it holds its base, and the base the storage
            and _is_dense(old)
            and _is_called_by_engine()
        ):
            self._book.expect(first, made, self._amend)

    def _amend(self, size: int) -> None:
        """Take a sum out of the moment in which it was noted: it was in place."""
        last = self.moments[-1]
        self.moments[-1] = last._replace(logged=last.logged - 1, bytes=last.bytes - size)

    def _locate(self) -> str:
        """Bring the phase up to date and name the module at work."""
        backward = in_backward()
        if backward:
            if self.phase != BACKWARD:
                self.phase = BACKWARD
                self._trace.backward_starts()
            if self._recomputed and not self._trace.recomputing():
                self._keep_recomputed()
        elif self.phase == BACKWARD:
            # Backward is over and no module has been called since: unscaling, clipping, updating.
            self.phase = OPTIMIZER
        module = self._trace.current(backward=backward)
        self._book.run = self._trace.run
        return "(optimizer)" if module == OUTSIDE and self.phase == OPTIMIZER else module

    def _see_copy(self, source: Tensor, copy: Tensor) -> None:
        """Tell apart the copies that matter: a batch moved here, weights in another format."""
        made = self._book.find(copy)
        if made is None:
            return
        if source.device != copy.device:
            if self.phase == FORWARD:
                made.claim(Role.INPUT, "(inputs)")
            return
        origin = self._book.find(source)
        if origin is None or copy.dtype == source.dtype:
            return
        if origin.role == Role.PARAMETER:
            made.claim(Role.CAST, origin.module)
        elif origin.role == Role.GRADIENT:  # a gradient summed in another format is one still
            made.claim(Role.GRADIENT, origin.module)

    def _remember(self, result: Any) -> None:
        for tensor in tensors_in(result):
            holding = self._book.find(tensor)
            if holding is not None and holding.role == Role.TEMPORARY:
                self._recomputed.append(holding)

    def _keep_recomputed(self) -> None:
        """Take what outlives a recomputation for activations: checkpointing holds nothing else.

        Its own hooks on saved tensors hide them from ours.
        """
        for holding in self._recomputed:
            if holding.bytes:
                holding.claim(Role.ACTIVATION)
        self._recomputed.clear()


def _is_dense(tensor: Tensor) -> bool:
    """Whether elements fill a stretch of storage, in whatever order of dimensions."""
    filled = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride != filled:
                return False
            filled *= size
    return True


def _is_called_by_engine() -> bool:
    """Whether autograd's engine itself called the operation at hand, through modes at most."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and (
        frame.f_code.co_name == "__torch_dispatch__" or frame.f_globals["__name__"] in _BETWEEN
    ):
        frame = frame.f_back
    return frame is None or frame.f_code is _ENGINE  # None: a thread of the engine's own


def _each(value: Any, note: Callable[[Tensor, str], None], module: str) -> None:
    """Note every tensor among an operation's arguments or results."""
    if isinstance(value, Tensor):
        note(value, module)
    elif isinstance(value, (tuple, list)):
        for item in value:
            _each(item, note, module)
