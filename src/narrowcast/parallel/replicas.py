"""DDP: every rank holds the whole model, and gradients are added up while backward runs.

What torch's DDP wraps is the recipe's loss with the model inside of it, and not the model: a loss
may then call any method of the model, as often as it likes.

Gradients meet in the policy's reduction format, fp32 by default: bf16 gradients are widened,
summed and rounded once. They are not divided by the number of ranks: the engine starts backward
from the rank's share of the mean, as it does with a micro-batch, so that fp16 gradients on the way
overflow and underflow where those of one process do.

DDP is told to look for unused parameters, for two reasons. A parameter that takes no part keeps its
gradient None, as it does in one process; and the buckets stay what they are from the first step on,
where DDP would rearrange them after it. With three and more ranks the order of a sum depends on its
place in a bucket, so that a resumed run could not be exact.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import GradBucket
from torch.nn.parallel import DistributedDataParallel

from narrowcast.errors import UsageError
from narrowcast.parallel.buffers import SharedBuffers
from narrowcast.parallel.peers import Ranks

__all__ = ["LossFunction", "Passes", "Replicas"]

LossFunction = Callable[[nn.Module, Any], Tensor]

# DDP's own size of a bucket, given so that all have it: as it comes DDP sends 1 MiB apart, to begin
# early. For gradients that fit in one bucket that is a second message, which costs more than it
# saves (docs/distributed.md).
_BUCKET_MB = 25


@dataclass(frozen=True, kw_only=True)
class Passes:
    """What there is to know of the pass to come."""

    begins: Callable[[], bool]
    """Whether it is a step's first. Buffers are sent then, as after a checkpoint, from which all
    ranks take rank 0's: a resumed run is exact."""
    meets: Callable[[], bool]
    """Whether gradients meet in its backward; 16-bit sums of several micro-batches may later."""


class _Loss(nn.Module):
    """A loss function as a module, so that DDP sees where a forward pass begins and ends."""

    def __init__(self, model: nn.Module, compute_loss: LossFunction) -> None:
        super().__init__()
        self.model = model
        self._compute_loss = compute_loss

    def forward(self, batch: Any) -> Tensor:
        return self._compute_loss(self.model, batch)


class Replicas:
    """A model on every rank, and the loss whose gradients meet."""

    def __init__(
        self,
        model: nn.Module,
        compute_loss: LossFunction,
        ranks: Ranks,
        *,
        reduce: torch.dtype,
        passes: Passes,
    ) -> None:
        """`reduce` is the format of sums."""
        _require_dense(model)
        self._passes = passes
        self._buffers = SharedBuffers(model, ranks)
        self._loss = _Loss(model, compute_loss)
        self._reduce = reduce
        self._buckets: dict[int, Tensor] = {}
        self._ddp = self._wrapped()
        ranks.before_parting.append(self._let_go)

    def renew(self) -> None:
        """Wrap the model again, once something has put other tensors into its parameters.

        An evaluation in fp32 does so where weights are 16-bit. Autograd then forgets where a
        gradient was to go, and DDP, which had listened there, would hear of none (torch 2.13).
        """
        if any(p.element_size() < 4 for p in self._loss.model.parameters()):
            self._let_go()
            self._ddp = self._wrapped()

    def _wrapped(self) -> DistributedDataParallel:
        with warnings.catch_warnings():
            # Its new name, init_sync_buffers, is not there yet (torch 2.13).
            warnings.filterwarnings("ignore", "`broadcast_buffers`", FutureWarning)
            ddp = self._ddp_as_it_should_be()
        ddp.register_comm_hook(None, _summing(self._reduce, self._buckets))
        return ddp

    def _ddp_as_it_should_be(self) -> DistributedDataParallel:
        return DistributedDataParallel(
            self._loss,
            broadcast_buffers=False,  # see ``buffers``
            init_sync=False,  # weights were compared: unequal ones are an error
            gradient_as_bucket_view=True,
            find_unused_parameters=True,
            bucket_cap_mb=_BUCKET_MB,
        )

    def buckets(self) -> list[Tensor]:
        """Return what gradients lie in; DDP shows it in a backward pass in which ranks meet."""
        return list(self._buckets.values())

    def compute_loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Return this rank's loss; its backward pass adds up gradients if it ends a step."""
        self._ddp.require_backward_grad_sync = self._passes.meets()  # what DDP.no_sync() sets
        if self._passes.begins():
            self._buffers.share()
        loss: Tensor = self._ddp(batch)
        return loss

    def _let_go(self) -> None:
        """Free DDP's reducer, so that it is not the last to hold the process group.

        It would end the group's threads while it holds Python's lock, which one of them may be
        waiting for: both then wait for ever (seen with torch 2.13).
        """
        self._buckets.clear()
        for name in ("reducer", "logger"):
            vars(self._ddp).pop(name, None)


def _summing(
    reduce: torch.dtype, buckets: dict[int, Tensor]
) -> Callable[[Any, GradBucket], torch.futures.Future[Tensor]]:
    """Return the hook that makes a bucket its sum over the ranks, summed in a format.

    What it is shown, it notes in `buckets`.
    """

    def hook(_: Any, bucket: GradBucket) -> torch.futures.Future[Tensor]:
        own = buckets[bucket.index()] = bucket.buffer()
        summed = own.to(reduce)
        group = dist.group.WORLD
        assert group is not None, "a backward pass outside of the group that DDP was made in"
        work = group.allreduce([summed])  # dist.all_reduce without its checks

        def back(done: torch.futures.Future[Any]) -> Tensor:
            total: Tensor = done.value()[0]
            return total if total.data_ptr() == own.data_ptr() else own.copy_(total)

        future: torch.futures.Future[Tensor] = work.get_future().then(back)
        return future

    hook.__annotations__.clear()  # DDP compares them with types, and here they are strings
    return hook


def _require_dense(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if getattr(module, "sparse", False) is True and isinstance(
            module, nn.Embedding | nn.EmbeddingBag
        ):
            raise UsageError(
                f"{name or 'the model'} makes sparse gradients, and ranks average dense ones",
                hint="build the embedding with sparse=False, or train in one process",
            )
