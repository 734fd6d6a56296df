# mypy: ignore-errors
# ruff: noqa: N803
# Kernels are compiled by Triton: types are not Python's, compile-time constants are upper case.
"""The kernel of a step: one program for each `BLOCK` elements of one tensor of a list.

    owners[program] -> row of the table -> pointers of weight, remainder, moments; numel; ordinal
    gradients[row]  -> pointer of the gradient, which changes from step to step

Rules are the CPU's operations in their order, with fused multiply-adds where the CPU has them
(lerp, addcmul, add with alpha).
"""

from __future__ import annotations

from narrowcast.kernels.memory import load, pointer, store
from narrowcast.kernels.moments import load_moment, store_moment
from narrowcast.kernels.numbers import join, noise16, split, tensor_key, widen
from narrowcast.kernels.triton_names import jit, tl

__all__ = ["advance"]


@jit
def lerp(left, right, share):
    """Go from `left` towards `right` by a share; as torch, from the nearer end."""
    distance = right - left
    near_left = tl.fma(distance, share + left * 0.0, left)
    near_right = right - distance * (1.0 - share)
    return tl.where(share < 0.5, near_left, near_right)


@jit
def adamw(weight, gradient, first, second, c0, c1, c2, c3, c4, c5, c6):
    """Twin of the rule in ``optim.adamw``; coefficients in its order."""
    weight = weight * c0
    first = lerp(first, gradient, c1)
    second = tl.fma(gradient * c3, gradient, second * c2)
    denominator = tl.div_rn(tl.sqrt_rn(second), c4 + second * 0.0) + c5
    weight = weight + tl.div_rn(first * c6, denominator)
    return weight, first, second


@jit
def sgd(weight, gradient, first, c0, c1, c2, c3, c4, c5, HAS_MOMENT: tl.constexpr):
    """Twin of the rule in ``optim.sgd``; coefficients in its order."""
    zeros = gradient * 0.0
    gradient = tl.where(c0 != 0.0, tl.fma(weight, c0 + zeros, gradient), gradient)
    if HAS_MOMENT:
        first = tl.where(c4 != 0.0, gradient, tl.fma(gradient, c2 + zeros, first * c1))
        gradient = tl.where(c3 != 0.0, tl.fma(first, c1 + zeros, gradient), first)
    return tl.fma(gradient, c5 + zeros, weight), first


@jit
def lion(weight, gradient, first, c0, c1, c2, c3):
    """Twin of the rule in ``optim.lion``; coefficients in its order."""
    direction = lerp(first, gradient, c1)
    sign = tl.where(direction > 0.0, 1.0, tl.where(direction < 0.0, -1.0, 0.0))
    return tl.fma(sign, c3 + sign * 0.0, weight * c0), lerp(first, gradient, c2)


