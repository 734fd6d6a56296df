"""The ledger on CUDA, held against the caching allocator's own counters."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from narrowcast.memory.measure import MemoryLedger
from narrowcast.policy import policy_named
from narrowcast.profiling import measure_recipe
from narrowcast.recipes.load import load_recipe
from narrowcast.records.codec import dumps, loads
from narrowcast.records.memory import MemoryRecord

pytestmark = pytest.mark.gpu

WIDTH, BATCH = 512, 256
MIB = 2**20


class Net(nn.Module):
    def __init__(self, *, recompute: str = "") -> None:
        super().__init__()
        self.recompute = recompute
        self.first = nn.Linear(WIDTH, WIDTH)
        self.body = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        if not self.recompute:
            return self.body(x)  # type: ignore[no-any-return]
        out: Tensor = checkpoint(self.body, x, use_reentrant=self.recompute == "reentrant")
        return out


def measured(model: nn.Module, dtype: torch.dtype | None, *, warm_up: int = 2) -> MemoryRecord:
    """Measure a step that moves its own batch to the device."""
    optimizer = torch.optim.AdamW(model.parameters())
    batch = torch.randn(BATCH, WIDTH)

    def step() -> None:
        x = batch.to("cuda")
        with torch.autocast("cuda", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
            loss = model(x).float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(warm_up):
        step()
    torch.cuda.synchronize()
    ledger = MemoryLedger(model, optimizer)
    with ledger:
        step()
    return ledger.record(precision=str(dtype), batch_size=BATCH)


def lines(record: MemoryRecord) -> dict[str, int]:
    return {line.category: line.bytes for line in record.lines}


@pytest.mark.parametrize("dtype", [None, torch.float16, torch.bfloat16])
def test_lines_sum_to_tensor_bytes_and_the_allocator_holds_a_little_more(
    dtype: torch.dtype | None,
) -> None:
    """Requested, allocated and reserved stand beside the total, each at least as large.

    What is beyond the tensors is bounded by the workspaces of cuBLAS (32 MiB on compute capability
    9.0, CublasHandlePool.cpp), one for each of the two threads that multiply.
    """
    torch.cuda.empty_cache()
    outside = torch.cuda.memory_allocated()

    record = measured(Net().cuda(), dtype)

    assert sum(lines(record).values()) == record.total_peak_bytes
    assert sum(m.bytes for m in record.modules) == record.total_peak_bytes
    assert record.requested_bytes is not None
    assert record.allocated_bytes is not None
    assert record.reserved_bytes is not None
    assert record.total_peak_bytes <= record.requested_bytes
    assert record.requested_bytes <= record.allocated_bytes <= record.reserved_bytes
    assert record.allocated_bytes - outside - record.total_peak_bytes <= 128 * MIB
    assert any("allocator" in note for note in record.notes)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_growth_within_the_step_is_what_the_allocator_was_asked_for(
    dtype: torch.dtype | None,
) -> None:
    """Once workspaces exist, the ledger and the allocator grow alike; neither counts the other."""
    model = Net().cuda()
    measured(model, dtype)
    gc.collect()
    before = torch.cuda.memory_stats()["requested_bytes.all.current"]

    record = measured(model, dtype, warm_up=1)

    # The second optimizer's state is made in the warm-up: it is in both counts at the start.
    assert record.requested_bytes is not None
    grown = record.requested_bytes - before
    # A matrix product may ask cuBLASLt for up to 32 MiB while it runs.
    assert 0 <= grown - (record.total_peak_bytes - _state(model)) <= 64 * MIB


def _state(model: nn.Module) -> int:
    """Bytes of weights, which were there before anything was measured."""
    return sum(p.nbytes for p in model.parameters())


def test_categories_on_cuda() -> None:
    """Weights, moments, the batch that was moved in the step, casts of all weights but the first.

    AdamW's step counters live on the CPU and are not memory of the device.
    """
    model = Net().cuda()

    record = measured(model, torch.bfloat16)

    held = lines(record)
    weights = sum(p.nbytes for p in model.parameters())
    assert held["parameters"] == weights
    assert held["optimizer_state"] == 2 * weights
    assert max(p.categories.get("inputs", 0) for p in record.timeline) == 4 * BATCH * WIDTH
    # Biases are cast as well; none of them is saved, but the autocast cache holds them in forward.
    most = max(p.categories.get("autocast_casts", 0) for p in record.timeline)
    assert weights // 3 < most <= weights // 2
    assert record.timeline[0].phase == "forward"
    assert {p.phase for p in record.timeline} == {"forward", "backward", "optimizer"}


@pytest.mark.parametrize("recompute", ["", "plain", "reentrant"])
def test_backward_on_its_own_thread_is_attributed_to_modules(recompute: str) -> None:
    """On CUDA autograd runs backward on another thread, whose nodes are found all the same."""
    record = measured(Net(recompute=recompute).cuda(), torch.bfloat16)

    at_work = {p.module for p in record.timeline if p.phase == "backward"}
    assert {"first", "body.0", "body.1", "body.2"} <= at_work


def test_the_ledger_asks_for_no_memory_of_its_own() -> None:
    """A watched step and a plain one have the same peak in the allocator."""
    model, x = Net().cuda(), torch.randn(BATCH, WIDTH, device="cuda")

    def step() -> None:
        model(x).square().mean().backward()
        model.zero_grad()

    peaks = []
    for watch in (False, False, True):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        if watch:
            with MemoryLedger(model):
                step()
        else:
            step()
        torch.cuda.synchronize()
        peaks.append(torch.cuda.memory_stats()["requested_bytes.all.peak"])

    assert peaks[1] == peaks[2]


def test_a_recipe_is_measured_and_its_break_even_found_with_real_tensors() -> None:
    """On a GPU the search takes real steps, and the record survives JSON."""
    record = measure_recipe(load_recipe("tabular"), policy_named("bf16"), torch.device("cuda"))

    assert record.device == "cuda"
    assert record.break_even is not None
    assert record.break_even.cast_bytes > 0
    assert record.allocated_bytes is not None
    assert loads(MemoryRecord, dumps(record)) == record
