"""A rank's share of training and evaluation batches."""

from __future__ import annotations

import pytest
import torch

from narrowcast.data import BatchStream, evaluation_batches
from narrowcast.errors import UsageError

NUMBERS = torch.arange(22)


@pytest.mark.parametrize("ranks", [1, 2, 3, 6])
def test_shares_make_up_the_batches_in_their_order(ranks: int) -> None:
    """Over several epochs; position and hash are those of whole batches."""
    whole = BatchStream(NUMBERS, 6, seed=3)
    shares = [BatchStream(NUMBERS, 6, seed=3, share=(rank, ranks)) for rank in range(ranks)]
    for _ in range(8):
        ids, batch = next(whole)
        parts = [next(share) for share in shares]

        assert torch.equal(torch.cat([own for own, _ in parts]), ids)
        assert torch.equal(torch.cat([own for _, own in parts]), batch)
    assert all(share.state_dict() == whole.state_dict() for share in shares)


def test_ranks_that_do_not_divide_a_batch_are_refused() -> None:
    """With both numbers."""
    with pytest.raises(UsageError, match="6 samples cannot be shared equally by 4 ranks"):
        BatchStream(NUMBERS, 6, seed=0, share=(0, 4))


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_evaluation_shares_hold_every_sample_once(ranks: int) -> None:
    """Batches are those of one process, taken in turn; a rank may have none."""
    whole = [ids.tolist() for ids, _ in evaluation_batches(NUMBERS, 5)]
    shares = [
        [ids.tolist() for ids, _ in evaluation_batches(NUMBERS, 5, share=(rank, ranks))]
        for rank in range(ranks)
    ]

    assert [shares[turn % ranks][turn // ranks] for turn in range(len(whole))] == whole
    assert sum(map(len, shares)) == len(whole)
