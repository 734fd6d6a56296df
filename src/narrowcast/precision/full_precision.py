"""Evaluation in fp32 from the stored weights, and the refusal to lose what is written meanwhile.

The fp32 tensors of such an evaluation are temporary. What somebody writes into them (a state dict
that is loaded, BatchNorm statistics) would end with them, without a word; so it is an error. What
the model's own forward pass writes in evaluation mode (rows that ``nn.Embedding(max_norm=1)``
brings down to size, the range that an observer has seen) is made again by every such pass: it ends
with them as well, and is told.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from narrowcast.errors import UsageError
from narrowcast.precision.functions import EnterFunctions
from narrowcast.precision.islands import (
    CastInputs,
    CastOutputs,
    restore_autocast,
    switch_autocast_off,
)

__all__ = ["Widen", "full_precision", "own_tensors"]

Widen = Callable[[Tensor], Tensor]
"""Gives the fp32 values that a 16-bit tensor of a model stands for."""


def _is_cut(tensor: Tensor) -> bool:
    """Whether this is a rank's part of a weight, a DTensor, which is widened where gathered."""
    return hasattr(tensor, "device_mesh")


def _to_fp32(tensor: Tensor) -> Tensor:
    return tensor.data.to(torch.float32)


@dataclass(frozen=True, kw_only=True)
class _Widened:
    """One 16-bit tensor of a model, while its data are an fp32 copy."""

    name: str
    module: nn.Module
    slot: str
    tensor: Tensor
    narrow: Tensor
    wide: Tensor
    widen: Widen

    @classmethod
    def of(cls, path: str, module: nn.Module, slot: str, tensor: Tensor, widen: Widen) -> _Widened:
        narrow = tensor.data
        # Tensors that are made under inference_mode would count no writes.
        with torch.inference_mode(mode=False), torch.no_grad():
            wide = widen(tensor)
        tensor.data = wide
        return cls(
            name=f"{path}.{slot}" if path else slot,
            module=module,
            slot=slot,
            tensor=tensor,
            narrow=narrow,
            wide=wide,
            widen=widen,
        )

    @property
    def is_parameter(self) -> bool:
        return self.slot in self.module._parameters

    @property
    def is_scratch(self) -> bool:
        """Whether this is a buffer outside the state dict: a cache."""
        return self.slot in self.module._non_persistent_buffers_set

    @property
    def writes(self) -> int | None:
        """How many torch counted; None for a tensor made under inference_mode, which has none."""
        return None if self.tensor.is_inference() else self.tensor._version

    def restore(self) -> None:
        self.tensor.data = self.narrow
        if self.is_parameter:  # load_state_dict(assign=True) puts another one there
            self.module._parameters[self.slot] = self.tensor  # type: ignore[assignment]

    def is_replaced(self) -> bool:
        """Whether something else is in a parameter's place, or in the tensor's."""
        if self.is_parameter and self.module._parameters[self.slot] is not self.tensor:
            return True
        return self.tensor.data_ptr() != self.wide.data_ptr()

    def differs(self) -> bool:
        """Whether kernels that count no writes, as those of BatchNorm, wrote all the same.

        Buffers are small, so they are compared bit by bit (NaN equals itself), which costs one sync
        each on CUDA.
        """
        if self.is_parameter and self.writes is not None:
            return False
        return not torch.equal(self.wide.view(torch.int32), self._as_it_was().view(torch.int32))

    def _as_it_was(self) -> Tensor:
        """Widen once more what is stored."""
        self.tensor.data = self.narrow
        try:
            return self.widen(self.tensor)
        finally:
            self.tensor.data = self.wide


