"""What values a tensor held: extremes, zeros, non-finite elements and one histogram of exponents.

The histogram answers every question of the kind "how much of this would be lost in fp16, at a loss
scale of 1024" without the tensor: see ``ranges.what_if``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["BorderRange", "TensorRange"]


@dataclass(frozen=True, kw_only=True)
class TensorRange:
    """The values of one floating-point tensor, or of several counted together."""

    dtype: str
    """Format name, such as fp32 or fp16."""
    shape: tuple[int, ...]
    numel: int
    zeros: int = 0
    nans: int = 0
    infs: int = 0
    """Infinities of both signs."""
    amax: float = 0.0
    """Largest finite magnitude; 0 where there is none."""
    amin: float = 0.0
    """Smallest finite magnitude above 0; 0 where there is none."""
    rms: float = 0.0
    """Root mean square of the finite elements, zeros included."""
    lowest_exponent: int = 0
    exponent_counts: tuple[int, ...] = ()
    """Item i counts the finite non-zero x with floor(log2 |x|) = lowest_exponent + i."""

    @property
    def is_finite(self) -> bool:
        """Whether no element is NaN or infinite."""
        return self.nans == 0 and self.infs == 0


@dataclass(frozen=True, kw_only=True)
class BorderRange:
    """What crossed the border of one module, in short: a record of a run holds one for each."""

    module: str
    """Dotted name; '' for the model itself."""
    phase: Literal["forward", "backward"]
    """``forward``: its outputs; ``backward``: the gradients of its outputs, unscaled."""
    dtype: str
    numel: int
    zeros: int
    nonfinite: int
    amax: float
    amin: float
    rms: float
