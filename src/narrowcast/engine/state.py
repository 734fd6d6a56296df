"""What an engine saves and continues from, beside the model's weights and the random states."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from narrowcast.engine.lanes import Lane
from narrowcast.engine.parts import require_keys
from narrowcast.errors import UsageError

__all__ = ["load_lanes", "load_optimizers", "require_boundary"]


def load_lanes(lanes: Mapping[str, Lane], saved: Mapping[str, Any]) -> None:
    """Load every lane's state; raises CheckpointError, with none loaded, if their parts differ."""
    require_keys("state of the optimizers", saved, set(lanes))
    for name, lane in lanes.items():
        require_keys(f"state of optimizer {name!r}", saved[name], set(lane.state_dict()))
    for name, lane in lanes.items():
        lane.load_state_dict(saved[name])


def load_optimizers(lanes: Mapping[str, Lane], saved: Mapping[str, Any]) -> None:
    """Load only the optimizers' states of every lane."""
    require_keys("state of the optimizers", saved, set(lanes))
    for name, lane in lanes.items():
        lane.optimizer.load_state_dict(saved[name]["optimizer"])


def require_boundary(lanes: Mapping[str, Lane], accumulate: int, what: str) -> None:
    """Raise UsageError in the middle of a step."""
    for lane in lanes.values():
        if lane.source is not None:
            raise UsageError(
                f"{what} in the middle of a step: gradients are pending in {lane.name!r} "
                f"({lane.micro_batches} of {accumulate} micro-batches closed)",
                hint="call it after engine.step() returned a complete report, or make one with "
                "engine.step(flush=True), or drop the gradients with engine.zero_grad()",
            )
