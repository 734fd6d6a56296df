"""What precision does to learning: `austen` at the size of GPT-2 124M on the same data order.

Trained by ``narrowcast.training.train`` from the same fp32 weights. Loss curves are kept whole; the
result is the loss on the held-out novel, evaluated in fp32, as the difference from the first arm.
One seed says nothing about a margin: that is what ``narrowcast compare`` and its records are for.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

from gpu_parts.sheet import Ask, Sheet
from narrowcast.plan import plan_named
from narrowcast.recipes.load import load_recipe
from narrowcast.records.run import RunRecord, StepPoint
from narrowcast.training.train import TrainOptions, train

__all__ = ["run"]

STEPS = 300
# What time is left for decides how many of these run; the first one is compared with.
PRECISIONS = ("tf32", "bf16", "lean", "bf16-split", "fp32", "fp16")


def run(ask: Ask) -> None:
    steps = 6 if ask.rehearse else STEPS
    size = ["size=tiny", "batch_size=4"] if ask.rehearse else ["size=gpt2"]
    recipe = load_recipe("austen", [*size, "evaluation_bytes=65536"])
    sheet = Sheet(
        "convergence",
        ask,
        question="the same data in the same order, in each precision",
        recipe="austen",
        options=size,
        steps=steps,
        batch=recipe.batch_size,
    )
    longest = 0.0
    for precision in _possible(rehearse=ask.rehearse):
        if sheet.find(precision=precision) is not None:
            continue
        with sheet.trying(precision=precision) as found:
            if ask.clock.is_over(longest):
                found["not_run"] = "out of time"
                continue
            began = time.monotonic()
            found |= trained(recipe, precision, steps, ask)
            # fp32 without TF32 takes several times as long as the others: it may be cut.
            longest = max(longest, time.monotonic() - began)


def _possible(*, rehearse: bool) -> tuple[str, ...]:
    return ("fp32", "bf16", "lean") if rehearse else PRECISIONS


def trained(recipe: Any, precision: str, steps: int, ask: Ask) -> dict[str, Any]:
    losses: list[float] = []

    def observe(event: object) -> None:
        if isinstance(event, StepPoint):
            losses.append(event.loss)

    options = TrainOptions(
        steps=steps, seed=0, checkpoint_every=steps, measure=False, deterministic=False, watch=0
    )
    memory = Path("/dev/shm")  # a checkpoint of 1.5 GB is no part of the question
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as place:
        record = train(
            recipe, plan_named(precision), options, Path(place) / "run", device=ask.device,
            observe=observe,
        )  # fmt: skip
    return {"losses": losses, **_results(record)}


def _results(record: RunRecord) -> dict[str, Any]:
    evaluated = [e for e in record.evaluations if e.precision == "fp32"]
    return {
        "held_out": evaluated[-1].metrics if evaluated else {},
        "final_loss": record.final_loss,
        "applied_steps": record.applied_steps,
        "skipped_steps": record.skipped_steps,
        "step_s": record.step_seconds,
        "peak_bytes": record.peak_bytes,
        "data_order_hash": record.data_order_hash,
        "initial_weights_hash": record.initial_weights_hash,
        "warnings": list(record.warnings),
    }
