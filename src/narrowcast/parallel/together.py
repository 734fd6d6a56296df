"""The ways in which ranks share a training, and the way from `--parallel` to a process group."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

from narrowcast.errors import UnknownName
from narrowcast.parallel.meeting import Meeting, connect
from narrowcast.parallel.peers import Ranks, joined
from narrowcast.parallel.world import world_from

__all__ = ["KINDS", "Together", "together_in"]

KINDS = ("ddp", "fsdp2")
"""How ranks can share the work. ``ddp``: each holds the whole model; ``fsdp2``: a part."""


@dataclass(frozen=True, kw_only=True)
class Together:
    """This rank, in touch with the others, before they have agreed on anything."""

    kind: str
    meeting: Meeting

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which alone prints and writes."""
        return self.meeting.world.is_main

    @property
    def cuts(self) -> bool:
        """Whether each rank will hold a part of each weight."""
        return self.kind == "fsdp2"

    def device_name(self, asked: str | None) -> str | None:
        """Return this rank's device: of GPUs, one for each rank of a machine."""
        if asked == "cpu" or not torch.cuda.is_available():
            return asked
        return f"cuda:{self.meeting.world.local_rank}" if asked in (None, "cuda") else asked

    def meet(
        self, wanted: Mapping[str, object], device: torch.device
    ) -> AbstractContextManager[Ranks]:
        """See that all ranks want the same, and form the group; raises what `agree` raises."""
        world = self.meeting.world
        self.meeting.agree({**wanted, "parallel": self.kind, "ranks": world.size})
        if device.type == "cuda":
            torch.cuda.set_device(device)
        return joined(self.meeting, self.kind, device)


def together_in(kind: str, environment: Mapping[str, str]) -> Together:
    """Read who is there from the environment, and reach the others.

    Raises UnknownName for another kind, UsageError outside of torchrun, ParallelError if nobody
    answers within the limit.
    """
    if kind not in KINDS:
        raise UnknownName.of("kind of parallel training", kind, KINDS)
    return Together(kind=kind, meeting=connect(world_from(environment)))
