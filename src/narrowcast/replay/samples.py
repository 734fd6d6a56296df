"""A few elements of a tensor, the same places each time: enough to compare two runs by."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from narrowcast.replay.flow import real_parts

__all__ = ["sample"]


@torch.no_grad()
def sample(tensor: Tensor, size: int) -> Tensor:
    """Return at most `size` elements in fp32 on the same device, spread evenly; a copy.

    Of 4,096 elements the rms is that of the whole tensor within some 2 % (normal values: a
    standard error of 1 / sqrt(2 * 4096) = 1.1 %).
    """
    values = real_parts(tensor.detach())
    if values.layout is not torch.strided:
        values = values.to_dense()
    flat = values.reshape(-1)
    if flat.numel() > size:
        flat = flat[_places(flat.numel(), size, flat.device)]
    return flat.to(torch.float32, copy=True)


@lru_cache(maxsize=256)
def _places(numel: int, size: int, device: torch.device) -> Tensor:
    """Return multiples of the golden ratio of the length: they favour no row and no column."""
    stride = round(numel * 0.6180339887)
    while math.gcd(stride, numel) != 1:
        stride += 1
    return torch.arange(size, device=device).mul_(stride).remainder_(numel)
