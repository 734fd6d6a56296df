"""Gradients of ranks are added up in one order, whatever their place, and rounded once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dist.launch import HERE, torchrun

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_every_rank_gets_its_rows_of_the_sum(ranks: int, tmp_path: Path) -> None:
    """Bit for bit the sum of the reference.

    In every format of gradients and of sums, of sizes round those of a round, with fewer rows than
    ranks, alone and with company, of one and of three micro-batches.
    """
    ended = torchrun(ranks, str(HERE / "exchange.py"), str(tmp_path), NARROWCAST_WAIT_S="60")
    assert ended.code == 0, ended.stderr[-3000:]

    for rank in range(ranks):
        assert json.loads((tmp_path / f"rank-{rank}.json").read_text()) == []
