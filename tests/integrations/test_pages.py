"""Each Python block of the page on integrations runs as it is printed."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from recipes import torchvision_on_cpu  # noqa: F401 -- before what imports torchvision

PAGE = (Path(__file__).parents[2] / "docs" / "integrations.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
HOSTS = ("lightning.pytorch", "lightning.fabric", "accelerate", "transformers", "trackers")


def test_each_host_has_its_block() -> None:
    """One for each row of the page's first table, and one for trackers."""
    assert len(BLOCKS) == len(HOSTS)
    assert all(host in block for host, block in zip(HOSTS, BLOCKS, strict=True))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore", "error:policy .*")  # of the hosts' own making
@pytest.mark.parametrize(("host", "block"), list(zip(HOSTS, BLOCKS, strict=True)))
def test_a_block_runs(
    host: str, block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In an empty folder, with nothing before it."""
    pytest.importorskip("tensorboard" if host == "trackers" else host)
    if "accelerate" in sys.modules:
        sys.modules["accelerate"].state.AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.chdir(tmp_path)

    exec(block, {"__name__": "__main__"})
