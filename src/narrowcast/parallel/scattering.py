"""Reduce-scatter without a copy, where gloo would make one.

gloo has no reduce-scatter: what goes by that name copies the whole input, adds up the copies over
the ranks, and takes this rank's part (torch/csrc/distributed/c10d/ProcessGroupGloo.cpp,
reduce_scatter_tensor_coalesced). The copy is as large as a block's gradients, and the input of
FSDP2 is its own to write to, so here it is the input that is added up. The sums are the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from narrowcast.errors import UsageError

__all__ = ["AddedInPlace"]


class AddedInPlace:
    """For ``FSDPModule.set_custom_reduce_scatter``; uses up the input."""

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,  # noqa: FBT001, FBT002 -- torch's signature
    ) -> None:
        assert not async_op, "fully_shard orders its reductions by streams, and a CPU has none"
        _require_same_size(input_tensor.numel(), group)
        dist.all_reduce(input_tensor, op, group=group)
        output_tensor.copy_(input_tensor.view(group.size(), -1)[group.rank()])


def _require_same_size(numel: int, group: dist.ProcessGroup) -> None:
    """Raise UsageError on every rank if they bring gradients of different sizes.

    gloo would end the process without a word. Costs a message of 16 bytes.
    """
    sizes = torch.tensor([numel, -numel])
    dist.all_reduce(sizes, dist.ReduceOp.MAX, group=group)
    largest, smallest = sizes[0].item(), -sizes[1].item()
    if largest != smallest:
        raise UsageError(
            f"the gradients of one block have {smallest} elements on one rank and {largest} on "
            "another: a parameter takes part in the loss on some ranks only, and fsdp2 adds up "
            "what all of them have",
            hint="let every parameter take part in every loss, or use --parallel ddp",
        )
