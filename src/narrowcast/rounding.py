"""Holds an fp32 number in fewer bytes: as two parts that give it back, or rounded without bias.

    fp32       s eeeeeeee mmmmmmm mmmmmmmmmmmmmmmm
    split16    s eeeeeeee mmmmmmm|rrrrrrrrrrrrrrrr    bf16 and a signed 16-bit remainder: exact
    split8     s eeeeeeee mmmmmmm|rrrrrrrr            bf16 and a signed 8-bit remainder: 24 bits
    stochastic s eeeeeeee mmmmmmm                     bf16, rounded up as often as it should be

All work on the bit pattern read as an integer: the next larger integer is the next larger float of
the same sign, so adding half a bf16 step (0x8000) and dropping the lower half rounds to nearest,
and carries run into the exponent by themselves. Beyond the largest bf16 number rounding gives an
infinity, as IEEE 754 has it; the remainder of `split16` still knows the finite number. A NaN
becomes the one quiet NaN first: some NaN patterns, CUDA's own 0x7fffffff among them, would carry
into the sign and come out as zero.

Randomness is a function of a key and the element's index, not a stream: the same numbers come out
in whatever order, chunks and device a step is carried out.
"""

from __future__ import annotations

import math
import weakref
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "GOLDEN",
    "NOISE_FACTOR",
    "NOISE_TILE",
    "QUIET_NAN",
    "join8",
    "join16",
    "mix",
    "noise16",
    "split8",
    "split16",
    "split_stochastic",
    "step_key",
    "stream_key",
    "tensor_key",
]

QUIET_NAN = 0x7FC00000
NOISE_TILE = 1 << 16
"""Elements that share a key; the first round of the hash of an index within a tile is a table."""
GOLDEN = 0x9E3779B1
"""2^32 over the golden ratio, made odd (Knuth's multiplicative hash): sends 1, 2, 3 far apart."""
NOISE_FACTOR = 0x2C1B3C6D
"""Odd multiplier of the last round (Wellons 2018, "triple32"); its product's upper half is used."""

_WORD = 0xFFFFFFFF


def mix(word: int) -> int:
    """Hash 32 bits to 32 bits, one to one (Wellons 2018, "lowbias32")."""
    word &= _WORD
    word ^= word >> 16
    word = word * 0x7FEB352D & _WORD
    word ^= word >> 15
    word = word * 0x846CA68B & _WORD
    return word ^ word >> 16


def step_key(seed: int, step: int) -> int:
    """Return the key of one step, 32 bits, from a seed of up to 64."""
    return mix((seed & _WORD) ^ mix((seed >> 32) + step * GOLDEN))


def tensor_key(seed: int, step: int, ordinal: int) -> int:
    """Return the key of one tensor's noise in one step, 32 bits."""
    return mix(step_key(seed, step) + ordinal * GOLDEN)


def stream_key(key: int, stream: int) -> int:
    """Return the key of one of several independent noises of a tensor."""
    return mix(key + stream * GOLDEN)


def _signed(word: int) -> int:
    """Read 32 bits as torch's int32 does."""
    return word - (1 << 32) if word >> 31 else word


_TABLES: dict[torch.device, Tensor] = {}
_FAKE_TABLES: weakref.WeakKeyDictionary[Any, dict[torch.device, Tensor]] = (
    weakref.WeakKeyDictionary()
)
"""Tables of fake tensors, which must not outlive their mode nor meet real ones."""


def _table_for(tensor: Tensor) -> Tensor:
    """Return the first round's table on a tensor's device, made once and held: 256 KiB."""
    device, mode = tensor.device, getattr(tensor, "fake_mode", None)
    tables = _TABLES if mode is None else _FAKE_TABLES.setdefault(mode, {})
    if device not in tables:
        tables[device] = _first_round(device)
    return tables[device]


