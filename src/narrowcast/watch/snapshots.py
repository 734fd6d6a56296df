"""Random states at each step, for less than reading all of them costs.

Reading torch's generator takes about a microsecond, Python's ten and numpy's thirty of them
(``benchmarks/watch_overhead.py`` prints them), and a whole step may take 150. But few trainings
draw from the latter two within a step: it is the data loader that does, between steps. So they are
read before and after a few steps; one that a step has moved is read before each from then on.
"""

from __future__ import annotations

from typing import Any

import torch

from narrowcast.randomness import random_state

__all__ = ["Snapshots"]

_SLOW = ("python", "numpy")


class Snapshots:
    """Random states as `randomness.random_state` returns them; the slow ones where they matter.

    What no probed step moved may be an older state of its generator.
    """

    def __init__(self) -> None:
        self._slow: dict[str, Any] = {}
        self._moved: set[str] = set()
        self._is_probing = False

    def take(self, *, probe: bool) -> dict[str, Any]:
        """Return the states before a step; with `probe`, all of them, to be compared by `end`."""
        self._is_probing = probe and len(self._moved) < len(_SLOW)
        if self._is_probing or self._moved or not self._slow:
            state = random_state()
            self._slow = {name: state[name] for name in _SLOW}
            return state
        is_cuda = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        return {
            **self._slow,
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if is_cuda else [],
        }

    def end(self) -> None:
        """Note which generators the step has moved that was begun with a probe."""
        if self._is_probing:
            after = random_state()
            self._moved |= {n for n in _SLOW if not _is_equal(self._slow[n], after[n])}
            self._is_probing = False


def _is_equal(a: Any, b: Any) -> bool:
    """Compare two states of one generator, of which numpy's holds an array."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_is_equal(a[key], b[key]) for key in a)
    same = a == b
    return bool(same if isinstance(same, bool) else same.all())
