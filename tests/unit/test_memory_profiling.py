"""Measuring a recipe: the steady step, and the surprise of a small batch under autocast."""

from __future__ import annotations

import json
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import narrowcast.memory.break_even
from narrowcast import profiling
from narrowcast.errors import PrecisionError
from narrowcast.policy import policy_named
from narrowcast.profiling import measure_recipe
from narrowcast.recipes.load import Recipe, load_recipe
from narrowcast.records.codec import dumps, loads
from narrowcast.records.memory import MemoryRecord

CPU = torch.device("cpu")

# A square MLP whose optimizer needs no memory of its own beyond its state.
SOURCE = """
from dataclasses import dataclass
import torch
from torch import nn
import torch.nn.functional as F
from torch.utils.data import TensorDataset

@dataclass
class Options:
    batch_size: int = 4
    width: int = 64
    scale: float = 1.0
    reads_values: bool = False

def model(options):
    net = nn.Sequential(*(part for _ in range(4) for part in (
        nn.Linear(options.width, options.width), nn.ReLU())))
    net.options = options
    return net

def data(options):
    x = torch.randn(50, options.width)
    return TensorDataset(x, x), TensorDataset(x, x)

def loss(model, batch):
    x, y = batch
    if model.options.reads_values:
        assert x.sum().item() == x.sum().item()
    return F.mse_loss(model(x) * model.options.scale, y)

def metrics(model, batch):
    return {"error": loss(model, batch)}

def optimizer(model, options):
    return torch.optim.AdamW(model.parameters(), fused=True)
"""


@pytest.fixture
def mlp(tmp_path: Path) -> Path:
    path = tmp_path / "mlp.py"
    path.write_text(SOURCE)
    return path


def measure(path: Path, precision: str, *overrides: str) -> MemoryRecord:
    return measure_recipe(load_recipe(path, overrides), policy_named(precision), CPU)


def lines(record: MemoryRecord) -> dict[str, int]:
    return {line.category: line.bytes for line in record.lines}


def test_the_third_step_is_measured_with_its_optimizer_state(mlp: Path) -> None:
    """State and gradients are there, gradients are cleared before forward; the record is whole."""
    record = measure(mlp, "fp32")

    held = lines(record)
    counters = 4 * 8
    assert held["optimizer_state"] == 2 * held["parameters"] + counters
    assert held["gradients"] == held["parameters"]
    assert held["unattributed"] == 0
    assert "gradients" not in record.timeline[0].categories
    assert (record.recipe, record.precision, record.batch_size) == ("mlp", "fp32", 4)
    assert record.options["width"] == 64
    assert record.break_even is None
    assert loads(MemoryRecord, dumps(record)) == record


