"""Which format of ours a torch dtype is: found from its limits, which ``formats`` knows already."""

from __future__ import annotations

from functools import cache

import torch

from narrowcast.errors import UnknownName
from narrowcast.formats import FORMATS, FloatFormat

__all__ = ["dtype_of", "format_of", "name_of"]

_STORED = (torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)


@cache
def format_of(dtype: torch.dtype) -> FloatFormat | None:
    """Return the format that a dtype stores; None for one that is none of ours."""
    if dtype not in _STORED:
        return None
    limits = torch.finfo(dtype)
    alike = (f for f in FORMATS.values() if (f.eps, f.max) == (limits.eps, limits.max))
    return next(f for f in alike if f.storage_bytes == dtype.itemsize)


def name_of(dtype: torch.dtype) -> str:
    """Return the format's name, or torch's own name ('float64') of a dtype that is none of ours."""
    known = format_of(dtype)
    return str(dtype).removeprefix("torch.") if known is None else known.name


def dtype_of(name: str) -> torch.dtype:
    """Return the dtype that stores a format; raises UnknownName for one that torch stores not."""
    for dtype in _STORED:
        if name_of(dtype) == name:
            return dtype
    raise UnknownName.of("stored float format", name, map(name_of, _STORED))
