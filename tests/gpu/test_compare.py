"""A comparison of real trainings on a CUDA device."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from narrowcast.comparison.compare import compare, plan_comparison
from narrowcast.comparison.study import COMPARISON_FILE
from narrowcast.plan import plan_named
from narrowcast.recipes.load import load_recipe

pytestmark = pytest.mark.gpu


def test_a_comparison_on_cuda_starts_alike_measures_and_is_repeatable(tmp_path: Path) -> None:
    """fp32, tf32, fp16 and bf16 on two seeds: same starts, own dtypes, memory, and equal twice."""
    recipe = load_recipe("fashion", ["width=512", "batch_size=64"])
    plans = [plan_named(name) for name in ("fp32", "tf32", "fp16", "bf16")]
    plan = plan_comparison(
        recipe, plans, seeds=2, steps=40, margin="50%", device=torch.device("cuda")
    )

    record = compare(plan, tmp_path / "one")
    again = compare(plan, tmp_path / "two")

    fp32, *others = record.arms
    for arm in others:
        assert arm.initial_weights_hashes == fp32.initial_weights_hashes
        assert arm.data_order_hashes == fp32.data_order_hashes
        assert arm.same_as_reference == (False, False)
    assert (record.arms[2].precision_honoured, record.arms[3].precision_honoured) == (True, True)
    assert set(record.arms[2].executed_dtypes["matmul"]) == {"fp16"}
    assert set(record.arms[3].executed_dtypes["matmul"]) == {"bf16"}
    assert all(arm.peak_bytes and arm.step_seconds for arm in record.arms)
    assert [a.metrics for a in again.arms] == [a.metrics for a in record.arms]
    assert [v.verdict for v in again.verdicts] == [v.verdict for v in record.verdicts]
    assert not any("Speed on a GPU" in sentence for sentence in record.untested)
    assert (
        json.loads((tmp_path / "one" / COMPARISON_FILE).read_text())["protocol"]["device"] == "cuda"
    )
