"""The hosts' own DDP with our precision: two gloo processes that stay one training."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from dist.launch import ROOT, torchrun

HERE = Path(__file__).parent
PATHS = os.pathsep.join([str(ROOT / "src"), str(HERE.parent)])


def ranks(host: str, precision: str, folder: Path) -> list[dict[str, Any]]:
    """Train with a host on two ranks; returns what each came to."""
    pytest.importorskip(host)
    words = (str(HERE / "in_ranks.py"), host, precision, str(folder))
    ended = torchrun(2, *words, PYTHONPATH=PATHS)

    assert ended.code == 0, ended.stderr[-3000:]
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp16", "bf16-split"])
@pytest.mark.parametrize("host", ["accelerate", "lightning"])
def test_an_overflow_on_one_rank_is_skipped_on_both(
    host: str, precision: str, tmp_path: Path
) -> None:
    """Weights, ledgers and scales are the same on each; the reason is what all of them can see."""
    first, second = ranks(host, precision, tmp_path)

    assert first == second
    reason = "gradient overflow" if precision == "fp16" else "non-finite gradient"
    assert first["skips"] == [[4, reason]]
    assert first["scale"] == (32768.0 if precision == "fp16" else 1.0)
    assert first["executed"] == [precision.partition("-")[0]]
    assert first["is_finite"]


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp16", "lean"])
def test_a_trainer_on_two_ranks_trains_one_model_and_resumes(
    precision: str, tmp_path: Path
) -> None:
    """The same weights on both, and the uninterrupted training bit for bit from a checkpoint."""
    first, second = ranks("transformers", precision, tmp_path)

    assert first == second
    assert first["resumed"]
    assert first["is_finite"]
