"""How the logits are cut: which tiles fit a budget, and which gradient is summed whole.

Logits of N tokens and V classes exist as tiles of n x v. What lives beside a tile is counted here:
widened blocks of both factors, the tile in 16 bits where products take it so, and the sums of the
gradient that is finished block by block.

Which gradient that is follows from bytes too. Going class block by class block, the rows of the
weight's gradient are finished one block after the other, and the gradient of the hidden states is
summed over all blocks, in fp32: N x D numbers, which is memory of its own only where that gradient
ends in 16 bits (in fp32 the sum *is* the gradient). Going token block by token block it is the
other way round, with V x D numbers. The cheaper order is taken.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from narrowcast.errors import UsageError

__all__ = ["Problem", "Tiling", "blocks"]

# Tensor cores and vector units work on aligned blocks; a remainder costs as much as a full one.
_ALIGNMENT = 64


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What one pass has to do: N, V and D, formats, and the gradients that are asked for."""

    tokens: int
    classes: int
    width: int
    hidden: torch.dtype
    weight: torch.dtype
    compute: torch.dtype
    """Format that both factors are rounded to before they are multiplied."""
    accumulate: torch.dtype
    narrow: bool
    """Products take factors in `compute` and give `accumulate`; else both are widened first."""
    hidden_gradient: bool = False
    weight_gradient: bool = False

    @property
    def sums_for_hidden(self) -> int:
        """Bytes of a whole sum that is not itself the gradient of the hidden states."""
        own = self.hidden_gradient and self.hidden != self.accumulate
        return self.accumulate.itemsize * self.tokens * self.width if own else 0

    @property
    def sums_for_weight(self) -> int:
        """Bytes of a whole sum that is not itself the gradient of the weight."""
        own = self.weight_gradient and self.weight != self.accumulate
        return self.accumulate.itemsize * self.classes * self.width if own else 0

    @property
    def by_class(self) -> bool:
        """Whether class blocks are the outer loop."""
        return self.sums_for_hidden <= self.sums_for_weight

    def bytes_beside(self) -> tuple[int, int, int]:
        """Bytes for each (number of a tile, token of a block, class of a block)."""
        wide, short = self.accumulate.itemsize, self.compute.itemsize
        widened = 0 if self.narrow or self.compute == self.accumulate else wide
        token = widened
        weight = widened + (short if self.weight != self.compute else 0)
        if self.narrow:  # a product is made and then added to its sum
            token += wide * self.hidden_gradient
            weight += wide * self.weight_gradient
        if self.by_class and self.sums_for_weight:
            weight += wide
        if not self.by_class and self.sums_for_hidden:
            token += wide
        backward = self.hidden_gradient or self.weight_gradient
        tile = wide + (short if self.narrow and backward else 0)
        return tile, token * self.width, weight * self.width


@dataclass(frozen=True, kw_only=True)
class Tiling:
    """Tiles of `tokens` x `classes` numbers, class blocks in the outer loop or token blocks."""

    tokens: int
    classes: int
    by_class: bool

    @classmethod
    def fitting(cls, problem: Problem, chunk_bytes: int) -> Tiling:
        """Return the most nearly square tiles that fit, for the most arithmetic per byte read."""
        tile, token, class_ = problem.bytes_beside()
        least = tile + token + class_
        if chunk_bytes < least:
            raise UsageError(
                f"chunk_bytes={chunk_bytes} is too little for one logit: it takes {least} bytes "
                f"with its blocks of {problem.width} numbers",
                hint="give some MiB; small tiles are slow",
            )
        half = (token + class_) / 2
        side = int((math.sqrt(half * half + tile * chunk_bytes) - half) / tile)
        classes = _aligned(side, problem.classes)
        tokens = _aligned(int((chunk_bytes - class_ * classes) / (tile * classes + token)),
                          problem.tokens)  # fmt: skip
        classes = _aligned(int((chunk_bytes - token * tokens) / (tile * tokens + class_)),
                           problem.classes)  # fmt: skip
        return cls(tokens=tokens, classes=classes, by_class=problem.by_class)


def _aligned(fits: int, wanted: int) -> int:
    """Return at least 1 and at most what fits and is wanted, aligned where it is large."""
    if fits >= wanted:
        return max(wanted, 1)
    return max(fits - fits % _ALIGNMENT if fits > _ALIGNMENT else fits, 1)


def blocks(count: int, size: int) -> Iterator[slice]:
    """Cut 0..count into slices of `size`."""
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))
