"""Gradients that meet: each becomes the sum over the ranks, of which every rank gets its own rows.

FSDP2 would wait for all gradients of a block, copy them together in the format of the sums, and
hold the copy until the next block is through: for 16-bit weights four times what the gradients
take. Here a gradient leaves as soon as autograd has it, from where it lies and in its own format:

    gradient    whole, on every rank
    sent        to each rank its rows, in rounds of bounded size; small ones together
    added up    where they are wanted, in the format of sums, in pairs by the numbers of ranks
    rounded     once, to the format of the weight

So half as much is sent of 16-bit gradients, and a sum depends on nothing but its terms: not on the
place of a weight in a block. Over micro-batches gradients are summed whole, in the format of sums.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from narrowcast.errors import UsageError

__all__ = ["Exchange", "deliver", "require_same_size"]

# Elements that smaller gradients wait for, to be sent together: about a block of a model so small
# that a message costs more than what is in it.
_TOGETHER = 2**17
# A larger one is sent in rounds: of so many elements of all ranks, or so many of each, or this
# share of it, whichever is the most. A round takes four times its size beside the gradient, so the
# first is small, though gloo takes hardly longer for four times as much. The others are for what
# is slow on many ranks and on GPUs: small messages and small kernels.
_ROUND = 2**16
_ROUND_OF_EACH = 2**13
_ROUNDS = 16


class Exchange:
    """Takes the gradients of one rank as they come, and leaves sums in ``.grad`` of its parts."""

    def __init__(self, group: dist.ProcessGroup, device: torch.device, reduce: torch.dtype) -> None:
        self._group = group
        self._rank, self._ranks = group.rank(), group.size()
        self._reduce = reduce
        self._meets = True
        self._sums: dict[nn.Parameter, Tensor] = {}
        """Whole gradients over the micro-batches so far, by the part that gets the sum."""
        self._waiting: list[tuple[nn.Parameter, Tensor]] = []
        self._waiting_elements = 0
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def begin(self, *, meets: bool) -> None:
        """Be ready for a backward pass, in which gradients meet or are summed here."""
        self._meets = meets
        self._forget_waiting()

    def discard(self) -> None:
        """Forget what has not met."""
        self._sums.clear()
        self._forget_waiting()

    def take(self, own: nn.Parameter, gradient: Tensor) -> None:
        """Take the whole gradient of a parameter, of which `own` is this rank's part."""
        known = self._sums.pop(own, None)
        total = gradient if known is None else known.add_(gradient)
        if not self._meets:
            self._sums[own] = total.to(self._reduce)
        elif total.numel() >= _TOGETHER:
            self._meet([(own, total)])
        else:
            if self._waiting and _formats(*self._waiting[0]) != _formats(own, total):
                self._meet_waiting()
            self._waiting.append((own, total))
            self._waiting_elements += total.numel()
            if self._waiting_elements >= _TOGETHER:
                self._meet_waiting()

    def end(self) -> None:
        """Let those that wait for company meet: backward is over, on all ranks."""
        self._meet_waiting()
        if self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)
        else:
            require_same_size(0, self._group)

    def _forget_waiting(self) -> None:
        self._waiting, self._waiting_elements = [], 0

    def _meet_waiting(self) -> None:
        waiting = self._waiting
        self._forget_waiting()
        if waiting:
            self._meet(waiting)

    def _meet(self, gradients: Sequence[tuple[nn.Parameter, Tensor]]) -> None:
        if self._stream is None:
            require_same_size(sum(each.numel() for _, each in gradients), self._group)
        with self._beside_backward(gradients):
            if len(gradients) == 1:
                self._sum_alone(*gradients[0])
            else:
                self._sum_together(gradients)

    @contextmanager
    def _beside_backward(self, gradients: Sequence[tuple[nn.Parameter, Tensor]]) -> Iterator[None]:
        """On a GPU, work on a stream of its own, which `end` waits for."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for _, gradient in gradients:
                gradient.record_stream(self._stream)
            yield

    def _sum_alone(self, own: nn.Parameter, gradient: Tensor) -> None:
        summed = torch.empty_like(own)
        # As `fully_shard` cuts: the last ranks may have fewer rows, or none.
        rows = -(-gradient.shape[0] // self._ranks)
        share = rows * (gradient.numel() // gradient.shape[0])
        step = max(_ROUND // self._ranks, _ROUND_OF_EACH, -(-share // _ROUNDS))
        self._sum(gradient.reshape(-1), share, summed.view(-1), step=step)
        _leave(own, summed)

    def _sum_together(self, gradients: Sequence[tuple[nn.Parameter, Tensor]]) -> None:
        """Send gradients of one format as one: rows of ranks, zeros where a rank has fewer."""
        rows = [_rows_of_ranks(each, self._ranks) for _, each in gradients]
        together = torch.cat(rows, dim=1)
        share = together.shape[1]
        summed = together.new_empty(share, dtype=gradients[0][0].dtype)
        self._sum(together.view(-1), share, summed, step=share)
        start = 0
        for (own, _), row in zip(gradients, rows, strict=True):
            _leave(own, summed.as_strided(own.shape, own.stride(), start))
            start += row.shape[1]

    def _sum(self, given: Tensor, share: int, summed: Tensor, *, step: int) -> None:
        """Put this rank's stretch of the sum of `given` into `summed`, in rounds of `step` each.

        A stretch has `share` elements, but for the last one.
        """
        whole = given.numel() // share
        stretches = given[: whole * share].view(whole, share)
        last = given[whole * share :]
        for start in range(0, share, step):
            of_last = last[start : start + step]
            of_each = stretches[:, start : start + step]
            sizes = [of_each.shape[1]] * whole + [of_last.numel()] + [0] * self._ranks
            sent = torch.cat([of_each.reshape(-1), of_last])
            self._sum_round(self._as_sent(sent), sizes[: self._ranks], summed[start:])

    def _sum_round(self, sent: Tensor, sizes: list[int], summed: Tensor) -> None:
        """Send to each rank its elements, and put the sum of what comes at the beginning."""
        own = sizes[self._rank]
        received = sent.new_empty(own * self._ranks)
        deliver(received, sent, [own] * self._ranks, sizes, self._group)
        self._free(sent)
        summed[:own].copy_(_added_up(received.view(self._ranks, own), self._reduce))
        self._free(received)

    def _free(self, sent: Tensor) -> None:
        """Let go of memory that gloo's threads hold on to when they have done with it."""
        if self._stream is None:
            sent.untyped_storage().resize_(0)

    def _as_sent(self, gradient: Tensor) -> Tensor:
        """Return a gradient in its own format, or in that of sums where this is not wider."""
        wider = self._reduce.itemsize > gradient.dtype.itemsize
        return gradient if wider else gradient.to(self._reduce)


