"""Parameters as flat runs of elements, in the order of their storage, whatever their strides.

A step works on ranges of the flat tensor. Where storage has no holes a range is a view; a tensor
with holes (a slice used as a parameter), or a gradient laid out unlike its parameter, is gathered
range by range, so that no copy of the whole is ever made.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["Layout", "flat_range", "is_dense", "layout_of", "scatter"]

Layout = tuple[int, ...]
"""Dimensions of more than one element from the outermost to the innermost; () for row-major."""


def layout_of(tensor: Tensor) -> Layout:
    """Return the order in which storage runs through the dimensions."""
    if tensor.is_contiguous():
        return ()
    sizes, strides = tensor.shape, tensor.stride()
    order = sorted((d for d in range(tensor.dim()) if sizes[d] > 1), key=lambda d: -strides[d])
    return () if order == sorted(order) else tuple(order)


def _in_order(tensor: Tensor, layout: Layout) -> Tensor:
    """Return a view whose rows run in the order of the layout."""
    if not layout:
        return tensor
    rest = [d for d in range(tensor.dim()) if d not in layout]  # of size one
    return tensor.permute(*layout, *rest)


def is_dense(tensor: Tensor, layout: Layout) -> bool:
    """Whether storage runs through the tensor in the order of the layout, without holes."""
    return _in_order(tensor, layout).is_contiguous()


def flat_range(tensor: Tensor, layout: Layout, start: int, stop: int) -> tuple[Tensor, bool]:
    """Return elements `start` to `stop` in the order of `layout`, and whether they are a view."""
    ordered = _in_order(tensor, layout)
    if ordered.is_contiguous():
        return tensor.as_strided((stop - start,), (1,), tensor.storage_offset() + start), True
    return ordered[_indices(ordered.shape, start, stop, tensor.device)].reshape(-1), False


def scatter(tensor: Tensor, layout: Layout, start: int, values: Tensor) -> None:
    """Write a gathered range back."""
    ordered = _in_order(tensor, layout)
    ordered[_indices(ordered.shape, start, start + values.numel(), tensor.device)] = values


def _indices(
    shape: Sequence[int], start: int, stop: int, device: torch.device
) -> tuple[Tensor, ...]:
    """Return the coordinates of flat row-major positions `start` to `stop`."""
    assert stop <= math.prod(shape)
    return torch.unravel_index(torch.arange(start, stop, device=device), tuple(shape))
