"""How a model that an engine trains is shared by several ranks: whole on each, or in parts.

Training and prediction share alike, and so both do it here.
"""

from __future__ import annotations

from torch import nn

from narrowcast.activations.blocks import repeated_blocks
from narrowcast.engine.engine import Engine
from narrowcast.errors import UsageError
from narrowcast.parallel.peers import Peers, Ranks
from narrowcast.parallel.replicas import LossFunction, Passes, Replicas
from narrowcast.parallel.shards import Shards
from narrowcast.precision.cast import torch_dtype

__all__ = ["blocks_of", "share"]


def share(engine: Engine, compute_loss: LossFunction, peers: Peers) -> Replicas | Shards | None:
    """Let the engine's model meet those of other ranks; None for a process that is alone."""
    if not isinstance(peers, Ranks):
        return None
    model, passes = engine.model, Passes(begins=engine.begins_next, meets=engine.meets_next)
    reduce = torch_dtype(engine.policy.reduce)
    if not peers.cuts:
        return Replicas(model, compute_loss, peers, reduce=reduce, passes=passes)
    blocks = blocks_of(model)
    shards = Shards(model, compute_loss, peers, blocks=blocks, reduce=reduce, passes=passes)
    engine.adopt(shards)
    return shards


def blocks_of(model: nn.Module) -> list[str]:
    """Return the modules that fsdp2 gathers one at a time; none if the model has no such."""
    try:
        return repeated_blocks(model)
    except UsageError:
        return []
