"""What all tests share: a fixed seed for each, and CUDA tests that say why they did not run."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch

if find_spec("hypothesis"):  # which the machine with the GPU lacks
    from hypothesis import HealthCheck, settings

    # How long a machine takes to draw examples, or to run one, never decides a test.
    slow = [HealthCheck.too_slow]
    settings.register_profile("narrowcast", suppress_health_check=slow, deadline=None)
    settings.load_profile("narrowcast")


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
