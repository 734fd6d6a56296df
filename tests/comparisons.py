"""Small protocols and arms for tests: only what a fact is about is written out in the test."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from narrowcast.records.comparison import ArmRecord, Protocol


def protocol(n: int, *candidates: str, **changes: Any) -> Protocol:
    """A protocol over n seeds with a margin of 1 on a loss (lower is better)."""
    base = Protocol(
        recipe="fake",
        options={},
        metric="loss",
        direction="lower",
        margin=1.0,
        margin_text="1.0",
        steps=10,
        seeds=tuple(range(n)),
        reference="fp32",
        arms=("fp32", *(candidates or ("bf16",))),
        evaluation_precision="fp32",
        confidence=0.95,
        device="cpu",
    )
    return replace(base, **changes)


def arm(precision: str, values: Sequence[float | None], **changes: Any) -> ArmRecord:
    """An arm with one value of `loss` a seed; None marks a diverged run."""
    base = ArmRecord(
        precision=precision,
        seeds=tuple(range(len(values))),
        metrics={"loss": tuple(values)},
        training_precision_metrics={"loss": tuple(values)},
        final_losses=tuple(values),
        diverged=tuple(seed for seed, value in enumerate(values) if value is None),
        peak_bytes=1,
        step_seconds=1.0,
        skipped_steps=0,
        total_steps=10 * len(values),
        executed_dtypes={},
        precision_honoured=True,
    )
    return replace(base, **changes)