def test_an_mlp_at_small_batch_takes_more_memory_under_autocast(mlp: Path) -> None:
    """The surprise that users hit, with the reason, and the batch from which it turns round.

    The break-even is checked here on whole recipes: at it autocast holds no more than fp32, one
    per cent (or one sample) below it still more.
    """
    bf16, fp32 = measure(mlp, "bf16"), measure(mlp, "fp32")
    found = bf16.break_even
    assert found is not None
    assert found.batch_size is not None
    assert found.measured_at is not None

    assert bf16.total_peak_bytes > fp32.total_peak_bytes == found.fp32_peak_bytes
    assert found.cast_bytes == 3 * 2 * 64 * 64  # no copy of the first: its input needs no gradient
    assert "bf16 gradients until their cast to fp32, do not shrink with the batch" in found.why

    def peaks(batch: int) -> list[int]:
        return [measure_batch(mlp, name, batch) for name in ("bf16", "fp32")]

    # The engine keeps the gradient of the loss, four bytes, and makes it only once.
    assert peaks(found.measured_at) == [size - 4 for size in found.measured_bytes or ()]
    autocast, plain = peaks(found.measured_at)
    assert autocast <= plain
    autocast, plain = peaks(int(found.batch_size) - max(1, found.measured_at // 100))
    assert autocast > plain


def measure_batch(path: Path, precision: str, size: int) -> int:
    """Measure the whole step of a recipe with as many samples as the batch needs."""
    source = path.read_text().replace("torch.randn(50,", f"torch.randn({size},")
    larger = path.with_name(f"mlp_{size}.py")
    larger.write_text(source)
    recipe = load_recipe(larger, [f"batch_size={size}"])
    record = measure_recipe(recipe, policy_named(precision), CPU, break_even=False)
    assert record.peak_phase != "optimizer"
    return record.total_peak_bytes


def test_a_recipe_that_reads_values_is_measured_with_real_tensors(mlp: Path) -> None:
    """Fake tensors cannot follow .item(); the answer is the same."""
    fake = measure(mlp, "bf16").break_even
    real = measure(mlp, "bf16", "reads_values=true").break_even
    assert fake is not None
    assert real is not None

    # Reading takes a sum of four bytes, at a moment that is not the peak.
    assert real.batch_size == fake.batch_size
    assert real.measured_bytes == fake.measured_bytes


def test_a_search_with_real_tensors_stops_where_memory_might_not_suffice(
    mlp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It then says up to where it looked, instead of running out of memory."""
    monkeypatch.setattr(profiling, "_MOST_REAL_BYTES", 200_000)

    found = measure(mlp, "bf16", "reads_values=true").break_even

    assert found is not None
    assert found.batch_size is None
    assert "the largest that was tried" in found.why


def test_memtracker_confirms_the_total_on_request(mlp: Path) -> None:
    """The cross-check repeats the step under torch's tracker and says what it counted."""
    recipe = load_recipe(mlp)

    record = measure_recipe(recipe, policy_named("bf16"), CPU, cross_check=True, break_even=False)

    assert record.memtracker_peak_bytes == record.total_peak_bytes
    assert any("MemTracker" in note and "equal" in note for note in record.notes)


def test_what_memtracker_warns_of_as_it_fails_is_not_shown(
    mlp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its hooks warn of their own weak references; the note says that it failed."""
    step = profiling.Bench.step

    def warning(bench: profiling.Bench) -> bool:
        if sys._getframe(1).f_code.co_name == "_cross_checked":
            warnings.warn("global module forward hook raised an exception", stacklevel=1)
        return step(bench)

    monkeypatch.setattr(profiling.Bench, "step", warning)
    record = measure_recipe(
        load_recipe(mlp), policy_named("fp32"), CPU, cross_check=True, break_even=False
    )

    assert record.memtracker_peak_bytes == record.total_peak_bytes


def test_a_step_that_memtracker_cannot_follow_is_a_note_not_a_failure(tmp_path: Path) -> None:
    """It refuses a model that is called twice in a step; the ledger counts it all the same."""
    path = tmp_path / "twice.py"
    path.write_text(SOURCE.replace("F.mse_loss(model(x) *", "F.mse_loss(model(model(x)) *"))

    record = measure_recipe(load_recipe(path), policy_named("fp32"), CPU, cross_check=True)

    assert record.memtracker_peak_bytes is None
    assert any("could not follow" in note for note in record.notes)


def test_steps_that_are_skipped_while_the_loss_scale_comes_down_are_not_measured(
    mlp: Path,
) -> None:
    """A loss of 10^4 overflows at scale 2^16: the measured step is the first steady one after."""
    record = measure(mlp, "fp16", "scale=100.0")

    assert "optimizer" in {p.phase for p in record.timeline}
    assert lines(record)["optimizer_state"] > 0


def test_a_recipe_that_never_takes_a_step_is_an_error(mlp: Path) -> None:
    """Overflow at every scale leaves no steady step to measure."""
    with pytest.raises(PrecisionError):
        measure(mlp, "fp16", "scale=1e38")


def test_measuring_leaves_the_random_state_alone(mlp: Path) -> None:
    """A measurement before a training must not change the training."""
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)

    measure(mlp, "bf16")

    assert torch.equal(torch.rand(4), expected)


def test_the_same_seed_gives_the_same_record(mlp: Path) -> None:
    """Nothing in a record depends on when it was made."""
    first, second = (json.loads(dumps(measure(mlp, "bf16"))) for _ in range(2))

    assert first == second


def test_islands_in_fp32_are_islands_in_the_ledger_too(
    mlp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A layer that the policy keeps in fp32 has no low-precision copy."""
    monkeypatch.setattr(narrowcast.memory.break_even, "_LARGEST", 16)
    recipe: Recipe = load_recipe(mlp)
    policy = replace(policy_named("bf16"), keep_fp32=("2",))

    record = measure_recipe(recipe, policy, CPU)

    assert record.break_even is not None
    assert record.break_even.cast_bytes == 2 * 2 * 64 * 64
