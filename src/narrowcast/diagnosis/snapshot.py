"""A step kept so that it can be taken again later, on another model and in another precision.

Weights are kept in full (a store's masters in the place of what stands for them), so that a replay
in fp32 and one in any other plan start from the same numbers. Buffers that no forward pass has
written are left to the fresh model: what the plan under suspicion made of them when it cast them
must not be carried into the replays that judge it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from narrowcast.engine.engine import Engine
from narrowcast.replay.moment import Moment

__all__ = ["Buffers", "Snapshot", "copied_buffers", "copied_weights", "written_buffers"]

Buffers = Mapping[str, Tensor | None]


@dataclass(frozen=True, kw_only=True, eq=False)
class Snapshot:
    """One optimizer step as it was before its first forward pass."""

    step: int
    """From 1."""
    weights: Mapping[str, Any]
    """The state dict without buffers, in full precision; tensors are copies."""
    moments: tuple[Moment, ...]
    """One for each micro-batch."""
    buffers: tuple[Buffers, ...]
    """Before each micro-batch, those that differ from what the training began with."""
    losses: tuple[float, ...]
    """What the training computed, one for each micro-batch."""
    scale: float
    """The loss scale in force."""
    applied: bool

    def put_on(self, engine: Engine, part: int = 0) -> None:
        """Give an engine's fresh model, and its stores, what they were before a micro-batch.

        Those of later micro-batches may follow on the same engine, and of no earlier one.
        """
        model = engine.model
        for name, value in self.buffers[part].items():
            _place(model, name, value, engine.device)
        engine.load_weights({**model.state_dict(), **self.weights})


def copied_weights(engine: Engine) -> dict[str, Any]:
    """Return copies of the weights, and whatever else but buffers the state dict holds.

    In the CPU's memory: a GPU may have no room for several of them.
    """
    names = {name for name, _ in _buffers(engine.model)}
    return {
        name: value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value
        for name, value in engine.weights().items()
        if name not in names
    }


def copied_buffers(model: nn.Module) -> dict[str, Tensor | None]:
    """Return copies of all buffers under each of their names."""
    return {n: None if b is None else b.detach().clone() for n, b in _buffers(model)}


def written_buffers(first: Buffers, now: Buffers) -> dict[str, Tensor | None]:
    """Return those of `now` that the training did not begin with."""
    return {n: b for n, b in now.items() if n not in first or not _same(first[n], b)}


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)


def _buffers(model: nn.Module) -> Iterator[tuple[str, Tensor | None]]:
    for path, module in model.named_modules():
        for name, buffer in module._buffers.items():
            yield (f"{path}.{name}" if path else name), buffer


def _place(model: nn.Module, name: str, value: Tensor | None, device: torch.device) -> None:
    """Write into the buffer that is there, in its own dtype, or put the value where it belongs."""
    path, _, leaf = name.rpartition(".")
    owner = model.get_submodule(path)
    own = owner._buffers.get(leaf)
    if own is not None and value is not None and own.shape == value.shape:
        own.data.copy_(value)
    elif leaf in owner._buffers:
        owner._buffers[leaf] = None if value is None else value.to(device)
    else:
        placed = None if value is None else value.to(device)
        owner.register_buffer(leaf, placed, persistent=False)
