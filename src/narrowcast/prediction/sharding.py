"""One rank of several that are not there: torch's own DDP and FSDP2, on tensors without contents.

Nothing of buckets, chunks, padding or prefetching is known here. A process group of torch's backend
"fake" has as many ranks as are asked for, and its collectives return at once what they were given;
on it the code of a training wraps or shards the model (``parallel``), and torch's reducer and
``fully_shard`` make and free in their own order what they would among real ranks. The rank is 0,
whose shards are the largest: dimension 0 is cut into equal chunks, and the last ones are what is
left of it.

What the ranks would tell each other on the host is answered with this rank's own word.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import device_mesh
from torch.testing._internal.distributed import fake_pg

from narrowcast.engine.ranks import share
from narrowcast.errors import UnknownName, UsageError
from narrowcast.memory.modules import in_backward
from narrowcast.optim import narrow
from narrowcast.parallel import scattering
from narrowcast.parallel.meeting import Meeting
from narrowcast.parallel.peers import ALONE, Peers, Ranks
from narrowcast.parallel.replicas import Replicas
from narrowcast.parallel.together import KINDS
from narrowcast.parallel.world import World
from narrowcast.prediction.fakes import replaced
from narrowcast.profiling import Bench

__all__ = ["Imagined", "assumed_of_ranks", "imagined_ranks", "notes_on_ranks", "sent_by", "shared"]

Value = TypeVar("Value")

# The first since torch 2.13; `fully_shard` calls it by the name of its day.
_ALL_GATHERS = ("all_gather_single", "all_gather_into_tensor")


class Imagined(Ranks):
    """Rank 0 of ranks that are all like it: its own answer is the answer of all.

    Collectives on tensors are those of ``Ranks``, on the group that is there.
    """

    def __init__(self, kind: str, size: int) -> None:
        world = World(rank=0, size=size, address="nowhere")
        super().__init__(Meeting(world, fake_pg.FakeStore()), kind, None)
        self.moved: Counter[str] = Counter()
        """Bytes of the tensors that met so far, whole, by collective."""

    def any_of_each(self, flags: Sequence[bool]) -> list[bool]:
        return list(flags)

    def gather(self, value: Value) -> list[Value]:
        return [value] * self.size

    def sent_bytes(self, steps: int) -> dict[str, int]:
        """Return what a rank sends a step, of `steps` that were taken, by ring algorithms.

        Buffers that a step has written to are sent as well, and not counted.
        On a ring of W ranks a rank passes on (W - 1) of the W parts of a tensor, and twice so many
        if all of them are to have the sum (Patarasuk and Yuan 2009).
        """
        parts = (self.size - 1) / self.size
        return {
            name: round(parts * size / steps) * (2 if name == "all_reduce" else 1)
            for name, size in sorted(self.moved.items())
        }

    def each(self, numbers: Sequence[float]) -> list[list[float]]:
        return [[float(number) for number in numbers]] * self.size


def _require_ranks(kind: str | None, size: int | None) -> None:
    """Raise UsageError or UnknownName for ranks that cannot be asked for."""
    if kind is not None and kind not in KINDS:
        raise UnknownName.of("kind of parallel training", kind, KINDS)
    if (kind is None) != (size is None):
        given, missing = ("--world", "--parallel") if kind is None else ("--parallel", "--world")
        raise UsageError(
            f"{given} was given without {missing}: ranks have a number and a way to share",
            hint=f"--world N --parallel {'|'.join(KINDS)} (world= and parallel= in Python)",
        )
    if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
        raise UsageError(f"the number of ranks is {size!r}", hint="a whole number, at least 1")


@contextmanager
def imagined_ranks(kind: str | None, size: int | None) -> Iterator[Peers]:
    """Be one of `size` ranks for the block; ``ALONE`` if none are asked for.

    Raises UsageError and UnknownName for ranks that cannot be, and in a process that is one.
    """
    _require_ranks(kind, size)
    if kind is None or size is None:
        yield ALONE
        return
    if dist.is_initialized():
        raise UsageError(
            "this process is a rank of a torch.distributed group, and a prediction for several "
            "ranks needs a group of its own",
            hint="predict in a process of its own: `narrowcast predict` is one",
        )
    dist.init_process_group("fake", rank=0, world_size=size, store=fake_pg.FakeStore())
    ranks = Imagined(kind, size)
    try:
        # Made here, as a mesh reads the numbers of its ranks, which on a stage have no contents.
        mesh = device_mesh.init_device_mesh("cpu", (size,))
        with ExitStack() as stack:
            # There is nobody whose seeds and fingerprints could be others.
            stack.enter_context(replaced(narrow, are_several=lambda: False))
            stack.enter_context(_collectives(ranks.moved))
            stack.enter_context(replaced(device_mesh, init_device_mesh=lambda *_: mesh))
            stack.enter_context(warnings.catch_warnings())
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
            yield ranks
    finally:
        for let_go in ranks.before_parting:
            let_go()
        dist.destroy_process_group()


def shared(bench: Bench, peers: Peers) -> Bench:
    """Return the bench with a loss whose gradients meet those of the other ranks."""
    found = share(bench.engine, bench.loss, peers)
    if found is None:
        return bench
    buckets = found.buckets if isinstance(found, Replicas) else bench.buckets
    return replace(bench, loss=found.compute_loss, buckets=buckets)


def sent_by(bench: Bench) -> dict[str, int]:
    """Return what the imagined rank sends a step; {} for a process that is alone."""
    peers = bench.peers
    return peers.sent_bytes(bench.engine.tried_steps()) if isinstance(peers, Imagined) else {}


def assumed_of_ranks(peers: Peers, device: torch.device) -> tuple[str, ...]:
    """Say what a prediction for ranks takes for granted, and what it leaves out."""
    if peers.kind and not peers.cuts:
        return ("sums of gradients are under way until backward ends: the network is slower",)
    if not peers.cuts or device.type == "cpu":
        return ()
    return (
        "the allocator has one stream; fsdp2 gathers and adds up on others, that share no memory",
        "the model arrives in parts; before it is cut, a training holds it whole on each GPU",
    )


def notes_on_ranks(peers: Peers, *, break_even: bool) -> list[str]:
    """Say what is predicted of several ranks, and what is left out."""
    if not peers.kind:
        return []
    notes = [f"{peers.kind} on {peers.size} ranks: the peak is that of rank 0"]
    if break_even:
        notes.append("nothing was compared with fp32, which is done for one process")
    return notes


class _Done:
    """The work of a collective that returned what it was given."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    def get_future(self) -> torch.futures.Future[Any]:
        future: torch.futures.Future[Any] = torch.futures.Future()
        future.set_result([self._tensor])
        return future

    def wait(self) -> None:
        """Do nothing."""


