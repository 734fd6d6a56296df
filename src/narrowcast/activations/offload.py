"""Offload: what a module saves goes to the host's memory, and comes back for backward. Exact.

Storages travel, and not tensors: what several operations save of one storage goes once, and what
comes back has the very strides that it had, so that backward computes the same bits. On a CPU there
is nowhere to go: the host's memory is the one that is full.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_leaves

from narrowcast.activations.couriers import Courier, Sent, SimulatedCourier, cuda_courier
from narrowcast.activations.forward import Forward
from narrowcast.activations.saved import Around, Kept, Memory, Packed, handling_saved, is_weight
from narrowcast.errors import UsageError

__all__ = ["LEAST_BYTES", "Offload", "courier_for", "require_device"]

LEAST_BYTES = 2**16
"""Smaller storages stay: the bus moves 64 KiB in less time than it takes to ask it to."""


def courier_for(tensor: Tensor) -> Courier | None:
    """Return who takes a tensor off its device; None on a CPU, where nobody can.

    Fake tensors stand for those of a GPU, whatever device they name.
    """
    if isinstance(tensor, FakeTensor):
        return SimulatedCourier()
    return cuda_courier(tensor.device) if tensor.device.type == "cuda" else None


_CourierFor = Callable[[Tensor], Courier | None]


def require_device(module: nn.Module, name: str, courier_for: _CourierFor = courier_for) -> None:
    """Raise UsageError for a module whose weights nobody would take off their device."""
    weight = next(module.parameters(), None)
    if weight is not None and courier_for(weight) is None:
        raise UsageError(
            f"lever 'offload' on {name!r}, which is on {weight.device}: saved tensors would be "
            "moved from the host's memory to the host's memory",
            hint="move the model to a GPU first, or use lever='checkpoint' or 'int8' here",
        )


@dataclass(frozen=True)
class Offload:
    """Lever: what the module saves is held by the host."""

    courier_for: _CourierFor = courier_for
    name: str = "offload"
    computes: bool = False

    def run(self, module: nn.Module, inner: Forward, args: Any, kwargs: dict[str, Any]) -> Any:
        require_device(module, type(module).__name__, self.courier_for)
        region = _Region(self.courier_for, _alive_anyway(module, args, kwargs))
        with handling_saved(region.pack):
            return inner(*args, **kwargs)


def _alive_anyway(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> set[int]:
    """Return the storages of buffers, and of arguments without a gradient: batch, masks, tables."""
    given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    tensors = [*module.buffers(), *(t for t in given if not t.requires_grad)]
    return {t.untyped_storage()._cdata for t in tensors if t.layout is torch.strided}


class _Region:
    """One call of a module under offload."""

    def __init__(self, courier_for: _CourierFor, alive_anyway: set[int]) -> None:
        self._courier_for = courier_for
        self._alive_anyway = alive_anyway
        self._around = Around()
        self._memory = Memory()

    def pack(self, tensor: Tensor) -> Packed:
        courier = self._courier_for(tensor)
        if courier is None or not self._goes(tensor):
            return Kept(tensor, self._around)
        bytes_ = _bytes_of(tensor)
        sent = self._memory.find(bytes_, tensor._version)
        if sent is None:
            sent = courier.send(bytes_)
            self._memory.note(bytes_, tensor._version, sent)
        return _Away(tensor, sent)

    def _goes(self, tensor: Tensor) -> bool:
        return (
            tensor.layout is torch.strided
            and not hasattr(tensor, "__tensor_flatten__")
            and tensor.untyped_storage().nbytes() >= LEAST_BYTES
            and not is_weight(tensor)
            and tensor.untyped_storage()._cdata not in self._alive_anyway
        )


def _bytes_of(tensor: Tensor) -> Tensor:
    """Return all of a tensor's storage as a 1-D tensor of uint8, without copying."""
    size = tensor.untyped_storage().nbytes() // tensor.element_size()
    return tensor.detach().as_strided((size,), (1,), 0).view(torch.uint8)


class _Away(Packed):
    """A view of a storage that is not on the device."""

    def __init__(self, tensor: Tensor, sent: Sent) -> None:
        self._sent = sent
        self._dtype = tensor.dtype
        self._place = tensor.size(), tensor.stride(), tensor.storage_offset()

    def restore(self) -> Tensor:
        return self._sent.get().view(self._dtype).as_strided(*self._place)
