"""Executed dtypes and memory are measured on a few steps of the real training."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from narrowcast.plan import plan_named
from narrowcast.prediction.predict import predict_memory
from narrowcast.profiling import measure_recipe
from narrowcast.recipes.load import Recipe, load_recipe
from narrowcast.records.memory import MemoryRecord
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


VIEWS = """
import torch
import torch.nn.functional as F
from dataclasses import dataclass
from torch import nn


@dataclass
class Options:
    batch_size: int = {batch_size}
    steps: int = 4


class Samples:
    def __init__(self, n):
        self.x, self.y = torch.randn(n, 16), torch.randint(0, 3, (n,))
        self.whiten = nn.BatchNorm1d(16, affine=False).eval()

    def __len__(self):
        return len(self.y) // {chunk}

    def __getitem__(self, i):
        part = slice(i * {chunk}, (i + 1) * {chunk})
        {seen}
        return self.x[part], self.y[part]


def data(options):
    return Samples(4000), Samples(40)


def model(options):
    return nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3))


def loss(model, batch):
    x, y = batch
    return F.cross_entropy(model(x.flatten(0, -2)), y.flatten())


def metrics(model, batch):
    x, y = batch
    return {{"accuracy": (model(x.flatten(0, -2)).argmax(-1) == y.flatten()).float().mean()}}
"""


def views(directory: Path, *, chunk: int = 1, batch_size: int = 8, more: str = "") -> Recipe:
    """Write a recipe whose samples are views into one large tensor, and load it."""
    file = directory / "views.py"
    seen = "self.whiten(self.x[part])" if chunk == 1 and not more else "pass"
    file.write_text(VIEWS.format(batch_size=batch_size, chunk=chunk, seen=seen) + more)
    return load_recipe(file)


def ways_to_measure(recipe: Recipe, directory: Path, accumulate: int = 1) -> list[MemoryRecord]:
    """Return what training, `narrowcast memory` and `narrowcast predict` say of a recipe."""
    cpu, plan = torch.device("cpu"), plan_named("bf16")
    options = TrainOptions(accumulate=accumulate, watch=0)  # a watch holds all of a step's parts
    trained = train(recipe, plan, options, directory / "run", device=cpu).memory
    assert trained is not None
    return [
        trained,
        measure_recipe(recipe, plan, cpu, break_even=False),
        predict_memory(recipe, plan, break_even=False),
    ]


def test_a_data_set_that_gives_views_is_no_part_of_a_step(tmp_path: Path) -> None:
    """Nor is a module of its own: training, `memory` and `predict` tell of the batch alone."""
    records = ways_to_measure(views(tmp_path), tmp_path)

    assert [r.total_peak_bytes for r in records] == [records[1].total_peak_bytes] * 3
    for record in records:
        held = {line.category: line.bytes for line in record.lines}
        assert held["inputs"] == 8 * 16 * 4 + 8 * 8
        assert held["unattributed"] == held["buffers"] == 0
        assert not any("only read" in note for note in record.notes)


def test_no_micro_batch_brings_the_data_set_in(tmp_path: Path) -> None:
    """Each is drawn by itself, and counts when the one before has gone."""
    recipe = views(tmp_path)

    alone = ways_to_measure(recipe, tmp_path)[0]
    (tmp_path / "four").mkdir()
    trained = ways_to_measure(recipe, tmp_path / "four", accumulate=4)[0]

    held = {line.category: line.bytes for line in trained.lines}
    assert held["inputs"] == 8 * 16 * 4 + 8 * 8
    assert held["unattributed"] == 0
    weights = 16 * 8 + 8 + 8 * 3 + 3
    assert alone.total_peak_bytes <= trained.total_peak_bytes
    assert trained.total_peak_bytes <= alone.total_peak_bytes + 2 * 4 * weights


@pytest.mark.parametrize("accumulate", [1, 3])
def test_of_a_batch_that_is_a_view_its_own_part_counts(tmp_path: Path, accumulate: int) -> None:
    """Chunks of 20 samples are served as they lie in the data set, which is held anyway."""
    more = "\n\ndef collate(samples):\n    return samples[0]\n"
    recipe = views(tmp_path, chunk=20, batch_size=1, more=more)

    records = ways_to_measure(recipe, tmp_path, accumulate)

    if accumulate == 1:
        assert [r.total_peak_bytes for r in records] == [records[1].total_peak_bytes] * 3
    for record in records:
        held = {line.category: line.bytes for line in record.lines}
        assert held["inputs"] == 20 * 16 * 4 + 20 * 8
        assert held["unattributed"] == 0


def test_fewer_samples_than_asked_are_told(tmp_path: Path) -> None:
    """A data set smaller than one batch is served whole, and the run's warnings say so."""
    recipe, plan, options = (
        load_recipe(SMALL, ["batch_size=30"]),
        plan_named("fp32"),
        TrainOptions(steps=1),
    )

    record = train(recipe, plan, options, tmp_path / "run", device=torch.device("cpu"))

    assert record.batch_size == 44 - 30
    told = "a batch holds 14 samples, which is all that data() gives, though 30 were asked for"
    assert told in record.warnings
    assert not any("asked for" in text for text in run(tmp_path / "all", "fp32").warnings)


def test_weights_kept_as_the_precision_says_are_no_warning(tmp_path: Path) -> None:
    """Weights that model() itself makes in another format are one."""
    file = tmp_path / "halves.py"
    file.write_text(SMALL.read_text().replace("return Net(options.width)", "return Net(8).half()"))
    plan, cpu = plan_named("bf16-true"), torch.device("cpu")

    asked = run(tmp_path / "asked", "bf16-true", steps=1)
    record = train(load_recipe(file), plan, TrainOptions(steps=1), tmp_path / "run", device=cpu)

    assert asked.warnings == ()
    assert any(text.startswith("fp16 weights became bf16") for text in record.warnings)


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