@contextmanager
def _collectives(moved: Counter[str]) -> Iterator[None]:
    """Stand in for the collectives of a step: they note the bytes of the whole, and move nothing.

    Those of the fake group would do, but that DDP's hook asks for a result, which it has not. And
    how long a sum is under way depends on the network: here until backward ends, which is as long
    as it can be. It matters where the format of sums is not that of gradients, so that a sum is a
    copy.
    """
    under_way: list[Tensor] = []

    def all_reduce(_: Any, tensors: list[Tensor], *__: Any, **___: Any) -> _Done:
        (tensor,) = tensors
        moved["all_reduce"] += tensor.nbytes
        if in_backward():
            if not under_way:
                torch.autograd.Variable._execution_engine.queue_callback(under_way.clear)
            under_way.append(tensor)
        return _Done(tensor)

    def all_gather(output_tensor: Tensor, *_: Any, async_op: bool = False, **__: Any) -> None:
        assert not async_op, "fully_shard orders its gathering by streams"
        moved["all_gather"] += output_tensor.nbytes

    def deliver(_: Tensor, given: Tensor, *__: Any) -> None:
        moved["all_to_all"] += given.nbytes

    gathering = {name: all_gather for name in _ALL_GATHERS if hasattr(dist, name)}
    with (
        replaced(dist.ProcessGroup, allreduce=all_reduce),
        replaced(dist, **gathering),
        replaced(scattering, deliver=deliver, require_same_size=lambda *_: None),
    ):
        yield
