"""Two groups of ranks are started once for all tests here; each test looks at one case."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from dist.launch import HERE, torchrun


@dataclass(frozen=True)
class Seen:
    """What the ranks of one group saw, and where their runs lie."""

    root: Path
    ranks: list[dict[str, Any]]

    def __getitem__(self, case: str) -> dict[str, Any]:
        """Return what rank 0 saw."""
        found: dict[str, Any] = self.ranks[0][case]
        return found


def _seen(ranks: int, root: Path, *others: Path) -> Seen:
    words = (str(HERE / "cases.py"), str(root), *map(str, others))
    ended = torchrun(ranks, *words, NARROWCAST_WAIT_S="60")
    assert ended.code == 0, ended.stderr[-3000:]
    return Seen(
        root, [json.loads((root / f"rank-{rank}.json").read_text()) for rank in range(ranks)]
    )


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def two(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    """What two ranks saw."""
    return _seen(2, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="session")
def four(tmp_path_factory: pytest.TempPathFactory, two: Seen) -> Seen:
    """What four ranks saw, who go on with runs of the two as well."""
    return _seen(4, tmp_path_factory.mktemp("four"), two.root)
