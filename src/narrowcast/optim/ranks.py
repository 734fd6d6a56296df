"""What the ranks of a distributed training must share before an optimizer may take a step.

DDP gives all ranks the same weights and gradients, and trusts that equal gradients make equal
steps. Here a step also rounds, by noise that comes from a seed, and a weight has a remainder that
DDP knows nothing of. So the ranks exchange seeds and fingerprints once, before the first step:

    seeds         every rank takes those of rank 0
    remainders    must be equal on ranks whose weights are equal, which are replicas of each other

Every rank sees all fingerprints, so that either none of them goes on or all do.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from narrowcast.errors import UsageError
from narrowcast.optim.layout import flat_range, layout_of
from narrowcast.optim.step import CHUNK
from narrowcast.optim.weights import REMAINDER

__all__ = ["agree", "are_several"]

_PATTERNS = {1: torch.int8, 2: torch.int16, 4: torch.int32}


def are_several() -> bool:
    """Whether this process is one of several ranks of torch.distributed."""
    distributed = torch.distributed
    return (
        distributed.is_available()
        and distributed.is_initialized()
        and distributed.get_world_size() > 1
    )


def agree(groups: list[dict[str, Any]], states: Mapping[Any, Mapping[str, Any]]) -> None:
    """Take rank 0's seeds; collective: every rank has to call it. Reads weights and remainders.

    Raises UsageError on all ranks where replicas differ in what no weight shows.
    """
    parameters = [parameter for group in groups for parameter in group["params"]]
    remainders = (states.get(parameter, {}).get(REMAINDER) for parameter in parameters)
    own = (
        [group["seed"] for group in groups],
        fingerprint(parameters),
        fingerprint(remainder for remainder in remainders if remainder is not None),
    )
    found: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, own)
    seeds, _, _ = found[0]
    for group, seed in zip(groups, seeds, strict=False):  # other groups: no replica of rank 0
        group["seed"] = seed
    first: dict[Any, tuple[int, Any]] = {}
    for rank, (_, weights, rest) in enumerate(found):
        other, held = first.setdefault(weights, (rank, rest))
        if held != rest:
            raise UsageError(
                f"ranks {other} and {rank} hold the same weights with different remainders: their "
                "fp32 masters differ, and would stay different",
                hint="build the optimizer after DistributedDataParallel has given all ranks the "
                "same weights, or seed all ranks alike before the model is built",
            )


@torch.no_grad()
def fingerprint(tensors: Iterable[Tensor]) -> tuple[Any, ...]:
    """Return shapes, dtypes and the sum of the bit patterns of each tensor; waits for the device.

    Range by range, since the sum of integers widens them.
    """
    shapes, sums = [], []
    for tensor in tensors:
        layout, pattern = layout_of(tensor), _PATTERNS[tensor.element_size()]
        shapes.append((tuple(tensor.shape), str(tensor.dtype)))
        total = torch.zeros((), dtype=torch.int64, device=tensor.device)
        for start in range(0, tensor.numel(), CHUNK):
            stop = min(start + CHUNK, tensor.numel())
            flat, _ = flat_range(tensor.detach(), layout, start, stop)
            total += flat.view(pattern).sum(dtype=torch.int64)
        sums.append(total)
    return tuple(zip(shapes, (int(total) for total in sums), strict=True))
