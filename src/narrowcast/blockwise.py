"""Holds the moments of an optimizer in 8 or 4 bits an element, with one scale for each block.

    element = scale * grid(code)        scale = largest magnitude of the block, in bf16, rounded up
    signed    grid(q) = q |q| / C^2     C = 127 or 7: the first moment, finer near zero
    unsigned  grid(c) = c^4 / C^4       C = 255 or 15: the second moment, whose square root divides

The smallest number above zero is then 1/C^2 of the largest for m and for sqrt(v) alike (C of v is
twice that of m and one), so that m / sqrt(v) cannot explode where both are small. A second moment
above zero never becomes zero: it gets at least code 1.

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

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["INT4_SIGNED", "INT4_UNSIGNED", "INT8_SIGNED", "INT8_UNSIGNED", "BlockCode"]

_BF16_MAX_BITS = 0x7F7F0000
_INFINITY_BITS = 0x7F800000


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
        padded = _pad(x, self.block)
        by_block = padded.view(-1, self.block)
        largest = by_block.amax(1)
        if self.signed:
            largest = torch.maximum(largest, -by_block.amin(1))
        scale = _up_to_bf16(largest)
        scales.copy_(scale)  # exact: the lower half of the pattern is zero
        # A block of zeros has scale zero, and zero divided by one is the same zero.
        ratio = by_block.div(scale.masked_fill_(scale == 0, 1.0).unsqueeze(1))
        self._pack(self._rounded(ratio.view(-1)[: x.numel()], noise), codes)

    def _rounded(self, ratio: Tensor, noise: Tensor | None) -> Tensor:
        """Return the codes of numbers relative to their scale, as fp32 integers."""
        top = self.top
        magnitude = ratio.abs() if self.signed else ratio
        # In units in which the grid points are the squares (fourth powers) of integers.
        target = (magnitude * float(top**2 if self.signed else top**4)).nan_to_num_(0.0, 0.0, 0.0)
        least = target.clamp(max=1.0).ceil_()  # 1 for what is above zero
        low = target.sqrt()
        low = (low if self.signed else low.sqrt_()).floor_().clamp_(max=top - 1)
        square = low * low
        twice = low.mul(2.0).add_(1.0)  # (low + 1)^2 - low^2
        if self.signed:
            fraction = target.sub_(square).div_(twice)
        else:  # (low + 1)^4 - low^4 = ((low + 1)^2 - low^2) ((low + 1)^2 + low^2)
            gap = twice.mul_((square * 2.0).add_(low * 2.0).add_(1.0))
            fraction = target.sub_(square.mul_(square)).div_(gap)
        threshold = 0.5 if noise is None else noise.to(torch.float32).add_(0.5).mul_(2.0**-16)
        # Up by one where the fraction is above the threshold; comparisons would be slower.
        low.add_(fraction.sub_(threshold).ceil_().clamp_(0.0, 1.0))
        return low.copysign_(ratio) if self.signed else torch.maximum(low, least, out=low)

    def _unpack(self, codes: Tensor, numel: int) -> Tensor:
        if self.bits == 8:
            return (codes.view(torch.int8) if self.signed else codes).to(torch.float32)
        # The element of even index is in the lower half of the byte.
        pair = torch.stack((codes & 15, codes >> 4), dim=1).view(-1)[:numel]
        if self.signed:  # four bits in two's complement: 8 to 15 stand for -8 to -1
            return pair.view(torch.int8).bitwise_xor(8).sub_(8).to(torch.float32)
        return pair.to(torch.float32)

    def _pack(self, rounded: Tensor, codes: Tensor) -> None:
        if self.bits == 8:
            (codes.view(torch.int8) if self.signed else codes).copy_(rounded)
            return
        narrow = rounded.to(torch.int8).bitwise_and_(15).view(torch.uint8)
        pairs = _pad(narrow, 2).view(-1, 2)
        torch.bitwise_or(pairs[:, 0], pairs[:, 1] << 4, out=codes)


def _pad(flat: Tensor, block: int) -> Tensor:
    """Return `flat` with zeros behind it up to a whole number of blocks; itself if it has one."""
    missing = -flat.numel() % block
    return F.pad(flat, (0, missing)) if missing else flat


def _up_to_bf16(largest: Tensor) -> Tensor:
    """Round magnitudes up to the next bf16 number, as fp32; finite ones stay finite."""
    bits = largest.view(torch.int32)
    up = bits.add(0xFFFF).bitwise_and_(~0xFFFF)
    up = torch.where(bits < _INFINITY_BITS, up.clamp_(max=_BF16_MAX_BITS), _INFINITY_BITS)
    rounded = up.view(torch.float32)
    return torch.where(largest.isnan(), largest.new_tensor(float("nan")), rounded)


INT8_SIGNED = BlockCode(bits=8, signed=True, block=32)
INT8_UNSIGNED = BlockCode(bits=8, signed=False, block=32)
INT4_SIGNED = BlockCode(bits=4, signed=True, block=64)
INT4_UNSIGNED = BlockCode(bits=4, signed=False, block=64)