class _Writes:
    """Tells what the model's own forward passes write from what is written in between.

    Before and after each outermost forward pass torch's counts of writes are looked at, which reads
    nothing from the device.
    """

    def __init__(self, widened: Sequence[_Widened]) -> None:
        self._widened = widened
        self._counts = [w.writes for w in widened]
        self._depth = 0
        self.own: set[str] = set()
        """Written by a forward pass in evaluation mode."""
        self.foreign: set[str] = set()

    def watch(self, model: nn.Module) -> list[RemovableHandle]:
        """Put hooks on every module: which one is called first is the caller's choice."""
        handles = []
        for module in model.modules():
            handles.append(module.register_forward_pre_hook(self._enter, prepend=True))
            handles.append(module.register_forward_hook(self._leave, always_call=True))
        return handles

    def _enter(self, module: nn.Module, args: Any) -> None:
        if torch.compiler.is_compiling():  # nothing of us belongs in a graph
            return
        if self._depth == 0:
            self.look(within=False)
        self._depth += 1

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if torch.compiler.is_compiling():
            return
        self._depth -= 1
        if self._depth == 0:
            self.look(within=True)

    def look(self, *, within: bool) -> None:
        """File what was written since the last look: `within` a forward pass, or outside of any."""
        for index, (w, count) in enumerate(zip(self._widened, self._counts, strict=True)):
            if w.writes != count:
                self._counts[index] = w.writes
                is_own = within and not w.module.training
                (self.own if is_own else self.foreign).add(w.name)


@contextmanager
def full_precision(model: nn.Module, widen: Widen = _to_fp32) -> Iterator[list[str]]:
    """Run the model in fp32 from its stored weights, even inside somebody's autocast.

    Weights and buffers of less than four bytes are widened for the time being (which costs their
    fp32 size in memory), by `widen` where more is known of them than their own bits: a master that
    an optimizer keeps. Afterwards they are the same storage with the same bits. Training or
    evaluation mode is left alone.

    Yields a list that holds, after the block, the names of those that the model's own forward pass
    wrote in evaluation mode. Raises UsageError at the end, with everything restored, if one of them
    was written to in any other way: the change would be lost.
    """
    narrow = {
        id(tensor): (path, module, slot, tensor)  # a shared weight once
        for path, module in model.named_modules()
        for slot, tensor in own_tensors(module)
        if tensor.element_size() < 4 and not _is_cut(tensor)
    }.values()
    hooks = [
        hook
        for module in model.modules()
        for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
        if isinstance(hook, (CastInputs, CastOutputs, EnterFunctions)) and hook.active
    ]
    states = switch_autocast_off()
    widened: list[_Widened] = []
    watching: list[RemovableHandle] = []
    rewritten: list[str] = []
    lost: list[str] = []
    try:
        for hook in hooks:
            hook.active = False
        widened.extend(_Widened.of(*entry, widen) for entry in narrow)
        watched = [w for w in widened if not w.is_scratch]
        writes = _Writes(watched)
        watching.extend(writes.watch(model) if watched else [])
        yield rewritten
        lost = _lost_writes(watched, writes)
        rewritten.extend(w.name for w in watched if w.name in writes.own)
    finally:
        for handle in watching:
            handle.remove()
        for w in widened:
            w.restore()
        for hook in hooks:
            hook.active = True
        restore_autocast(states)
    if lost:
        raise _refusal(lost)


def _lost_writes(watched: Sequence[_Widened], writes: _Writes) -> list[str]:
    """Name what was written by others than the model's own forward pass.

    A buffer that was replaced by another tensor is not lost.
    """
    writes.look(within=False)
    return [
        w.name
        for w in watched
        if w.name in writes.foreign or w.is_replaced() or (w.name not in writes.own and w.differs())
    ]


def _refusal(names: list[str]) -> UsageError:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return UsageError(
        f"{', '.join(names[:3])}{more} changed during an evaluation in full precision, and the "
        "change would be lost: the fp32 tensors are temporary; the stored values are as before",
        hint="load state and recalibrate BatchNorm outside full_precision() and "
        "engine.evaluating()",
    )


def own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield a module's own floating-point parameters and buffers."""
    for name, tensor in (*module._parameters.items(), *module._buffers.items()):
        if tensor is not None and tensor.is_floating_point():
            yield name, tensor
