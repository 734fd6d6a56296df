"""What a training on several ranks does otherwise than one in one process.

Rank 0 alone writes. A checkpoint holds what all ranks have in common once, and each rank's random
states; a run that goes on with as many ranks is the same run, bit for bit.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from narrowcast.errors import ParallelError
from narrowcast.parallel.failures import PeerFailed
from narrowcast.parallel.peers import Peers
from narrowcast.randomness import random_state, restore_random_state, seed_everything
from narrowcast.records.run import Evaluation, RunRecord, StepPoint
from narrowcast.training import checkpoint
from narrowcast.training.assembly import Assembly, stream_of

__all__ = [
    "NoMetrics",
    "gathered_streams",
    "kind_of",
    "require_same_weights",
    "restore_streams",
    "resumed_record",
    "shared_notes",
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


def shared_notes(parts: Assembly) -> tuple[str, ...]:
    """Say how the ranks share the work, and what of it they do not share."""
    peers, size = parts.peers, parts.stream.batch_size
    if not peers.kind:
        return ()
    notes = [f"{peers.kind} on {peers.size} ranks: {size // peers.size} of {size} samples on each"]
    if peers.size > 1 and any(isinstance(m, _BatchNorm) for m in parts.engine.model.modules()):
        notes.append(
            "batch norms normalise by the samples of their own rank, and the running statistics "
            "are rank 0's: that is not what one process does with the whole batch"
        )
    return tuple(notes)


def resumed_record(record: RunRecord, step: int, peers: Peers) -> RunRecord:
    """Return the record of a run that goes on after this step, on these ranks."""
    resumed_at = (*record.resumed_at, step)
    return replace(record, resumed_at=resumed_at, parallel=peers.kind, ranks=peers.size)


def kind_of(error: BaseException) -> str:
    """Return the class name of the error that ended a run, on whichever rank it arose."""
    return error.kind if isinstance(error, PeerFailed) else type(error).__name__


def gathered_streams(peers: Peers) -> dict[str, Any]:
    """Return the random states of all ranks, as a checkpoint holds them."""
    own, *others = peers.gather(random_state())
    return {"random": own} | ({_OTHERS: others} if others else {})


def restore_streams(state: dict[str, Any], peers: Peers, *, seed: int) -> str:
    """Set this rank's random states to the saved ones; returns what is to be said of it.

    A rank that the saved run did not have gets a stream that begins at this step.
    """
    streams = [state["random"], *state.get(_OTHERS, ())]
    if peers.rank < len(streams):
        restore_random_state(streams[peers.rank])
    else:
        seed_everything(seed, f"{stream_of(peers.rank)} from step {state['step']} on")
    if len(streams) == peers.size:
        return ""
    return (
        f"the run was saved by {len(streams)} ranks and goes on with {peers.size} from step "
        f"{state['step']} on: the same samples in the same batches, but sums associate otherwise, "
        "and random numbers differ"
    )


def require_same_weights(model: nn.Module, peers: Peers, step: int) -> None:
    """Raise ParallelError unless every rank holds the same weights, bit for bit."""
    if peers.size == 1:
        return
    own = checkpoint.fingerprint({name: p.detach() for name, p in model.named_parameters()})
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
