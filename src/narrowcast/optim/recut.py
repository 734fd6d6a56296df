"""Block-wise codes of a parameter that was cut over some ranks, for a cut over others.

Blocks begin where a part does. If a new part begins where a block did, and all old parts in it end
at the ends of blocks, its codes are the old ones, laid end to end. Otherwise a block would hold
elements of two old ones: they are decoded and encoded again to nearest, which moves each element by
at most half a gap of its new block's grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from narrowcast.blockwise import BlockCode

__all__ = ["CodedPart", "recut"]


@dataclass(frozen=True, kw_only=True, eq=False)
class CodedPart:
    """Elements `start` to `start` + `count` of a whole, as codes and scales."""

    start: int
    count: int
    codes: Tensor
    scales: Tensor

    @property
    def stop(self) -> int:
        return self.start + self.count


def recut(
    code: BlockCode, parts: Sequence[CodedPart], start: int, count: int
) -> tuple[Tensor, Tensor]:
    """Return codes and scales of elements `start` to `start` + `count`, as new tensors.

    `parts` are in order and cover them.
    """
    stop = start + count
    touched = [part for part in parts if part.count and part.start < stop and part.stop > start]
    codes, scales = code.zeros(count, parts[0].codes.device)
    if all(_fits(code, part, start, stop) for part in touched):
        for part in touched:
            _copy(code, part, (codes, scales), start=start, stop=stop)
        return codes, scales
    values = torch.empty(count, dtype=torch.float32, device=codes.device)
    for part in touched:
        first, last = max(part.start, start), min(part.stop, stop)
        decoded = code.decode(part.codes, part.scales, part.count)
        values[first - start : last - start] = decoded[first - part.start : last - part.start]
    if count:
        code.encode(values, codes, scales, None)
    return codes, scales


def _fits(code: BlockCode, part: CodedPart, start: int, stop: int) -> bool:
    """Whether the blocks of an old part are blocks of the new one."""
    ends_with_block = part.stop >= stop or part.count % code.block == 0
    starts_with_block = (part.start - start) % code.block == 0
    # Cut in the middle of a block, its scale is that of elements that are no longer there: the
    # codes are right all the same, and the numbers that they stand for are the same.
    return ends_with_block and starts_with_block


def _copy(
    code: BlockCode, part: CodedPart, into: tuple[Tensor, Tensor], *, start: int, stop: int
) -> None:
    """Copy those of a part's codes that lie between `start` and `stop` to where they belong."""
    codes, scales = into
    first, last = max(part.start, start), min(part.stop, stop)
    here, there, count = first - start, first - part.start, last - first
    size = code.code_bytes(count)
    at, of = code.code_bytes(here), code.code_bytes(there)
    codes[at : at + size] = part.codes[of : of + size]
    if code.bits == 4 and count % 2:
        codes[at + size - 1] &= 15  # the neighbour that shared the byte is another part's
    blocks = code.blocks(count)
    at, of = here // code.block, there // code.block
    scales[at : at + blocks] = part.scales[of : of + blocks]
