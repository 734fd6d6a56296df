"""Executed dtypes and memory are measured on a few steps of the real training."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from narrowcast.plan import plan_named
from narrowcast.profiling import measure_recipe
from narrowcast.recipes.load import load_recipe
from narrowcast.records.run import RunRecord
from narrowcast.training.train import TrainOptions, train

SMALL = Path(__file__).parents[1] / "small_recipe.py"


def run(directory: Path, precision: str, **options: int | bool) -> RunRecord:
    return train(
        load_recipe(SMALL),
        plan_named(precision),
        TrainOptions(**options),  # type: ignore[arg-type]
        directory,
        device=torch.device("cpu"),
    )


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_a_run_of_any_length_is_measured(tmp_path: Path, steps: int) -> None:
    """On its last step where it has no second or third."""
    record = run(tmp_path / "run", "bf16", steps=steps)

    # Two linear layers: one product forward and one backward for the first, whose input needs no
    # gradient, and two backward for the second.
    assert record.executed_dtypes["matmul"] == {"bf16": 5}
    assert record.memory is not None
    assert sum(line.bytes for line in record.memory.lines) == record.peak_bytes


def test_every_micro_batch_of_the_step_is_counted(tmp_path: Path) -> None:
    """Three micro-batches execute three times the products."""
    record = run(tmp_path / "run", "bf16", accumulate=3)

    assert record.executed_dtypes["matmul"] == {"bf16": 15}


def test_the_ledger_knows_batch_and_optimizer(tmp_path: Path) -> None:
    """The batch is under inputs, AdamW's moments under optimizer_state; nothing is left over."""
    record = run(tmp_path / "run", "fp32")

    assert record.memory is not None
    held = {line.category: line.bytes for line in record.memory.lines}
    weights = sum(p.numel() for p in load_recipe(SMALL).build_model().parameters())
    assert held["inputs"] == 8 * 6 * 4 + 8 * 8  # fp32 features and int64 labels
    assert held["optimizer_state"] == 2 * 4 * weights + 6 * 4  # and one step counter a tensor
    assert held["unattributed"] == 0
    assert (record.memory.recipe, record.memory.batch_size) == ("small_recipe", 8)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_real_training_and_the_memory_command_measure_the_same(
    tmp_path: Path, precision: str
) -> None:
    """To the byte, line by line: `narrowcast train` and `narrowcast memory` tell one story."""
    recipe = load_recipe("tabular", ["width=32", "batch_size=64"])
    cpu, policy = torch.device("cpu"), plan_named(precision)

    record = train(recipe, policy, TrainOptions(steps=4), tmp_path / "run", device=cpu)
    measured = measure_recipe(recipe, policy, cpu, break_even=False)

    assert record.memory is not None
    assert record.memory.lines == measured.lines
    assert record.peak_bytes == measured.total_peak_bytes


def test_measuring_can_be_left_out(tmp_path: Path) -> None:
    """Then the record says nothing rather than something unmeasured."""
    record = run(tmp_path / "run", "bf16", measure=False)

    assert record.memory is None
    assert record.peak_bytes is None
    assert record.executed_dtypes == {}
    assert record.precision_honoured is None


def test_a_precision_given_up_after_the_early_steps_is_not_honoured(tmp_path: Path) -> None:
    """A model that switches autocast off from its fourth call on; the note names the last step."""
    file = tmp_path / "tires.py"
    text = SMALL.read_text()
    old = "        return self.layers(x)\n"
    assert old in text
    file.write_text(
        text.replace(
            old,
            "        on = bool(self.seen < 4)\n"
            "        with torch.autocast('cpu', enabled=on, dtype=torch.bfloat16):\n"
            "            return self.layers(x)\n",
        )
    )

    record = train(
        load_recipe(file),
        plan_named("bf16"),
        TrainOptions(steps=6),
        tmp_path / "run",
        device=torch.device("cpu"),
    )

    assert record.executed_dtypes["matmul"] == {"bf16": 5, "fp32": 5}
    assert record.precision_honoured is False
    assert record.precision_notes[0].startswith("on step 6: 5 of 5 matmul calls executed in fp32")
    assert any("was not carried out" in text for text in record.warnings)
