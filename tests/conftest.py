"""What all tests share: a fixed seed for each, and CUDA tests that say why they did not run."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Each test starts from the same random state, whatever ran before it."""
    torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device (make gpu)")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)
