"""A prediction of what is made again, narrow and checkpointed is the measured ledger."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from narrowcast.plan import PLANS, ActivationRule, Plan
from narrowcast.prediction.predict import predict_memory
from narrowcast.profiling import measure_recipe
from narrowcast.recipes.load import load_recipe
from narrowcast.records.memory import MemoryRecord

CPU = torch.device("cpu")
EVERYWHERE = ActivationRule(modules="*", lever="remake")
BLOCKS = ActivationRule(modules="auto", lever="checkpoint")


def with_levers(name: str, *rules: ActivationRule) -> Plan:
    return replace(PLANS[name], name=f"{name} with {len(rules)}", activations=rules)


def bare(record: MemoryRecord) -> MemoryRecord:
    """Leave out what a prediction says of itself, and the timeline, which has fewer points."""
    return replace(record, predicted=False, assumptions=(), break_even=None, timeline=())


@pytest.mark.parametrize(
    "plan",
    [
        PLANS["bf16-split"],
        PLANS["lean"],
        with_levers("fp32", EVERYWHERE),
        with_levers("bf16", EVERYWHERE),
        with_levers("bf16", EVERYWHERE, BLOCKS),
    ],
    ids=lambda plan: plan.name,
)
@pytest.mark.parametrize(
    ("recipe", "options"),
    [
        ("austen", ["batch_size=4"]),
        ("fashion", ["model=vit", "batch_size=8"]),
        ("fashion", ["model=resnet", "batch_size=8"]),
        ("tabular", ["batch_size=64"]),
    ],
)
def test_the_record_is_equal_to_the_byte(recipe: str, options: list[str], plan: Plan) -> None:
    """Calls are repeated on fake tensors as on real ones, and allocate the same."""
    loaded = load_recipe(recipe, options)

    predicted = predict_memory(loaded, plan, break_even=False)

    assert bare(predicted) == bare(measure_recipe(loaded, plan, CPU, break_even=False))
