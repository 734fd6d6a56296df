"""Predicting for a GPU that is not there: what arrives, what is counted, what is reserved."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typer.testing import CliRunner

from narrowcast.cli.app import app
from narrowcast.errors import RecipeError, UnsupportedPrecision
from narrowcast.memory.measure import MemoryLedger
from narrowcast.plan import plan_named
from narrowcast.prediction.gpu_record import _again, _arrival
from narrowcast.prediction.predict import predict_memory, predict_step_memory
from narrowcast.prediction.sight import taken_beside
from narrowcast.prediction.targets import target_named
from narrowcast.prediction.trace import trace_from_start
from narrowcast.profiling import Bench, first_batch
from narrowcast.recipes.load import load_recipe
from narrowcast.records.codec import dumps
from narrowcast.records.memory import MemoryRecord

# Whole trainings or traces: left out of `make check`.
pytestmark = pytest.mark.slow

MIB = 2**20
CPU = torch.device("cpu")


def lines(record: MemoryRecord) -> dict[str, int]:
    return {line.category: line.bytes for line in record.lines}


def test_a_gpu_has_the_three_numbers_of_its_allocator_and_a_margin() -> None:
    """Requested, allocated and reserved, each more than the one before; tensors are the least."""
    record = predict_memory("austen", "bf16", device="h200", batch_size=4)

    assert record.device == "h200"
    assert record.predicted
    assert record.requested_bytes is not None
    assert record.allocated_bytes is not None
    assert record.reserved_bytes is not None
    assert record.total_peak_bytes < record.requested_bytes
    assert record.requested_bytes <= record.allocated_bytes <= record.reserved_bytes
    assert record.reserved_bytes % (2 * MIB) == 0
    assert (record.margin_bytes or 0) > 0.02 * record.reserved_bytes
    assert sum(lines(record).values()) == record.total_peak_bytes
    assert sum(module.bytes for module in record.modules) == record.total_peak_bytes
    assert max(point.bytes for point in record.timeline) == record.total_peak_bytes
    assert json.loads(dumps(record))["margin_bytes"] == record.margin_bytes


def test_workspaces_are_reserved_and_not_among_the_tensors() -> None:
    """Two threads multiply, and on Hopper cuBLAS takes 32 MiB for each, elsewhere 8.125 MiB."""
    hopper, ampere = (
        predict_memory("tabular", "fp32", device=name, batch_size=4) for name in ("h200", "a10")
    )

    assert hopper.total_peak_bytes == ampere.total_peak_bytes < MIB
    assert (hopper.requested_bytes or 0) - (ampere.requested_bytes or 0) == 2 * (
        32 * MIB - 8_519_680
    )
    assert (hopper.reserved_bytes or 0) >= 64 * MIB


def square(model: nn.Module, batch: Tensor) -> Tensor:
    return F.mse_loss(model(batch), batch)


@pytest.mark.parametrize(("fused", "counters"), [(True, 2), (False, 0)])
def test_step_counts_are_on_the_gpu_only_for_fused_optimizers(fused: bool, counters: int) -> None:
    """Plain AdamW keeps them in host memory."""
    record = predict_step_memory(
        lambda: nn.Linear(8, 8),
        lambda m: torch.optim.AdamW(m.parameters(), fused=fused),
        square,
        torch.zeros(3, 8),
        device="t4",
    )

    assert lines(record)["optimizer_state"] == 2 * 4 * (64 + 8) + 4 * counters


def test_plain_adamw_has_temporaries_of_all_parameters_on_a_gpu() -> None:
    """Its foreach implementation is the default there, and not on a CPU."""
    arguments: Any = (
        lambda: nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(8))),
        lambda m: torch.optim.AdamW(m.parameters()),
        square,
        torch.zeros(1, 64),
    )

    on_gpu = predict_step_memory(*arguments, device="a100-40gb")
    on_cpu = predict_step_memory(*arguments)

    weights = 8 * 4 * 64 * 64
    assert on_gpu.peak_phase == on_cpu.peak_phase == "optimizer"
    assert on_gpu.total_peak_bytes - on_cpu.total_peak_bytes > weights // 2


@pytest.mark.parametrize("precision", ["fp32", "bf16-true"])
def test_a_model_arrives_in_fp32_and_is_cast_on_the_gpu(precision: str) -> None:
    """Children first; the events add up to what the model holds, and pass through all of fp32."""
    target = target_named("h200")
    stage = target.stage()
    loaded = load_recipe("austen", ["batch_size=2"])
    data, batch = first_batch(loaded, 2, 0)
    with stage:
        bench = Bench.of(
            loaded,
            plan_named(precision),
            CPU,
            data=data,
            batch=stage.fake(batch),
            stepping=stage.stepping,
        )
        with MemoryLedger(bench.model) as ledger:
            log = list(ledger.events())

    events = list(_arrival(log, bench))

    held, highest = 0, 0
    for _, change in events:
        held += change
        highest = max(highest, held)
    elements = sum(p.numel() for p in bench.model.parameters())
    assert held == sum(change for _, change in log) == elements * (4 if precision == "fp32" else 2)
    assert highest >= 4 * elements
    first = bench.model.tokens.weight
    assert events[0][1] == 4 * first.numel()


def test_the_step_after_a_step_lets_go_of_what_that_one_left() -> None:
    """Worked by hand: a seed that each step makes anew, and a temporary."""
    before = [("weights", 100), ("seed 1", 4)]
    step = [("temporary", 30), ("seed 2", 4), ("seed 1", -4), ("temporary", -30)]

    assert _again(step, known={key for key, _ in before}) == [
        (("next", "temporary"), 30),
        (("next", "seed 2"), 4),
        ("seed 2", -4),
        (("next", "temporary"), -30),
    ]


def test_what_only_the_first_step_left_is_let_go_once() -> None:
    """The step after has nothing of the kind."""
    step = [("workspace of a first step", -50), ("temporary", 30), ("temporary", -30)]

    assert _again(step, known={"workspace of a first step"}) == [
        (("next", "temporary"), 30),
        (("next", "temporary"), -30),
    ]


@pytest.mark.parametrize(("recipe", "precision"), [("austen", "fp32"), ("tabular", "bf16-split")])
def test_the_events_of_a_third_step_are_those_of_the_second(recipe: str, precision: str) -> None:
    """Sizes in their order; that is what may be replayed instead of traced."""
    target = target_named("rtx4090")
    sizes = []
    for steps in (2, 3):
        stage = target.stage()
        loaded = load_recipe(recipe, ["batch_size=2"])
        data, batch = first_batch(loaded, 2, 0)
        with stage:
            bench = Bench.of(
                loaded,
                plan_named(precision),
                CPU,
                data=data,
                batch=stage.fake(batch),
                stepping=stage.stepping,
            )
        trace = trace_from_start(bench, stage, steps=steps)
        sizes.append([change for _, change in trace.ledger.events()[trace.last_step :]])

    # What dies when the trace ends, and not in the step, comes last in both.
    assert sizes[0] == sizes[1]


def test_what_is_left_out_of_a_ledger_has_never_been() -> None:
    """Every moment is lower by what was hidden then, and the record still adds up."""
    model = nn.Linear(8, 8)
    kept = MemoryLedger(model)
    with kept:
        model(torch.ones(2, 8)).sum().backward()
    reference = kept.record()
    model.zero_grad()

    class Kernels:
        def scratch(self, size: int) -> None:
            self.held = torch.empty(size, dtype=torch.uint8)

    kernels = Kernels()
    ledger = MemoryLedger(model)
    with ledger:
        beside = taken_beside(kernels, ledger)
        kernels.scratch(1000)
        model(torch.ones(2, 8)).sum().backward()
        kernels.scratch(5000)

    assert ledger.record().total_peak_bytes > reference.total_peak_bytes
    ledger.leave_out(beside)
    record = ledger.record()
    assert record.total_peak_bytes == reference.total_peak_bytes
    assert record.lines == reference.lines
    assert min(point.bytes for point in record.timeline) == sum(
        p.nbytes for p in model.parameters()
    )


def test_auto_is_what_the_gpu_has_tensor_cores_for() -> None:
    """bf16 from Ampere on, fp16 before; no GPU is asked."""
    assert target_named("h200").plan("auto")[0].name == "bf16"
    chosen, why = target_named("t4").plan("auto")
    assert chosen.name == "fp16"
    assert "7.5" in why


@pytest.mark.parametrize("precision", ["bf16", "tf32", "bf16-split"])
def test_a_precision_that_a_gpu_lacks_is_refused_with_those_that_it_has(precision: str) -> None:
    """A T4 computes in fp32 and fp16."""
    with pytest.raises(UnsupportedPrecision, match="NVIDIA T4") as raised:
        predict_memory("tabular", precision, device="t4")

    assert "fp32, fp16" in raised.value.hint


def test_tf32_takes_what_fp32_takes() -> None:
    """It is a way to multiply, and no way to store."""
    tf32, fp32 = (
        predict_memory("tabular", name, device="a100-80gb", batch_size=4)
        for name in ("tf32", "fp32")
    )

    assert replace(tf32, precision="fp32", notes=fp32.notes) == fp32


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.layer = kind(8, 8, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.layer(x)[0]
        return output


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_a_recurrent_layer_is_refused_for_a_gpu_and_not_for_a_cpu(kind: type[nn.RNNBase]) -> None:
    """What cuDNN keeps of it is not known, and left out it would fit where it does not."""

    def predicted(device: str) -> MemoryRecord:
        return predict_step_memory(
            lambda: Recurrent(kind),
            lambda model: torch.optim.SGD(model.parameters()),
            lambda model, batch: model(batch).sum(),
            torch.zeros(4, 3, 8),
            "fp32",
            device=device,
        )

    with pytest.raises(RecipeError, match=rf"nn\.{kind.__name__}\) is not predicted") as raised:
        predicted("t4")
    assert "narrowcast memory --device cuda" in raised.value.hint
    assert predicted("cpu").total_peak_bytes > 0


def test_a_recurrent_recipe_is_not_planned_for_a_gpu() -> None:
    """`plan` asks the same prediction, and says the same."""
    recipe = Path(__file__).parents[1] / "recipes" / "language_model.py"

    result = CliRunner().invoke(app, ["plan", str(recipe), "--budget", "1GiB", "--device", "t4"])

    assert isinstance(result.exception, RecipeError)
    assert "nn.GRU) is not predicted for NVIDIA T4" in result.exception.message


def test_cudas_cast_lists_hold_without_being_asked_for() -> None:
    """layer_norm and softmax stay in fp32 on a GPU."""
    native = predict_memory("austen", "bf16", batch_size=2)
    cuda = predict_memory("austen", "bf16", device="h200", batch_size=2)

    held = [
        max(point.categories.get("activations", 0) for point in record.timeline)
        for record in (native, cuda)
    ]
    assert held[1] > held[0]


def test_the_comparison_with_fp32_is_of_tensors_on_both_sides() -> None:
    """Workspaces, which precision does not change, would hide what it does."""
    record = predict_memory("tabular", "bf16", device="h200", batch_size=256)

    found = record.break_even
    assert found is not None
    assert found.batch_size is not None
    assert (found.fp32_peak_bytes or 0) < 2 * MIB


@pytest.mark.parametrize(("batch", "verdict"), [(1, "fits"), (2048, "does not fit")])
def test_it_is_said_whether_it_fits(batch: int, verdict: str) -> None:
    """With the margin, into what of the memory can be used."""
    record = predict_memory(
        "austen", "fp16", device="t4", batch_size=batch, options=["size=small"], break_even=False
    )

    assert any(f" it {verdict} into NVIDIA T4" in note for note in record.notes)


def test_convolutions_widen_the_margin() -> None:
    """cuDNN chooses their workspace when it runs."""
    margins = [
        (record.margin_bytes or 0) - 20 * MIB
        for record in (
            predict_memory("fashion", "fp32", device="a10", options=[f"model={model}"])
            for model in ("mlp", "resnet")
        )
    ]

    assert margins[1] > 5 * margins[0]
