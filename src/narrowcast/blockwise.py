"""Holds the moments of an optimizer in 8 or 4 bits an element, with one scale for each block.

    element = scale * grid(code)        scale = largest magnitude of the block, in bf16, rounded up
    signed    grid(q) = q |q| / C^2     C = 127 or 7: the first moment, finer near zero
    unsigned  grid(c) = c^4 / C^4       C = 255 or 15: the second moment, whose square root divides

The smallest number above zero is then 1/C^2 of the largest for m and for sqrt(v) alike (C of v is
twice that of m and one), and a second moment above zero never becomes zero: it gets at least code
1. So what is held of m / sqrt(v) is at most 16 times what it was, or (C of v / C of m)^2 < 4.6
times the ratio of the scales: bounded, and coarse where small and large numbers share a block.

Rounding is stochastic, between the two grid points around the number, so that its expectation is
the number. This matters more than the width of a code. With beta2 = 0.999 a second moment moves by
a thousandth a step, far less than half a grid step: rounding to nearest would never let it move.

Bound, stated and tested: between codes c and c + 1 the error is below the gap between them, which
is (1 + 1/c)^4 - 1 of the lower grid point for v and (1 + 1/c)^2 - 1 for m; with rounding to
nearest, half of it.

Non-finite numbers poison their block: it reads back as NaN or infinity. Numbers beyond the largest
bf16 number are held as that number.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["INT4_SIGNED", "INT4_UNSIGNED", "INT8_SIGNED", "INT8_UNSIGNED", "BlockCode"]

_BF16_MAX_BITS = 0x7F7F0000


@dataclass(frozen=True, kw_only=True)
class BlockCode:
    """Codes of `bits` bits, and a bf16 scale for each `block` elements."""

    bits: int
    signed: bool
    block: int
    """Even, so that two 4-bit codes of one byte share a block."""

    @property
    def top(self) -> int:
        """The largest code."""
        return (1 << (self.bits - 1)) - 1 if self.signed else (1 << self.bits) - 1

    def blocks(self, numel: int) -> int:
        """Return the number of scales of `numel` elements."""
        return -(-numel // self.block)

    def code_bytes(self, numel: int) -> int:
        """Return the bytes of the codes of `numel` elements."""
        return numel if self.bits == 8 else -(-numel // 2)

    def nbytes(self, numel: int) -> int:
        """Return the bytes of codes and scales of `numel` elements."""
        return self.code_bytes(numel) + 2 * self.blocks(numel)

    def zeros(self, numel: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return codes (uint8) and scales (bf16) that stand for zeros."""
        codes = torch.zeros(self.code_bytes(numel), dtype=torch.uint8, device=device)
        return codes, torch.zeros(self.blocks(numel), dtype=torch.bfloat16, device=device)

    def relative_gap(self, code: int) -> float:
        """Return the distance from grid(code) to grid(code + 1), relative to grid(code)."""
        return float((1 + 1 / code) ** (2 if self.signed else 4)) - 1

    def decode(self, codes: Tensor, scales: Tensor, numel: int) -> Tensor:
        """Return `numel` elements as fp32, flat."""
        grid = self._unpack(codes, numel).mul_(1 / self.top)
        grid.mul_(grid.abs() if self.signed else grid)
        if not self.signed:
            grid.mul_(grid)
        padded = _pad(grid, self.block)
        padded.view(-1, self.block).mul_(scales.to(torch.float32).unsqueeze(1))
        return padded[:numel]

    def encode(self, x: Tensor, codes: Tensor, scales: Tensor, noise: Tensor | None) -> None:
        """Write flat fp32 `x` into `codes` and `scales`.

        `noise` holds an integer in [0, 65535] for each element; without it, rounds to nearest.
        """
        if self.signed:
            ratio = _pad(x.abs(), self.block).view(-1, self.block)
            scale = _up_to_bf16(_largest(ratio))
            ratio.div_(scale.unsqueeze(1))
        else:
            padded = _pad(x, self.block).view(-1, self.block)
            scale = _up_to_bf16(padded.amax(1))
            ratio = padded.div(scale.unsqueeze(1))
        scales.copy_(scale)  # exact: the lower half of the pattern is zero
        # In units in which the grid points are the squares (fourth powers) of integers. A block of
        # zeros gives 0 / 0, and one that is not finite NaN and zeros: code 0 for all of them.
        target = ratio.mul_(self.top ** (2 if self.signed else 4)).nan_to_num_(0.0, 0.0, 0.0)
        rounded = self._rounded(target.view(-1)[: x.numel()], noise)
        self._pack(rounded.copysign_(x) if self.signed else rounded, codes)

    def _rounded(self, target: Tensor, noise: Tensor | None) -> Tensor:
        """Return codes and a half, which packing cuts off, for numbers in units of the grid.

        Works in place: a new tensor costs as much as two operations on one that is at hand.
        """
        low = target.sqrt()
        low = (low if self.signed else low.sqrt_()).floor_().clamp_(max=self.top - 1)
        if self.signed:  # (low + 1)^2 - low^2 = 2 (low + 1/2)
            width, least = 2.0, None
            place = target.addcmul_(low, low, value=-1.0).div_(low.add_(0.5))
        else:  # (low + 1)^4 - low^4 = 4 (low + 1/2) ((low + 1/2)^2 + 1/4)
            width, least = 4.0, target.sign()  # 1 for what is above zero
            square = low * low
            place = target.sub_(square.mul_(square))
            low.add_(0.5)
            place.div_(torch.mul(low, low, out=square).add_(0.25).mul_(low))
        # `place` runs from 0 at the lower grid point to `width` at the upper one. All products with
        # powers of two are exact, and so is the difference wherever it is near to the bound.
        if noise is not None:
            place.sub_(noise, alpha=width * 2.0**-16)
        bound = 0.5 * width * (1.0 if noise is None else 2.0**-16)
        low.add_(place.gt_(bound))  # in place, a comparison gives 0.0 and 1.0
        return low if least is None else torch.maximum(low, least, out=low)

    def _unpack(self, codes: Tensor, numel: int) -> Tensor:
        if self.bits == 8:
            return (codes.view(torch.int8) if self.signed else codes).to(torch.float32)
        # The element of even index is in the lower half of the byte, and comes first in memory.
        pair = codes.to(torch.int16)
        pair = pair.bitwise_or_(pair << 4).bitwise_and_(0x0F0F).view(torch.int8)[:numel]
        if self.signed:  # four bits in two's complement: 8 to 15 stand for -8 to -1
            pair.bitwise_xor_(8).sub_(8)
        return pair.to(torch.float32)

    def _pack(self, rounded: Tensor, codes: Tensor) -> None:
        if self.bits == 8:
            if self.signed:
                codes.view(torch.int8).copy_(rounded)
            else:  # by way of int16: from fp32 to uint8 directly takes three times as long
                codes.copy_(rounded.to(torch.int16))
            return
        pair = _pad(rounded.to(torch.int8).bitwise_and_(15), 2).view(torch.int16)
        codes.copy_(pair.bitwise_or(pair >> 4))  # keeps the lower byte


