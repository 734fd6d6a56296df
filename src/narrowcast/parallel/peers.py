"""What one rank asks of the others during a training, and the same for a process that is alone.

Few and small: whether any of them ..., what each of them has, means of numbers. Gradients meet
in ``replicas``, or in `add_up` where backward cannot reduce them. Answers are the same, bit for
bit, on every rank, so that all of them decide alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore

from narrowcast.parallel.meeting import Meeting

__all__ = ["ALONE", "Alone", "Peers", "Ranks", "joined"]

Value = TypeVar("Value")

# DDP's own size of a bucket: large enough for the network's full speed.
_BUCKET_BYTES = 25 * 2**20


class Alone:
    """A process without others: every answer is its own."""

    rank = 0
    size = 1
    is_main = True
    kind = ""
    cuts = False

    def any(self, flag: bool, /) -> bool:  # noqa: FBT001 -- a question
        return flag

    def any_of_each(self, flags: Sequence[bool]) -> list[bool]:
        return list(flags)

    def gather(self, value: Value) -> list[Value]:
        return [value]

    def means_and_any(self, numbers: Sequence[float], flag: bool) -> tuple[list[float], bool]:  # noqa: FBT001 -- a question
        return list(numbers), flag

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Change nothing: the sum over one rank."""

    def take_from_main(self, tensors: Sequence[Tensor]) -> None:
        """Change nothing: this is rank 0."""

    def failing_together(self) -> AbstractContextManager[None]:
        return nullcontext()


ALONE = Alone()


class Ranks:
    """The ranks of a process group; every method is a collective, to be called by all of them."""

    def __init__(self, meeting: Meeting, kind: str, control: dist.ProcessGroup | None) -> None:
        self.rank = meeting.world.rank
        self.size = meeting.world.size
        self.is_main = meeting.world.is_main
        self.kind = kind
        """How the ranks share the work: "ddp" or "fsdp2"."""
        self.cuts = kind == "fsdp2"
        """Whether a rank holds a part of each weight, so that computing takes all of them."""
        self.before_parting: list[Callable[[], None]] = []
        """What is to be let go of while the process group is still there."""
        self._meeting = meeting
        self._control = control
        """A group on gloo, for what is decided on the host; None: the default group is one."""

    def any(self, flag: bool, /) -> bool:  # noqa: FBT001 -- a question
        """Whether it is so on any rank."""
        return self.any_of_each([flag])[0]

    def any_of_each(self, flags: Sequence[bool]) -> list[bool]:
        """Whether each of several things is so on any rank."""
        seen = torch.tensor(flags, dtype=torch.uint8)
        dist.all_reduce(seen, dist.ReduceOp.MAX, group=self._control)
        return [bool(flag) for flag in seen.tolist()]

    def gather(self, value: Value) -> list[Value]:
        """Return every rank's value, in the order of the ranks."""
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value, group=self._control)
        return found

    def means_and_any(self, numbers: Sequence[float], flag: bool) -> tuple[list[float], bool]:  # noqa: FBT001 -- a question
        """Return the mean of each number over the ranks, and whether the flag is so on any.

        In one message. A mean is summed in the order of the ranks, in fp64.
        """
        told = self.each([*numbers, float(flag)])
        *sums, flags = (sum(of_ranks) for of_ranks in zip(*told, strict=True))
        return [each / self.size for each in sums], flags > 0

    def each(self, numbers: Sequence[float]) -> list[list[float]]:
        """Return every rank's numbers, as fp64, in the order of the ranks."""
        own = torch.tensor(numbers, dtype=torch.float64)
        found = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(found, own, group=self._control)
        return [rank.tolist() for rank in found]

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Make each tensor its sum over the ranks, in its own dtype, bucket after bucket.

        All ranks pass tensors of the same shapes and dtypes in the same order.
        """
        for bucket in _buckets(tensors):
            flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
            dist.all_reduce(flat)
            parts = torch.split(flat, [tensor.numel() for tensor in bucket])
            for tensor, part in zip(bucket, parts, strict=True):
                tensor.copy_(part.view_as(tensor))

    def take_from_main(self, tensors: Sequence[Tensor]) -> None:
        """Make each tensor what it is on rank 0, in any dtype: their bytes are sent together."""
        left = iter(tensors)
        for bucket in _buckets([_bytes_of(tensor) for tensor in tensors]):
            flat = torch.cat(bucket)
            dist.broadcast(flat, 0)
            parts = torch.split(flat, [own.numel() for own in bucket])
            for own, sent in zip(bucket, parts, strict=True):
                tensor = next(left)
                if not self.is_main and own.numel():
                    # A copy, since bytes can be read as another dtype from where that begins only.
                    tensor.detach().copy_(sent.clone().view(tensor.dtype).view(tensor.shape))

    def failing_together(self) -> AbstractContextManager[None]:
        """Turn what the block raises into what this rank is to say of it."""
        return self._meeting.failing_together()


Peers = Alone | Ranks


@contextmanager
def joined(meeting: Meeting, kind: str, device: torch.device) -> Iterator[Ranks]:
    """Be a member of the process group for the block; no wait in it is longer than the limit."""
    world = meeting.world
    limit = timedelta(seconds=world.limit_s)
    on_cuda = device.type == "cuda"
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if on_cuda else "gloo",
        store=PrefixStore(f"narrowcast/{world.attempt}/group", meeting.store),
        rank=world.rank,
        world_size=world.size,
        timeout=limit,
    )
    ranks = None
    try:
        control = dist.new_group(backend="gloo", timeout=limit) if on_cuda else None
        dist.monitored_barrier(control, timeout=limit, wait_all_ranks=True)
        ranks = Ranks(meeting, kind, control)
        yield ranks
    finally:
        for let_go in ranks.before_parting if ranks is not None else ():
            let_go()
        dist.destroy_process_group()


def _bytes_of(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Cut a list into runs of one dtype and device and at most the size of a bucket."""
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        is_like = bucket and (tensor.dtype, tensor.device) == (bucket[0].dtype, bucket[0].device)
        if bucket and (not is_like or size + tensor.nbytes > _BUCKET_BYTES):
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.nbytes
    if bucket:
        yield bucket
