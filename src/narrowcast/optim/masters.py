"""Reading and writing whole weights through a store, range by range."""

from __future__ import annotations

import torch
from torch import Tensor

from narrowcast.optim.layout import flat_range, layout_of, scatter
from narrowcast.optim.step import CHUNK
from narrowcast.optim.weights import WeightStore

__all__ = ["read_master", "write_master"]


def read_master(store: WeightStore, weight: Tensor, remainder: Tensor | None) -> Tensor:
    """Return the fp32 numbers held: a new tensor laid out as the weight, or fp32 weights as is."""
    if store.dtype is torch.float32:
        return weight
    out = torch.empty_like(weight, dtype=torch.float32)
    layout, numel = layout_of(weight), weight.numel()
    for start in range(0, numel, CHUNK):
        stop = min(start + CHUNK, numel)
        parts = [
            None if t is None else flat_range(t, layout, start, stop)[0]
            for t in (weight, remainder)
        ]
        assert parts[0] is not None
        flat_range(out, layout, start, stop)[0].copy_(store.read(parts[0], parts[1]))
    return out


def write_master(
    store: WeightStore, value: Tensor, weight: Tensor, remainder: Tensor | None
) -> None:
    """Hold fp32 `value`, of the weight's shape; stores that round do so to nearest."""
    layout, numel = layout_of(weight), weight.numel()
    for start in range(0, numel, CHUNK):
        stop = min(start + CHUNK, numel)
        held, is_view = flat_range(weight, layout, start, stop)
        rest = None if remainder is None else flat_range(remainder, layout, start, stop)[0]
        store.write(flat_range(value, layout, start, stop)[0], held, rest, None)
        if not is_view:
            scatter(weight, layout, start, held)