def _first_round(device: torch.device) -> Tensor:
    """Return the hash of every index within a tile, int32."""
    word = torch.arange(NOISE_TILE, dtype=torch.int64, device=device)
    word ^= word >> 16
    word = (word * 0x7FEB352D).bitwise_and_(_WORD)
    word ^= word >> 15
    # The product of two 32-bit words wraps in int64; its lower 32 bits are right all the same.
    word = (word * 0x846CA68B).bitwise_and_(_WORD)
    word ^= word >> 16
    return word.to(torch.int32)


def noise16(key: int, start: int, count: int, device: torch.device) -> Tensor:
    """Return uniform integers in [0, 65535] for elements `start` to `start + count`, int32.

    Over random keys each element's number is exactly uniform: key xor constant is uniform, and
    multiplication by an odd number permutes the words.
    """
    out = torch.empty(count, dtype=torch.int32, device=device)
    table = _table_for(out)
    done = 0
    while done < count:
        tile, first = divmod(start + done, NOISE_TILE)
        size = min(count - done, NOISE_TILE - first)
        part = out[done : done + size]
        tile_key = _signed(mix(key + tile))
        torch.bitwise_xor(table[first : first + size], tile_key, out=part)
        done += size
    # The shift keeps the sign; the mask drops the copies of it.
    return out.mul_(NOISE_FACTOR).bitwise_right_shift_(16).bitwise_and_(0xFFFF)


def _bits(x: Tensor) -> Tensor:
    """Return a copy of the patterns, every NaN replaced by the quiet one: int32."""
    assert x.dtype is torch.float32, x.dtype
    # Python's NaN is QUIET_NAN in fp32. A mask would take ten times as long.
    return x.nan_to_num(math.nan, math.inf, -math.inf).view(torch.int32)


def split16(x: Tensor, weight: Tensor, remainder: Tensor, noise: Tensor | None = None) -> None:
    """Write fp32 `x` into bf16 `weight` and int16 `remainder`, exactly. Takes no `noise`.

    The weight is x rounded to nearest, ties away from zero.
    """
    del noise
    bits = _bits(x)
    # What is left after rounding to nearest is the lower half, read as a signed number.
    remainder.copy_(bits)
    weight.view(torch.int16).copy_(bits.add_(0x8000).bitwise_right_shift_(16))


def join16(weight: Tensor, remainder: Tensor) -> Tensor:
    """Return the fp32 number that `split16` took apart, bit for bit."""
    return weight.to(torch.float32).view(torch.int32).add_(remainder).view(torch.float32)


def split8(x: Tensor, weight: Tensor, remainder: Tensor, noise: Tensor | None = None) -> None:
    """Write fp32 `x`, rounded to 24 bits, into bf16 `weight` and int8 `remainder`.

    Rounds stochastically with `noise` (integers in [0, 65535]), or to nearest, ties away from zero.
    """
    bits = _bits(x)
    if noise is None:
        bits.add_(0x80)
    else:
        bits.add_(noise >> 8)
    bits.bitwise_right_shift_(8)
    remainder.copy_(bits)  # the lowest byte, as in `split16`
    weight.view(torch.int16).copy_(bits.add_(0x80).bitwise_right_shift_(8))


def join8(weight: Tensor, remainder: Tensor) -> Tensor:
    """Return the number of 24 bits that `split8` took apart, as fp32."""
    upper = weight.view(torch.int16).to(torch.int32).bitwise_left_shift_(8)
    return upper.add_(remainder).bitwise_left_shift_(8).view(torch.float32)


def split_stochastic(x: Tensor, weight: Tensor, noise: Tensor | None) -> None:
    """Write fp32 `x` into bf16 `weight`, rounded stochastically with `noise` in [0, 65535].

    The expectation over the noise is x. Without noise, rounds to nearest, ties away from zero.
    """
    bits = _bits(x)
    bits.add_(0x8000 if noise is None else noise)
    weight.view(torch.int16).copy_(bits.bitwise_right_shift_(16))
