# mypy: ignore-errors
# ruff: noqa: N803
# Kernels are compiled by Triton: types are not Python's, compile-time constants are upper case.
"""Loads and stores of a program's range, with a mask only where the range is the tensor's last.

Without a mask, and with pointers known to be aligned, 16 bytes move in one instruction.
"""

from __future__ import annotations

from narrowcast.kernels.triton_names import jit, tl

__all__ = ["load", "pointer", "store"]


@jit
def pointer(table, column: tl.constexpr, dtype: tl.constexpr, ALIGNED: tl.constexpr):
    """Read a pointer from a row of the table."""
    found = tl.load(table + column).to(tl.pointer_type(dtype))
    if ALIGNED:
        found = tl.multiple_of(found, 16)
    return found


@jit
def load(pointers, mask, MASKED: tl.constexpr):
    """Load all, or where the mask is true and zero elsewhere."""
    if MASKED:
        return tl.load(pointers, mask=mask, other=0)
    else:
        return tl.load(pointers)


@jit
def store(pointers, x, mask, MASKED: tl.constexpr):
    """Store all, or where the mask is true."""
    if MASKED:
        tl.store(pointers, x, mask=mask)
    else:
        tl.store(pointers, x)
