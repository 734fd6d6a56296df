"""The fastest training that fits a budget: what was considered and chosen, and how to run it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from narrowcast.records.run import AxisValue, Environment, OptionValue

__all__ = ["SPEED_SOURCES", "AxisEffect", "PlanPoint", "PlanRecord", "SpeedSource", "name_of"]

SpeedSource = Literal["measured", "estimated", "roofline"]
SPEED_SOURCES: dict[SpeedSource, str] = {
    "measured": "median of whole steps, taken in turn with the other finalists",
    "estimated": "put together from short measurements of each choice alone",
    "roofline": "operations and bytes of a traced step over the peak rates of the device",
}


def name_of(plan: str, parallel: str) -> str:
    """Return what the user is told of a plan: its name, and on ranks the way to share."""
    return f"{plan} by {parallel}" if parallel else plan


@dataclass(frozen=True, kw_only=True)
class PlanPoint:
    """One plan with its peak and its speed."""

    name: str
    plan: dict[str, AxisValue]
    """Every axis of ``plan.Plan``, its policy among them."""
    exact: bool
    """Whether each choice in it computes what fp32 training computes, but for the order of sums."""
    predicted_bytes: int
    """The peak of a step, on ranks of one of them; for a GPU what its allocator reserves, and the
    margin."""
    traced: bool
    """Whether this very plan was predicted; else its peak is put together from those of others."""
    seconds: float
    """Of one step: all micro-batches and the optimizer."""
    speed: SpeedSource
    spread: float = 0.0
    """Half the distance between the quartiles of the measured steps, as a share of the median."""
    measured_bytes: int | None = None
    """The peak of a step that was really taken, where one was; of ranks, the largest."""
    parallel: str = ""
    """How ranks share the training, ``ddp`` or ``fsdp2``; "" in one process."""


@dataclass(frozen=True, kw_only=True)
class AxisEffect:
    """What the chosen plan does on one axis, and whether results can differ for it."""

    axis: str
    choice: str
    exact: bool
    says: str


@dataclass(frozen=True, kw_only=True)
class PlanRecord:
    """A budget, the plan chosen for it, and the frontier of memory against speed."""

    schema: int = 1
    recipe: str
    options: dict[str, OptionValue] = field(default_factory=dict)
    batch_size: int
    """Of all ranks together."""
    world: int = 1
    """How many ranks share the training."""
    budget_bytes: int
    """Of each process."""
    margin_bytes: int = 0
    """Of the budget, what is left free because a GPU's peak is predicted within a margin."""
    keep_batch: bool = False
    """Whether splitting the batch into micro-batches was ruled out."""
    precisions: tuple[str, ...]
    """The precisions that could be chosen from."""
    chosen: PlanPoint
    why: str
    effects: tuple[AxisEffect, ...]
    """What the chosen plan changes, axis by axis; an axis that is left alone is not listed."""
    frontier: tuple[PlanPoint, ...]
    """Plans that no other beats in both memory and speed, the fastest first."""
    considered: int
    """How many plans there were to choose from."""
    traced: int
    """How many steps were predicted on tensors without contents."""
    measured: int
    """How many plans took real steps."""
    noise: float = 0.0
    """Differences in speed below this share were counted as none."""
    notes: tuple[str, ...] = ()
    command: str
    """Runs the chosen plan, once this record is in the file that it names."""
    code: str
    """The same in Python, for a loop of one's own."""
    device: str
    seconds: float
    """How long the planning took."""
    environment: Environment
