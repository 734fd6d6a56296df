# mypy: ignore-errors
# ruff: noqa: N803
# Kernels are compiled by Triton: types are not Python's, compile-time constants are upper case.
"""Device twins of ``rounding`` and ``blockwise``: the same operations in the same order.

bf16 numbers are moved as 16-bit patterns, so that no conversion rounds. Divisions and square roots
are the correctly rounded ones, and launches switch off the contraction of products and sums. So
codes, scales and remainders are those of the CPU, bit for bit.
"""

from __future__ import annotations

from narrowcast.kernels.triton_names import constant, jit, tl
from narrowcast.rounding import GOLDEN, NOISE_FACTOR, NOISE_TILE, QUIET_NAN

__all__ = ["decode", "encode", "join", "noise16", "split", "tensor_key", "widen"]

_GOLDEN = constant(GOLDEN)
_FACTOR = constant(NOISE_FACTOR)
_TILE = constant(NOISE_TILE)
_NAN = constant(QUIET_NAN)
_INFINITY = constant(0x7F800000)
_BF16_MAX = constant(0x7F7F0000)


@jit
def mix(word):
    """Twin of ``rounding.mix`` on uint32."""
    word = word ^ (word >> 16)
    word = word * 0x7FEB352D
    word = word ^ (word >> 15)
    word = word * 0x846CA68B
    return word ^ (word >> 16)


@jit
def tensor_key(base, ordinal):
    """Twin of ``rounding.tensor_key``, from the key of the step."""
    key = base.to(tl.uint32, bitcast=True) + ordinal.to(tl.uint32) * _GOLDEN
    return mix(key.to(tl.uint32))


@jit
def noise16(key, stream: tl.constexpr, start, offsets):
    """Twin of ``rounding.noise16`` for elements `start` + `offsets`, within one tile."""
    stream_word = (stream * _GOLDEN) & 0xFFFFFFFF
    key = mix((key + stream_word).to(tl.uint32))
    tile_key = mix((key + (start // _TILE).to(tl.uint32)).to(tl.uint32))
    word = mix((start % _TILE + offsets).to(tl.uint32)) ^ tile_key
    return ((word * _FACTOR).to(tl.uint32) >> 16).to(tl.int32)


@jit
def widen(pattern):
    """Read a bf16 pattern (int16) as fp32."""
    return (pattern.to(tl.int32) << 16).to(tl.float32, bitcast=True)


@jit
def bits_of(x):
    """Return patterns, every NaN replaced by the quiet one."""
    return tl.where(x != x, _NAN, x.to(tl.int32, bitcast=True))


@jit
def join(weight, remainder, WEIGHTS: tl.constexpr):
    """Return the fp32 number of a store, from its patterns."""
    if WEIGHTS == "split16":
        joined = (weight.to(tl.int32) << 16) + remainder.to(tl.int32)
    elif WEIGHTS == "split8":
        joined = ((weight.to(tl.int32) << 8) + remainder.to(tl.int32)) << 8
    else:
        joined = weight.to(tl.int32) << 16
    return joined.to(tl.float32, bitcast=True)


@jit
def split(x, noise, WEIGHTS: tl.constexpr):
    """Return the patterns of weight and remainder (of the weight again where there is none)."""
    bits = bits_of(x)
    if WEIGHTS == "split16":
        upper = (bits + 0x8000) >> 16
        rest = (bits - (upper << 16)).to(tl.int16)
    elif WEIGHTS == "split8":
        bits = (bits + (noise >> 8)) >> 8
        upper = (bits + 0x80) >> 8
        rest = (bits - (upper << 8)).to(tl.int8)
    else:
        upper = (bits + noise) >> 16
        rest = upper.to(tl.int8)
    return upper.to(tl.int16), rest


@jit
def spread(scale, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """Repeat each block's number for its elements."""
    wide = tl.broadcast_to(scale[:, None], [BLOCK // GROUP, GROUP])
    return tl.reshape(wide, [BLOCK])


@jit
def decode(
    code, scale, SIGNED: tl.constexpr, TOP: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr
):
    """Twin of ``BlockCode.decode``: fp32 codes and one fp32 scale for each `GROUP` of them."""
    grid = code * (1.0 / TOP)
    if SIGNED:
        grid = grid * tl.abs(grid)
    else:
        grid = grid * grid
        grid = grid * grid
    return grid * spread(scale, GROUP, BLOCK)


@jit
def scale_bits(x, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """Return each block's largest magnitude, rounded up to bf16, as an fp32 pattern.

    Compared as integers, a NaN is the largest of all, so that it cannot get lost.
    """
    magnitude = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    largest = tl.max(tl.reshape(magnitude, [BLOCK // GROUP, GROUP]), axis=1)
    up = tl.minimum((tl.minimum(largest, _INFINITY) + 0xFFFF) & -0x10000, _BF16_MAX)
    up = tl.where(largest >= _INFINITY, _INFINITY, up)
    return tl.where(largest > _INFINITY, _NAN, up)


@jit
def encode(
    x,
    scale,
    noise,
    SIGNED: tl.constexpr,
    TOP: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Twin of ``BlockCode._rounded``: codes as fp32 integers."""
    ratio = tl.div_rn(x, spread(tl.where(scale == 0.0, 1.0, scale), GROUP, BLOCK))
    target = ratio * (TOP * TOP * TOP * TOP * 1.0)
    if SIGNED:
        target = tl.abs(ratio) * (TOP * TOP * 1.0)
    target = tl.where(target < float("inf"), target, 0.0)  # false for NaN as well
    root = tl.sqrt_rn(target)
    if not SIGNED:
        root = tl.sqrt_rn(root)
    low = tl.minimum(tl.floor(root), TOP - 1.0)
    square = low * low
    gap = low * 2.0 + 1.0
    if not SIGNED:
        gap = gap * ((square * 2.0 + low * 2.0) + 1.0)
        square = square * square
    fraction = tl.div_rn(target - square, gap)
    threshold = (noise.to(tl.float32) + 0.5) * (1.0 / 65536.0)
    low = low + tl.where(fraction > threshold, 1.0, 0.0)
    if SIGNED:
        return tl.where(ratio < 0.0, -low, low)
    return tl.maximum(low, tl.where(ratio > 0.0, 1.0, 0.0))
