"""A tensor as the 1-D run of memory that it covers, and back."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Layout"]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Shape, and the order of dimensions in memory, outermost first."""

    shape: torch.Size
    order: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> Layout:
        strides = tensor.stride()
        # Of equal strides one is of a dimension of size 1 (or of an expanded one, not for us).
        order = sorted(range(tensor.dim()), key=lambda d: (-strides[d], -tensor.shape[d], d))
        return cls(shape=tensor.shape, order=tuple(order))

    def flat(self, tensor: Tensor) -> Tensor:
        """Return its numbers in the order of memory: a view if they are evenly spaced there.

        A slice with gaps, such as one head's part of a joint projection, is copied.
        """
        return tensor.detach().permute(self.order).reshape(-1)

    def tensor(self, flat: Tensor) -> Tensor:
        """Return the tensor whose numbers these are."""
        ordered = flat.view([self.shape[d] for d in self.order])
        back = sorted(range(len(self.order)), key=self.order.__getitem__)
        return ordered.permute(back)
