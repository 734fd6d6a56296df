"""An engine's optimizers on shards: parts for parameters, and gradients that are seen in parts."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from narrowcast.engine.lanes import Lane
from narrowcast.engine.stores import Masters
from narrowcast.engine.views import InParts
from narrowcast.optim.parts import Part, mark_part
from narrowcast.optim.reseat import require_elementwise, reseat
from narrowcast.parallel.shards import Shards

__all__ = ["put_in_parts"]


def put_in_parts(shards: Shards, lanes: Mapping[str, Lane]) -> Masters:
    """Let every optimizer step this rank's parts; returns the masters of these.

    Raises UsageError for an optimizer that needs whole parameters, or has taken steps.
    """
    for piece in shards.pieces:
        mark_part(piece.own, Part(start=piece.start, whole=piece.shape.numel()))
    rows = {id(piece.own): (piece.first, piece.own.shape[0]) for piece in shards.pieces}

    def cut(whole: Tensor, part: Tensor) -> Tensor:
        return whole.narrow(0, *rows[id(part)]).clone()

    names = {id(piece.own): piece.name for piece in shards.pieces} | {
        id(parameter): name for name, parameter in shards.uncut
    }
    for lane in lanes.values():
        require_elementwise(lane.optimizer)
    for lane in lanes.values():
        reseat(lane.optimizer, shards.parts, cut)
        lane.see(InParts(shards), lambda: names)
    shards.parts.clear()  # what was cut shall not stay in memory
    return Masters(lane.optimizer for lane in lanes.values())
