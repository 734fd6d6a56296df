"""Eight bits, or one, for each number of an activation: the formats of compressed saved tensors.

    int8   x = q * s       q in -127..127         1 byte an element, 2 bytes a group of 128
    e4m3   x = f * s       f a float8 (e4m3fn)    the same
    signs  not x <= 0                             1 bit an element

s is a power of two for each group of 128 numbers that follow each other in memory, the least with
which the largest number of the group fits. Being a power of two makes everything but the rounding
exact: x / s, and q * s in bf16, fp16 and fp32 alike (7 bits, or 4, never need more than a bf16
holds). With any other scale, restoring to bf16 would round once more, and always the same way.

Rounding is stochastic, up with a probability equal to the part that is cut off, so that the number
is right in the mean. Uniform numbers come as k / 2**24, hence the mean is off by at most 2**-24 of
a step. The error of one number is less than a step, and its variance at most a quarter of a step's
square. A step is s for int8, at most a 63.5th of the group's largest number; for e4m3 an eighth of
the power of two below the number, and at least s / 512.

Only what would be rounded up beyond the largest number of its dtype becomes that number.

A group with an inf or a NaN is restored as NaN throughout: nothing that broke is hidden.
Temporaries are those of a chunk: a sixteenth of the tensor, but at least 32,768 and at most a
million numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["GROUP", "PACKINGS", "Packing", "packed_bytes", "packed_signs", "signs"]

GROUP = 128
# Temporaries of a chunk are up to 17 bytes a number: a chunk must be small beside what is packed,
# and large beside the time that a dozen kernels take to start. Multiples of the group and of 8.
_CHUNKS = 16
_LEAST_CHUNK, _LARGEST_CHUNK = 2**15, 2**20
# Least scale: below it, s itself would be subnormal and may be flushed to zero on a GPU.
_LEAST_EXPONENT = -126
_FP16_LEAST_EXPONENT = -24  # all multiples of 2**-24 that an fp16 can reach, it holds


@dataclass(frozen=True, kw_only=True)
class Packing:
    """A format of one byte an element and one bf16 scale a group."""

    name: str
    dtype: torch.dtype
    largest: float
    round: Callable[[Tensor, torch.Generator], Tensor]
    """Rounds fp32 numbers, at most `largest`, to the format's, in place or not."""

    def nbytes(self, numel: int) -> int:
        """Return the bytes that hold `numel` elements: 1.0156 each in whole groups."""
        return numel + 2 * -(-numel // GROUP)

    def pack(self, flat: Tensor, generator: torch.Generator) -> Tensor:
        """Return the bytes for a 1-D tensor of fp32, bf16 or fp16, as a 1-D tensor of uint8."""
        packed = flat.new_empty(self.nbytes(flat.numel()), dtype=torch.uint8)
        scales, codes = self._parts(packed, flat.numel())
        least = _FP16_LEAST_EXPONENT if flat.dtype == torch.float16 else _LEAST_EXPONENT
        for part in _slices(flat.numel()):
            x = _grouped(flat[part].float())
            s = _scales(x, self.largest, least)
            x = (x / s).nan_to_num_(0.0)  # not in place: x may be the activation itself
            codes[part] = self.round(x, generator).flatten()[: part.stop - part.start]
            scales[_shrunk(part, GROUP)] = s.flatten()
        return packed

    def unpack(self, packed: Tensor, numel: int, dtype: torch.dtype) -> Tensor:
        """Return the 1-D tensor of `numel` elements of `dtype` that the bytes stand for."""
        scales, codes = self._parts(packed, numel)
        flat = packed.new_empty(numel, dtype=dtype)
        largest = torch.finfo(dtype).max  # the next code up may be beyond; NaN stays NaN
        for part in _slices(numel):
            s = scales[_shrunk(part, GROUP)].float().unsqueeze(1)
            x = _grouped(codes[part].float()).mul_(s).clamp_(-largest, largest)
            flat[part] = x.flatten()[: part.stop - part.start]
        return flat

    def _parts(self, packed: Tensor, numel: int) -> tuple[Tensor, Tensor]:
        """View the bytes as scales, which come first to be aligned, and codes."""
        scale_bytes = self.nbytes(numel) - numel
        return packed[:scale_bytes].view(torch.bfloat16), packed[scale_bytes:].view(self.dtype)


def packed_signs(flat: Tensor) -> Tensor:
    """Return a bit for each number of a 1-D tensor, set unless it is <= 0 (so for NaN); uint8.

    That is how the backward of ReLU reads its result.
    """
    bits = flat.new_empty(-(-flat.numel() // 8), dtype=torch.uint8)
    weights = _bit_weights(flat.device)
    for part in _slices(flat.numel()):
        positive = (flat[part] <= 0).logical_not_().to(torch.uint8)
        eights = F.pad(positive, (0, -positive.numel() % 8)).view(-1, 8)
        bits[_shrunk(part, 8)] = eights.mul_(weights).sum(1, dtype=torch.uint8)
    return bits


def signs(bits: Tensor, numel: int, dtype: torch.dtype) -> Tensor:
    """Return 1 where a bit of `packed_signs` is set and 0 elsewhere; 1-D, of `dtype`."""
    flat = bits.new_empty(numel, dtype=dtype)
    weights = _bit_weights(bits.device)
    for part in _slices(numel):
        positive = (bits[_shrunk(part, 8)].unsqueeze(1) & weights) != 0
        flat[part] = positive.flatten()[: part.stop - part.start]
    return flat


def packed_bytes(numel: int) -> int:
    """Return the bytes of `packed_signs`."""
    return -(-numel // 8)


def _slices(numel: int) -> Iterator[slice]:
    sixteenth = -(-numel // (_CHUNKS * GROUP)) * GROUP
    step = min(max(sixteenth, _LEAST_CHUNK), _LARGEST_CHUNK)
    yield from (slice(start, min(start + step, numel)) for start in range(0, numel, step))


def _shrunk(part: slice, size: int) -> slice:
    """Return the slice of pieces of `size` elements that a slice of elements covers."""
    return slice(part.start // size, -(-part.stop // size))


def _grouped(flat: Tensor) -> Tensor:
    """View as (groups, 128), the last one filled up with zeros."""
    return F.pad(flat, (0, -flat.numel() % GROUP)).view(-1, GROUP)


def _scales(x: Tensor, largest: float, least_exponent: int) -> Tensor:
    """Return for each group the least power of two s with max|x| <= largest * s; fp32, (G, 1).

    inf where the group holds an inf, NaN where it holds a NaN.
    """
    amax = x.abs().amax(1, keepdim=True)
    # frexp: amax / largest = m * 2**e with m in [0.5, 1), so 2**e is above it by at most a half;
    # for m = 0.5 the power of two below is it exactly.
    mantissa, exponent = torch.frexp(amax / largest)
    exponent = (exponent - (mantissa == 0.5).int()).clamp_(least_exponent, 127)
    return torch.where(amax.isfinite(), _power_of_two(exponent), amax)


def _power_of_two(exponent: Tensor) -> Tensor:
    """Return 2**exponent, of int32 from -126 to 127, by its bits: torch's pow need not be exact."""
    return ((exponent + 127) << 23).view(torch.float32)


def _to_integers(t: Tensor, generator: torch.Generator) -> Tensor:
    """Round up with a probability equal to the part behind the point; `t` is used up."""
    below = t.floor()
    part = t.sub_(below)
    return below.add_(torch.empty_like(part).uniform_(generator=generator) < part)


_EXPONENT_BITS = 0x7F800000
_ONE_UP = 1 << 23  # added to the bits of a float, it doubles it


def _to_e4m3(t: Tensor, generator: torch.Generator) -> Tensor:
    """Round to 3 bits behind the leading one, and to multiples of 2**-9 below 2**-6.

    Rounding up to the next power of two is no case of its own: it is a multiple of the step too.
    """
    # The bits of a float without sign and mantissa are those of the power of two below it.
    power = (t.view(torch.int32) & _EXPONENT_BITS).clamp_(min=(127 - 6) * _ONE_UP)
    step = power.sub_(3 * _ONE_UP).view(torch.float32)
    return _to_integers(t.div_(step), generator).mul_(step)


def _bit_weights(device: torch.device) -> Tensor:
    return torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=device)


PACKINGS = {
    p.name: p
    for p in (
        Packing(name="int8", dtype=torch.int8, largest=127.0, round=_to_integers),
        Packing(name="e4m3", dtype=torch.float8_e4m3fn, largest=448.0, round=_to_e4m3),
    )
}
