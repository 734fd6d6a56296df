"""Triton where it is installed, and stand-ins that let the kernels be imported where it is not.

Triton comes with torch on CUDA and is no dependency of ours. Without it nothing here is called.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

__all__ = ["HAS_TRITON", "constant", "jit", "tl"]

HAS_TRITON = importlib.util.find_spec("triton") is not None

# Triton ships no types.
_triton: Any = importlib.import_module("triton") if HAS_TRITON else None
tl: Any = importlib.import_module("triton.language") if HAS_TRITON else None


def jit(function: Any) -> Any:
    """Compile with Triton at the first call, if there is Triton."""
    return _triton.jit(function) if HAS_TRITON else function


def constant(value: float) -> Any:
    """Mark a number that kernels read from their module."""
    return tl.constexpr(value) if HAS_TRITON else value
