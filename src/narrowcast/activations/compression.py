"""Compression: while a module runs, what autograd saves is packed into 8 bits, or into a mask.

Which tensors may be rounded depends on what the operation that saves them does with the numbers, so
operations are told apart by name, and only those on the lists below give up any bits:

    values   linear in the saved tensor (products: the gradient stays right in the mean), or smooth
             and bounded in it (GELU, norms, softmax, attention)
    signs    interested in nothing else (ReLU): one bit an element, and the gradient is exact
    others   keep the tensor: a logarithm or a division near 0 turns a rounded number into an inf

Kept whatever the operation: weights with their casts and views, tensors that get no gradient (the
batch, masks, buffers, dropout, statistics that norms and attention save), statistics with one
number a row, and small tensors. A tensor that several operations save is packed once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode  # the only way to know which operation saves a tensor

from narrowcast.activations.forward import Forward
from narrowcast.activations.layout import Layout
from narrowcast.activations.packing import Packing, packed_signs, signs
from narrowcast.activations.rounding_stream import RoundingStream
from narrowcast.activations.saved import Around, Kept, Memory, Packed, handling_saved, is_weight

__all__ = ["LEAST_NUMEL", "Compression"]

LEAST_NUMEL = 4096
"""Smaller tensors are kept: all of them together are not worth a kernel launch each."""


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_VALUES = _names(
    """linear conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d
    matmul mm bmm addmm addbmm baddbmm einsum mul mul_ multiply
    scaled_dot_product_attention multi_head_attention_forward
    layer_norm rms_norm group_norm instance_norm batch_norm narrow_norm
    square gelu silu mish glu softplus sigmoid tanh softmax"""
)
_SIGNS = _names("relu relu_ leaky_relu leaky_relu_")
_FORMATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Compression:
    """Lever: what the module saves is held in `packing`, rounded with numbers of `stream`."""

    packing: Packing
    stream: RoundingStream
    computes: bool = False

    @property
    def name(self) -> str:
        return self.packing.name

    def run(self, module: nn.Module, inner: Forward, args: Any, kwargs: dict[str, Any]) -> Any:
        region = _Region(self)
        with handling_saved(region.pack), region.operation:
            return inner(*args, **kwargs)


class _Operation(TorchFunctionMode):
    """Knows the torch function that is running, as it was called: ``F.gelu`` is 'gelu'."""

    def __init__(self) -> None:
        super().__init__()
        self.name = ""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        before, self.name = self.name, _name_of(func, args)
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self.name = before


def _name_of(func: Any, args: Any) -> str:
    name = getattr(func, "__name__", "")
    # The slope of x^2 is linear in x; that of other powers may be anything.
    if name == "pow" and args and isinstance(args[-1], (int, float)) and args[-1] == 2:
        return "square"
    return name


class _Region:
    """One call of a module under compression."""

    def __init__(self, lever: Compression) -> None:
        self.operation = _Operation()
        self._lever = lever
        self._around = Around()
        self._memory = Memory()

    def pack(self, tensor: Tensor) -> Packed:
        if self.operation.name in _SIGNS and _is_activation(tensor):
            return self._signs(tensor)
        if self.operation.name in _VALUES and _is_activation(tensor):
            return self._rounded(tensor)
        return Kept(tensor, self._around)

    def _rounded(self, tensor: Tensor) -> Packed:
        packing, stream = self._lever.packing, self._lever.stream
        layout = Layout.of(tensor)
        flat = layout.flat(tensor)
        # Several shapes of one memory are packed once; what had to be copied is known by itself.
        copied = flat.untyped_storage()._cdata != tensor.untyped_storage()._cdata
        source = tensor if copied else flat
        packed = self._memory.find(source, packing.name)
        if packed is None:
            packed = packing.pack(flat, stream.next(flat.device))
            self._memory.note(source, packing.name, packed)
        unpack = partial(packing.unpack, numel=flat.numel(), dtype=flat.dtype)
        return _Bytes(packed, layout, unpack, self._around)

    def _signs(self, tensor: Tensor) -> Packed:
        layout = Layout.of(tensor)
        unpack = partial(signs, numel=tensor.numel(), dtype=tensor.dtype)
        return _Bytes(packed_signs(layout.flat(tensor)), layout, unpack, self._around)


def _is_activation(tensor: Tensor) -> bool:
    """Whether a saved tensor is a large activation on the way to a gradient."""
    return (
        tensor.dtype in _FORMATS
        and tensor.numel() >= LEAST_NUMEL
        and tensor.requires_grad
        and not hasattr(tensor, "__tensor_flatten__")
        and tensor.layout is torch.strided
        and not is_weight(tensor)
        and not _is_statistic(tensor)
        and 0 not in tensor.stride()
    )


def _is_statistic(tensor: Tensor) -> bool:
    """Whether there is one number a row, or the operation returns the tensor beside its result."""
    one_a_row = tensor.dim() > 1 and tensor.shape[-1] == 1
    return one_a_row or (tensor.output_nr > 0 and not tensor._is_view())


class _Bytes(Packed):
    """One saved tensor, held as bytes; another one may hold the same."""

    def __init__(
        self, packed: Tensor, layout: Layout, unpack: Callable[[Tensor], Tensor], around: Around
    ) -> None:
        self._layout = layout
        self._unpack = unpack
        self._around = around
        self._held = around.hold(packed)

    def restore(self) -> Tensor:
        return self._layout.tensor(self._unpack(self._around.get(self._held)))
