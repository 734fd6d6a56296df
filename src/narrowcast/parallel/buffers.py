"""Buffers of a model that several ranks train: rank 0's, sent when a step has written to them.

DDP sends all of them at every step, and knows fewer dtypes; FSDP2 sends none.
"""

from __future__ import annotations

from torch import Tensor, nn

from narrowcast.parallel.peers import Ranks

__all__ = ["SharedBuffers"]


class SharedBuffers:
    """Knows which buffers were written to since they were last equal on all ranks."""

    def __init__(self, model: nn.Module, ranks: Ranks) -> None:
        # model.buffers() would walk through the model by name, in every step.
        self._modules = tuple(model.modules())
        self._ranks = ranks
        self._shared = _marks(self._all())

    def share(self) -> None:
        """Make those that were written to, on any rank, what they are on rank 0."""
        buffers = self._all()
        if not buffers:
            return
        written = [mark not in self._shared for mark in _marks(buffers)]
        somewhere = self._ranks.any_of_each(written)
        chosen = [b for b, is_it in zip(buffers, somewhere, strict=True) if is_it]
        self._ranks.take_from_main(chosen)
        self._shared = _marks(buffers)

    def _all(self) -> list[Tensor]:
        """List the buffers; one that modules share may come twice."""
        return [b for m in self._modules for b in m._buffers.values() if b is not None]


def _marks(buffers: list[Tensor]) -> list[tuple[int, int]]:
    """Return what tells each buffer, and whether it was written to."""
    return [(id(buffer), buffer._version) for buffer in buffers]