def _pad(flat: Tensor, block: int) -> Tensor:
    """Return `flat` with zeros behind it up to a whole number of blocks; itself if it has one."""
    missing = -flat.numel() % block
    return F.pad(flat, (0, missing)) if missing else flat


def _largest(magnitudes: Tensor) -> Tensor:
    """Return the largest of each row; as integers, which order magnitudes alike, NaN above all."""
    return magnitudes.view(torch.int32).amax(1).view(torch.float32)


def _up_to_bf16(largest: Tensor) -> Tensor:
    """Round magnitudes up to the next bf16 number, as fp32; finite ones stay finite."""
    bits = largest.nan_to_num(math.nan, math.inf, -math.inf).view(torch.int32)  # one kind of NaN
    up = bits.add(0xFFFF).bitwise_and_(~0xFFFF).clamp_(max=_BF16_MAX_BITS)
    # What is not finite, and nothing else, is above the largest number after rounding down.
    return torch.maximum(up, bits.bitwise_and(~0xFFFF)).view(torch.float32)


INT8_SIGNED = BlockCode(bits=8, signed=True, block=32)
INT8_UNSIGNED = BlockCode(bits=8, signed=False, block=32)
INT4_SIGNED = BlockCode(bits=4, signed=True, block=64)
INT4_UNSIGNED = BlockCode(bits=4, signed=False, block=64)