@jit
def load_weight(
    row,
    start,
    numel,
    WEIGHTS: tl.constexpr,
    ALIGNED: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Return the fp32 number that each weight stands for."""
    offsets = start + tl.arange(0, BLOCK)
    mask = offsets < numel
    if WEIGHTS == "fp32":
        return load(pointer(row, 0, tl.float32, ALIGNED) + offsets, mask, MASKED)
    else:
        weight = load(pointer(row, 0, tl.int16, ALIGNED) + offsets, mask, MASKED)
        rest = weight
        if WEIGHTS == "split16":
            rest = load(pointer(row, 1, tl.int16, ALIGNED) + offsets, mask, MASKED)
        elif WEIGHTS == "split8":
            rest = load(pointer(row, 1, tl.int8, ALIGNED) + offsets, mask, MASKED)
        return join(weight, rest, WEIGHTS)


@jit
def store_weight(
    x,
    row,
    start,
    numel,
    key,
    WEIGHTS: tl.constexpr,
    ALIGNED: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Hold fp32 `x`."""
    offsets = start + tl.arange(0, BLOCK)
    mask = offsets < numel
    if WEIGHTS == "fp32":
        store(pointer(row, 0, tl.float32, ALIGNED) + offsets, x, mask, MASKED)
    else:
        noise = tl.zeros([BLOCK], dtype=tl.int32)
        if WEIGHTS != "split16":
            noise = noise16(key, 0, start, tl.arange(0, BLOCK))
        weight, rest = split(x, noise, WEIGHTS)
        store(pointer(row, 0, tl.int16, ALIGNED) + offsets, weight, mask, MASKED)
        if WEIGHTS == "split16":
            store(pointer(row, 1, tl.int16, ALIGNED) + offsets, rest, mask, MASKED)
        elif WEIGHTS == "split8":
            store(pointer(row, 1, tl.int8, ALIGNED) + offsets, rest, mask, MASKED)


# fmt: off
@jit
def advance_range(
    row, gradients, start, numel, key, c0, c1, c2, c3, c4, c5, c6,
    RULE: tl.constexpr, WEIGHTS: tl.constexpr, STATES: tl.constexpr, HAS_MOMENT: tl.constexpr,
    GRADIENT: tl.constexpr, MAXIMIZE: tl.constexpr,
    ALIGNED: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr,
):
    """Step elements `start` to `start` + BLOCK of one tensor."""
    offsets = start + tl.arange(0, BLOCK)
    mask = offsets < numel
    if GRADIENT == "bf16":
        held = load(pointer(gradients, 0, tl.int16, ALIGNED) + offsets, mask, MASKED)
        gradient = widen(held)
    else:
        gradient = load(pointer(gradients, 0, tl.float32, ALIGNED) + offsets, mask, MASKED)
    if MAXIMIZE:
        gradient = -gradient
    weight = load_weight(row, start, numel, WEIGHTS, ALIGNED, MASKED, BLOCK)
    m = gradient
    if HAS_MOMENT:
        m = load_moment(row, 2, start, numel, STATES, True, ALIGNED, MASKED, BLOCK)
    if RULE == "AdamW":
        v = load_moment(row, 4, start, numel, STATES, False, ALIGNED, MASKED, BLOCK)
        weight, m, v = adamw(weight, gradient, m, v, c0, c1, c2, c3, c4, c5, c6)
        store_moment(v, row, 4, start, numel, key, 2, STATES, False, ALIGNED, MASKED, BLOCK)
    elif RULE == "SGD":
        weight, m = sgd(weight, gradient, m, c0, c1, c2, c3, c4, c5, HAS_MOMENT)
    else:
        weight, m = lion(weight, gradient, m, c0, c1, c2, c3)
    if HAS_MOMENT:
        store_moment(m, row, 2, start, numel, key, 1, STATES, True, ALIGNED, MASKED, BLOCK)
    store_weight(weight, row, start, numel, key, WEIGHTS, ALIGNED, MASKED, BLOCK)


@jit
def advance(
    table, owners, gradients, flag, base, c0, c1, c2, c3, c4, c5, c6,
    RULE: tl.constexpr, WEIGHTS: tl.constexpr, STATES: tl.constexpr, HAS_MOMENT: tl.constexpr,
    GRADIENT: tl.constexpr, MAXIMIZE: tl.constexpr, HAS_FLAG: tl.constexpr,
    ALIGNED: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):
    """Step one range of one tensor. With a flag that is false, nothing is read or written."""
    program = tl.program_id(0)
    owner = tl.load(owners + program)
    row = table + owner * COLUMNS
    numel = tl.load(row + 6)
    start = (program - tl.load(row + 8)) * BLOCK
    key = tensor_key(base, tl.load(row + 7))
    if HAS_FLAG:
        numel = numel * tl.load(flag).to(tl.int64)
    if start + BLOCK <= numel:
        advance_range(
            row, gradients + owner, start, numel, key, c0, c1, c2, c3, c4, c5, c6,
            RULE, WEIGHTS, STATES, HAS_MOMENT, GRADIENT, MAXIMIZE, ALIGNED, False, BLOCK,
        )
    else:
        advance_range(
            row,
            gradients + owner,
            start,
            numel,
            key,
            c0,
            c1,
            c2,
            c3,
            c4,
            c5,
            c6,
            RULE,
            WEIGHTS,
            STATES,
            HAS_MOMENT,
            GRADIENT,
            MAXIMIZE,
            ALIGNED,
            True,
            BLOCK,
        )
# fmt: on
