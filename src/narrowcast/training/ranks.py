"""What a training on several ranks does otherwise than one in one process.

Rank 0 alone writes. A checkpoint holds what all ranks have in common once, and each rank's random
states; a run that goes on with as many ranks is the same run, bit for bit.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from narrowcast.engine.ranks import blocks_of
from narrowcast.errors import NarrowcastError, ParallelError
from narrowcast.parallel.failures import PeerFailed
from narrowcast.parallel.peers import Peers
from narrowcast.parallel.shards import is_shared
from narrowcast.precision.device import environment
from narrowcast.randomness import random_state, restore_random_state, seed_everything
from narrowcast.records.run import Environment, Evaluation, RunRecord, StepPoint
from narrowcast.training import checkpoint
from narrowcast.training.assembly import Assembly, stream_of
from narrowcast.training.interruption import Interruption

__all__ = [
    "NoMetrics",
    "StepEnd",
    "gathered_streams",
    "kind_of",
    "moved_notes",
    "reason_of",
    "require_same_weights",
    "restore_streams",
    "resumed_record",
    "shared_notes",
    "was_interrupted",
    "with_peaks",
]

_OTHERS = "random_of_other_ranks"


class NoMetrics:
    """The metrics of a rank that writes none."""

    def append(self, *points: StepPoint | Evaluation) -> None:
        """Rank 0 appends them."""

    def make_durable(self) -> int:
        return 0

    def close(self) -> None:
        """Nothing is open."""


class StepEnd:
    """What ranks tell each other once a step, in one message: its losses, and who is to stop."""

    def __init__(self, peers: Peers, interruption: Interruption) -> None:
        self._peers = peers
        self._interruption = interruption
        self._told: bool | None = None
        """Whether any rank was asked to stop when the last step ended; None once that was used."""

    def means(self, losses: tuple[float, ...]) -> tuple[float, ...]:
        """Return the mean of each loss over the ranks."""
        means, told = self._peers.means_and_any(losses, self._interruption.requested)
        self._told = told if self._peers.size > 1 else None  # alone, asking costs nothing
        return tuple(means)

    def stop_is_asked(self) -> bool:
        """Whether a rank was asked to stop; the same answer on all of them."""
        told, self._told = self._told, None
        return self._peers.any(self._interruption.requested) if told is None else told


def shared_notes(parts: Assembly) -> tuple[str, ...]:
    """Say how the ranks share the work, and what of it they do not share."""
    peers, size = parts.peers, parts.stream.batch_size
    if not peers.kind:
        return ()
    notes = [f"{peers.kind} on {peers.size} ranks: {size // peers.size} of {size} samples on each"]
    if peers.cuts and not blocks_of(parts.engine.model):
        notes.append("the model has no repeated blocks: all of it is gathered at once")
    if peers.size > 1 and any(isinstance(m, _BatchNorm) for m in parts.engine.model.modules()):
        notes.append(
            "batch norms normalise by the samples of their own rank, and the running statistics "
            "are rank 0's: that is not what one process does with the whole batch"
        )
    return tuple(notes)


def resumed_record(record: RunRecord, step: int, peers: Peers) -> RunRecord:
    """Return the record of a run that goes on after this step, on these ranks.

    A peak that was measured on others is not this one's.
    """
    resumed_at, own = (*record.resumed_at, step), record.peak_bytes
    if (record.parallel, record.ranks) != (peers.kind, peers.size):
        record = replace(record, rank_peak_bytes=())
        own = None
    elif record.rank_peak_bytes:
        own = record.rank_peak_bytes[peers.rank]
    return replace(
        record, resumed_at=resumed_at, peak_bytes=own, parallel=peers.kind, ranks=peers.size
    )


def moved_notes(before: Environment, device: torch.device, step: int) -> tuple[str, ...]:
    """Say where a run goes on in other surroundings than those that its record tells of."""
    now = environment(device)
    return tuple(
        f"{what} was {getattr(before, what)!r} and is {getattr(now, what)!r} from step {step} on: "
        "what rounds differently there makes the run another one"
        for what in ("device_name", "platform", "commit")
        if getattr(before, what) != getattr(now, what)
    )


def kind_of(error: BaseException) -> str:
    """Return the class name of the error that ended a run, on whichever rank it arose."""
    return error.kind if isinstance(error, PeerFailed) else type(error).__name__


def reason_of(error: BaseException) -> str:
    """Return why a run failed, as its record says it."""
    return error.message if isinstance(error, NarrowcastError) else repr(error)


def was_interrupted(error: BaseException) -> bool:
    """Whether it was Ctrl-C that ended a run, on whichever rank."""
    return kind_of(error) == KeyboardInterrupt.__name__


def gathered_streams(peers: Peers) -> dict[str, Any]:
    """Return the random states of all ranks, as a checkpoint holds them."""
    own, *others = peers.gather(random_state())
    return {"random": own} | ({_OTHERS: others} if others else {})


def restore_streams(state: dict[str, Any], peers: Peers, *, seed: int, kind: str) -> str:
    """Set this rank's random states to the saved ones; returns what is to be said of it.

    `kind` is how the ranks that saved them shared the work.
    A rank that the saved run did not have gets a stream that begins at this step.
    """
    streams = [state["random"], *state.get(_OTHERS, ())]
    if peers.rank < len(streams):
        restore_random_state(streams[peers.rank])
    else:
        seed_everything(seed, f"{stream_of(peers.rank)} from step {state['step']} on")
    if len(streams) == peers.size and kind == peers.kind:
        return ""
    if len(streams) == peers.size:
        return (
            f"the run was saved by {peers.size} ranks with {kind} and goes on with {peers.kind} "
            f"from step {state['step']} on, whose sums may associate otherwise"
        )
    return (
        f"the run was saved by {_counted(len(streams))} and goes on with {peers.size} from step "
        f"{state['step']} on: the same samples in the same batches, but sums associate otherwise, "
        "and random numbers differ"
    )


def _counted(ranks: int) -> str:
    return f"{ranks} rank{'s' if ranks > 1 else ''}"


def require_same_weights(model: nn.Module, peers: Peers, step: int) -> None:
    """Raise ParallelError unless every rank holds the same weights, bit for bit.

    Of shards only those that are not cut can be compared.
    """
    if peers.size == 1:
        return
    own = checkpoint.fingerprint(
        {n: p.detach() for n, p in model.named_parameters() if not is_shared(p)}
    )
    hashes = peers.gather(own)
    differing = [rank for rank, other in enumerate(hashes) if other != hashes[0]]
    if differing:
        raise ParallelError(
            f"after step {step} rank {differing[0]} holds other weights than rank 0",
            hint="does the recipe change weights outside of the optimizer, or do the machines "
            "compute differently? The last checkpoint was written before",
        )


def with_peaks(record: RunRecord, peers: Peers) -> RunRecord:
    """Return the record with the peak of every rank, where all of them have one."""
    if peers.size == 1:
        return record
    peaks = peers.gather(record.peak_bytes)
    known = tuple(peak for peak in peaks if peak is not None)
    return replace(record, rank_peak_bytes=known) if len(known) == peers.size else record
