"""Where lossy levers take their random numbers from: a stream of their own, that can be continued.

Torch's global generators are left alone, so that a lever changes no dropout mask and no sample.
Each packed tensor is rounded with a generator seeded by (seed, how many were packed before it), so
that one integer is the whole state. A tensor is rounded afresh each time: rounding that depended on
its contents would repeat the same error for the same data, step after step, and never average out.
"""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["RoundingStream"]

_MASK = 2**64 - 1


class RoundingStream:
    """A sequence of generators; all levers of one model draw from the same one."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._drawn = 0

    def next(self, device: torch.device) -> torch.Generator:
        """Return a fresh generator on a device, unlike all before it."""
        generator = torch.Generator(device)
        generator.manual_seed(_mixed(self._seed, self._drawn))
        self._drawn += 1
        return generator

    def state_dict(self) -> dict[str, int]:
        return {"seed": self._seed, "drawn": self._drawn}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._seed, self._drawn = int(state["seed"]), int(state["drawn"])


def _mixed(seed: int, count: int) -> int:
    """Spread a counter over 64 bits (SplitMix64; Steele, Lea and Flood 2014), as seeds should be.

    Mersenne twisters that are seeded by neighbouring numbers begin alike.
    """
    z = (seed + (count + 1) * 0x9E3779B97F4A7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)
