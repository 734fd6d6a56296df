"""Evaluation in fp32 from the stored weights, and the refusal to lose what is written meanwhile.

The fp32 tensors of such an evaluation are temporary. What somebody writes into them (a state dict
that is loaded, BatchNorm statistics) would end with them, without a word; so it is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from narrowcast.errors import UsageError
from narrowcast.precision.islands import (
    CastInputs,
    CastOutputs,
    restore_autocast,
    switch_autocast_off,
)

__all__ = ["Widen", "full_precision", "own_tensors"]

Widen = Callable[[Tensor], Tensor]
"""Gives the fp32 values that a 16-bit tensor of a model stands for."""


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
    version: int | None

    @classmethod
    def of(
        cls, path: str, module: nn.Module, slot: str, tensor: Tensor, widen: Widen
    ) -> _Widened:
        narrow = tensor.data
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
            version=_version(tensor),
        )

    def restore(self) -> None:
        self.tensor.data = self.narrow
        if self.slot in self.module._parameters:  # load_state_dict(assign=True) puts another there
            self.module._parameters[self.slot] = self.tensor  # type: ignore[assignment]

    def is_written(self) -> bool:
        """Whether something else is in the tensor, or in its place, than was put there.

        A buffer outside the state dict is scratch (a cache). One that was replaced is not lost.
        """
        if self.slot in self.module._parameters:
            if self.module._parameters[self.slot] is not self.tensor:
                return True
        elif self.slot in self.module._non_persistent_buffers_set:
            return False
        if self.tensor.data_ptr() != self.wide.data_ptr() or _version(self.tensor) != self.version:
            return True
        # Kernels of BatchNorm write without counting a version; buffers are small, so they are
        # compared bit by bit (NaN equals itself), which costs one sync each on CUDA.
        uncounted = self.version is None or self.slot in self.module._buffers
        return uncounted and not torch.equal(
            self.wide.view(torch.int32), self._as_it_was().view(torch.int32)
        )

    def _as_it_was(self) -> Tensor:
        """Widen once more what is stored."""
        self.tensor.data = self.narrow
        try:
            return self.widen(self.tensor)
        finally:
            self.tensor.data = self.wide


def _version(tensor: Tensor) -> int | None:
    """Return torch's count of writes; None under inference_mode, where torch keeps none."""
    return None if tensor.is_inference() else tensor._version


@contextmanager
def full_precision(model: nn.Module, widen: Widen = _to_fp32) -> Iterator[None]:
    """Run the model in fp32 from its stored weights, even inside somebody's autocast.

    Weights and buffers of less than four bytes are widened for the time being (which costs their
    fp32 size in memory), by `widen` where more is known of them than their own bits: a master that
    an optimizer keeps. Afterwards they are the same storage with the same bits. Training or
    evaluation mode is left alone. Raises UsageError at the end, with everything restored, if one
    of them was written to: the change would be lost.
    """
    narrow = {
        id(tensor): (path, module, slot, tensor)  # a shared weight once
        for path, module in model.named_modules()
        for slot, tensor in own_tensors(module)
        if tensor.element_size() < 4
    }.values()
    hooks = [
        hook
        for module in model.modules()
        for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
        if isinstance(hook, (CastInputs, CastOutputs)) and hook.active
    ]
    states = switch_autocast_off()
    widened: list[_Widened] = []
    written: list[str] = []
    try:
        for hook in hooks:
            hook.active = False
        widened.extend(_Widened.of(*entry, widen) for entry in narrow)
        yield
        written = [w.name for w in widened if w.is_written()]
    finally:
        for w in widened:
            w.restore()
        for hook in hooks:
            hook.active = True
        restore_autocast(states)
    if written:
        raise _lost(written)


def _lost(names: list[str]) -> UsageError:
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
