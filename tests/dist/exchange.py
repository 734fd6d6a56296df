"""What `test_scattering` starts under torchrun: gradients of every size, added up over the ranks.

Each rank knows the gradients of all, as they come from seeds, and compares the rows that it gets
with the sum that it adds up by itself.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from narrowcast.parallel import scattering
from narrowcast.parallel.peers import joined
from narrowcast.parallel.scattering import Exchange
from narrowcast.parallel.shards import rows_of
from narrowcast.parallel.together import together_in

CPU = torch.device("cpu")
ROUND, TOGETHER = scattering._ROUND, scattering._TOGETHER
FORMATS = [
    (gradient, reduce)
    for gradient in (torch.bfloat16, torch.float16, torch.float32)
    for reduce in (torch.float32, torch.bfloat16, torch.float16)
]
SHAPES = [
    (1,), (3,), (5, 7), (33, 2, 3), (ROUND - 1,), (ROUND,), (ROUND + 1,), (TOGETHER - 1,),
    (TOGETHER,), (TOGETHER + 1,), (2 * TOGETHER + 3,), (3, TOGETHER), (TOGETHER // 8, 8),
    (TOGETHER // 8 + 1, 8), (17, 16 * 8192 + 1), (2, 5), (4, 1),
]  # fmt: skip


def gradients(rank: int, batch: int, dtype: torch.dtype) -> list[Tensor]:
    """Make every rank's gradients of one micro-batch, of which one is not contiguous."""
    generator = torch.Generator().manual_seed(1000 * batch + rank)
    made = [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]
    made.append(torch.randn(6, 5, generator=generator).to(dtype).t())
    return made


def expected(ranks: int, batches: int, dtype: torch.dtype, reduce: torch.dtype) -> list[Tensor]:
    """Add up in the format of sums, the second half of the ranks to the first, and round once."""
    terms: list[list[Tensor]] = []
    for rank in range(ranks):
        sums = gradients(rank, 0, dtype)
        if batches > 1:
            sums = [each.to(reduce) for each in sums]
        for batch in range(1, batches):
            sums = [s.add_(g) for s, g in zip(sums, gradients(rank, batch, dtype), strict=True)]
        terms.append([each.to(reduce) for each in sums])
    while len(terms) > 1:
        half = -(-len(terms) // 2)
        for lower, upper in zip(terms, terms[half:], strict=False):
            lower[:] = [one + other for one, other in zip(lower, upper, strict=True)]
        terms = terms[:half]
    return [total.to(dtype) for total in terms[0]]


def main(root: Path) -> None:
    """Leave the cases in which a sum was not the expected one."""
    meeting = together_in("fsdp2", os.environ).meeting
    wrong = []
    with joined(meeting, "fsdp2", CPU) as ranks:
        group = torch.distributed.group.WORLD
        assert group is not None
        for dtype, reduce in FORMATS:
            for batches in (1, 3):
                exchange = Exchange(group, CPU, reduce)
                wholes = expected(ranks.size, batches, dtype, reduce)
                cuts = [rows_of(whole.shape[0], ranks.rank, ranks.size) for whole in wholes]
                parts = [w.narrow(0, *cut) for w, cut in zip(wholes, cuts, strict=True)]
                owns = [nn.Parameter(torch.zeros(p.shape, dtype=dtype)) for p in parts]
                for batch in range(batches):
                    exchange.begin(meets=batch == batches - 1)
                    made = gradients(ranks.rank, batch, dtype)
                    for own, gradient in zip(owns, made, strict=True):
                        exchange.take(own, gradient)
                exchange.end()
                for own, part, whole in zip(owns, parts, wholes, strict=True):
                    same = own.grad is not None and torch.equal(own.grad, part)
                    if not same or own.grad is None or own.grad.dtype is not dtype:
                        wrong.append(f"{dtype} in {reduce}, {batches}, {tuple(whole.shape)}")
    (root / f"rank-{meeting.world.rank}.json").write_text(json.dumps(wrong))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