def deliver(
    received: Tensor,
    given: Tensor,
    received_sizes: list[int],
    given_sizes: list[int],
    group: dist.ProcessGroup,
) -> None:
    """Send to each rank its stretch of `given`, and put what they send one after the other."""
    dist.all_to_all_single(received, given, received_sizes, given_sizes, group=group)


def require_same_size(numel: int, group: dist.ProcessGroup) -> None:
    """Raise UsageError on every rank if they bring gradients of different sizes, or none.

    gloo would end the process without a word. Costs a message of 16 bytes.
    """
    sizes = torch.tensor([numel, -numel])
    dist.all_reduce(sizes, dist.ReduceOp.MAX, group=group)
    largest, smallest = sizes[0].item(), -sizes[1].item()
    if largest != smallest:
        raise UsageError(
            f"gradients that are to be added up have {smallest} elements on one rank and "
            f"{largest} on another: a parameter takes part in the loss on some ranks only, and "
            "fsdp2 adds up what all of them have",
            hint="let every parameter take part in every loss, or use --parallel ddp",
        )


def _formats(own: Tensor, gradient: Tensor) -> tuple[torch.dtype, torch.dtype]:
    return own.dtype, gradient.dtype


def _rows_of_ranks(gradient: Tensor, ranks: int) -> Tensor:
    """Return a gradient as one row for each rank, filled up with zeros."""
    missing = -gradient.shape[0] % ranks
    if missing:
        gradient = F.pad(gradient.reshape(gradient.shape[0], -1), (0, 0, 0, missing))
    return gradient.reshape(ranks, -1)


def _added_up(terms: Tensor, reduce: torch.dtype) -> Tensor:
    """Add up the rows, the second half to the first until one is left: few kernels for many ranks.

    May change `terms`. Of 16-bit terms and fp32 sums it takes as much again as `terms`.
    """
    while len(terms) > 1:
        half = -(-len(terms) // 2)
        wide = terms[:half].to(reduce)
        wide[: len(terms) - half].add_(terms[half:])
        terms = wide
    return terms[0]


def _leave(own: nn.Parameter, summed: Tensor) -> None:
    own.grad = summed if own.grad is None else own.grad.add_(summed)
    # torch calls the hooks of parameters that autograd reaches, and this one it does not.
    for hook in (own._post_accumulate_grad_hooks or {}).values():
        hook(own)
