"""What a floating-point format can hold: range, spacing, and the table of formats we know.

The numbers follow from (exponent bits, mantissa bits) alone, so that no limit of a format is
written twice. Sources: IEEE 754-2019 for fp32 and fp16; Intel's bfloat16 definition; NVIDIA's
TF32 (19 bits); OCP OFP8 (Micikevicius et al. 2022) for e4m3fn, which has no infinity, and e5m2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from narrowcast.errors import UnknownName

__all__ = ["FORMATS", "FloatFormat", "float_format"]


@dataclass(frozen=True, kw_only=True)
class FloatFormat:
    """A binary floating-point format: sign, `exponent_bits`, `mantissa_bits` after the point."""

    name: str
    exponent_bits: int
    mantissa_bits: int
    storage_bytes: int
    has_inf: bool = True
    """Without an infinity (e4m3fn) the top exponent holds numbers, and only one pattern is NaN."""

    @property
    def bias(self) -> int:
        return (1 << (self.exponent_bits - 1)) - 1

    @property
    def max_exponent(self) -> int:
        """Exponent of the largest finite number."""
        return self.bias if self.has_inf else self.bias + 1

    @property
    def min_exponent(self) -> int:
        """Exponent of the smallest normal number."""
        return 1 - self.bias

    @property
    def eps(self) -> float:
        """Distance from 1 to the next number."""
        return 2.0**-self.mantissa_bits

    @property
    def max(self) -> float:
        """Largest finite number."""
        steps_below_two = 1 if self.has_inf else 2
        return (2.0 - steps_below_two * self.eps) * 2.0**self.max_exponent

    @property
    def tiny(self) -> float:
        """Smallest positive normal number."""
        return 2.0**self.min_exponent

    @property
    def smallest_subnormal(self) -> float:
        return self.tiny * self.eps

    def ulp(self, x: float) -> float:
        """Spacing of the numbers around `x`; the subnormal spacing near zero."""
        if not math.isfinite(x):
            raise ValueError(f"ulp of {x} is undefined")
        if abs(x) < self.tiny:
            return self.smallest_subnormal
        return 2.0 ** (math.frexp(abs(x))[1] - 1) * self.eps


FORMATS: dict[str, FloatFormat] = {
    f.name: f
    for f in (
        FloatFormat(name="fp32", exponent_bits=8, mantissa_bits=23, storage_bytes=4),
        FloatFormat(name="tf32", exponent_bits=8, mantissa_bits=10, storage_bytes=4),
        FloatFormat(name="fp16", exponent_bits=5, mantissa_bits=10, storage_bytes=2),
        FloatFormat(name="bf16", exponent_bits=8, mantissa_bits=7, storage_bytes=2),
        FloatFormat(name="e5m2", exponent_bits=5, mantissa_bits=2, storage_bytes=1),
        FloatFormat(name="e4m3", exponent_bits=4, mantissa_bits=3, storage_bytes=1, has_inf=False),
    )
}


def float_format(name: str) -> FloatFormat:
    """Look a format up by name; raises UnknownName with the nearest match."""
    if name not in FORMATS:
        raise UnknownName.of("float format", name, FORMATS)
    return FORMATS[name]
