# mypy: ignore-errors
# ruff: noqa: N803, N806
# Kernels are compiled by Triton: types are not Python's, compile-time constants are upper case.
"""Loading and storing one program's range of a moment, in any state store."""

from __future__ import annotations

from narrowcast.kernels.memory import load, pointer, store
from narrowcast.kernels.numbers import decode, encode, noise16, scale_bits, split, widen
from narrowcast.kernels.triton_names import jit, tl

__all__ = ["load_moment", "store_moment"]


@jit
def load_moment(
    row,
    column: tl.constexpr,
    start,
    numel,
    STATES: tl.constexpr,
    SIGNED: tl.constexpr,
    ALIGNED: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Return elements `start` to `start` + BLOCK as fp32, zeros from `numel` on."""
    offsets = start + tl.arange(0, BLOCK)
    mask = offsets < numel
    if STATES == "fp32":
        return load(pointer(row, column, tl.float32, ALIGNED) + offsets, mask, MASKED)
    elif STATES == "bf16":
        return widen(load(pointer(row, column, tl.int16, ALIGNED) + offsets, mask, MASKED))
    elif STATES == "int8":
        scale = load_scale(row, column + 1, start, numel, 32, ALIGNED, MASKED, BLOCK)
        if SIGNED:
            codes = pointer(row, column, tl.int8, ALIGNED) + offsets
            return decode(load(codes, mask, MASKED).to(tl.float32), scale, True, 127, 32, BLOCK)
        else:
            codes = pointer(row, column, tl.uint8, ALIGNED) + offsets
            return decode(load(codes, mask, MASKED).to(tl.float32), scale, False, 255, 32, BLOCK)
    else:
        scale = load_scale(row, column + 1, start, numel, 64, ALIGNED, MASKED, BLOCK)
        places = start // 2 + tl.arange(0, BLOCK // 2)
        codes = pointer(row, column, tl.uint8, ALIGNED) + places
        pair = load(codes, places * 2 < numel, MASKED).to(tl.int32)
        code = tl.reshape(tl.join(pair & 15, pair >> 4), [BLOCK])
        if SIGNED:
            return decode(((code ^ 8) - 8).to(tl.float32), scale, True, 7, 64, BLOCK)
        else:
            return decode(code.to(tl.float32), scale, False, 15, 64, BLOCK)


@jit
def load_scale(
    row,
    column: tl.constexpr,
    start,
    numel,
    GROUP: tl.constexpr,
    ALIGNED: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Return the fp32 scale of each `GROUP` elements."""
    blocks = start // GROUP + tl.arange(0, BLOCK // GROUP)
    scales = pointer(row, column, tl.int16, ALIGNED) + blocks
    return widen(load(scales, blocks * GROUP < numel, MASKED))


@jit
def store_moment(
    x,
    row,
    column: tl.constexpr,
    start,
    numel,
    key,
    stream: tl.constexpr,
    STATES: tl.constexpr,
    SIGNED: tl.constexpr,
    ALIGNED: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Hold fp32 `x` at `start`, rounded stochastically where the store is narrower."""
    lanes = tl.arange(0, BLOCK)
    mask = start + lanes < numel
    if STATES == "fp32":
        store(pointer(row, column, tl.float32, ALIGNED) + start + lanes, x, mask, MASKED)
    elif STATES == "bf16":
        rounded, _ = split(x, noise16(key, stream, start, lanes), "stochastic")
        store(pointer(row, column, tl.int16, ALIGNED) + start + lanes, rounded, mask, MASKED)
    else:
        TOP: tl.constexpr = (127 if SIGNED else 255) if STATES == "int8" else (7 if SIGNED else 15)
        GROUP: tl.constexpr = 32 if STATES == "int8" else 64
        if MASKED:  # lanes behind the end must not raise the scale of the last block
            x = tl.where(mask, x, 0.0)
        bits = scale_bits(x, GROUP, BLOCK)
        blocks = start // GROUP + tl.arange(0, BLOCK // GROUP)
        scales = pointer(row, column + 1, tl.int16, ALIGNED) + blocks
        store(scales, (bits >> 16).to(tl.int16), blocks * GROUP < numel, MASKED)
        noise = noise16(key, stream, start, lanes)
        scale = bits.to(tl.float32, bitcast=True)
        code = encode(x, scale, noise, SIGNED, TOP, GROUP, BLOCK).to(tl.int32)
        codes = pointer(row, column, tl.uint8, ALIGNED)
        if STATES == "int8":
            store(codes + start + lanes, code.to(tl.uint8), mask, MASKED)
        else:  # of two codes in a byte, the one of even index is in the lower half
            even, odd = tl.split(tl.reshape(code & 15, [BLOCK // 2, 2]))
            places = start // 2 + tl.arange(0, BLOCK // 2)
            pair = (even | (odd << 4)).to(tl.uint8)
            store(codes + places, pair, places * 2 < numel, MASKED)
