"""The ledger's total against two independent counts: torch's MemTracker's, the allocator's.

MemTracker sees a sum of two gradients as a third tensor, as any dispatch mode makes it; so does the
ledger, which then takes out what autograd makes in place while nothing watches.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.distributed._tools.mem_tracker import MemTracker
from torch.profiler import ProfilerActivity, profile

from narrowcast.data import BatchStream
from narrowcast.engine.engine import Engine
from narrowcast.memory.measure import MemoryLedger
from narrowcast.policy import Policy, policy_named
from narrowcast.recipes.load import load_recipe

REHEARSED = replace(policy_named("bf16"), name="bf16, CUDA's rules", autocast_rules="cuda")
POLICIES = [policy_named(n) for n in ("fp32", "bf16", "fp16", "bf16-true")] + [REHEARSED]
RECIPES = {
    "fashion mlp": ("fashion", ["batch_size=8"]),
    "fashion vit": ("fashion", ["model=vit", "batch_size=4"]),
    "fashion resnet": ("fashion", ["model=resnet", "batch_size=4", "width=4"]),
    "austen": ("austen", ["batch_size=2", "context=32"]),
    "austen with dropout": ("austen", ["batch_size=2", "context=32", "dropout=0.1"]),
    "tabular": ("tabular", ["batch_size=16", "width=32"]),
}


def steps_of(
    name: str, policy: Policy
) -> tuple[nn.Module, torch.optim.Optimizer, object, Callable]:
    """Build the recipe's training on one batch and take the first applied step."""
    recipe = load_recipe(*RECIPES[name])
    model = recipe.build_model()
    optimizer = recipe.build_optimizer(model)
    engine = Engine(
        model, optimizer, policy, device="cpu", scale=8.0 if policy.scaling != "none" else None
    )
    data, _ = recipe.load_data()
    _, batch = next(BatchStream(data, recipe.batch_size, seed=0, collate=recipe.collate))

    def step() -> None:
        with engine.forward():
            loss = recipe.compute_loss(model, batch)
        engine.backward(loss)
        assert engine.step().applied

    return model, optimizer, batch, step


def memtracker_peak(model: nn.Module, optimizer: torch.optim.Optimizer, batch, step) -> int:
    tracker = MemTracker()
    tracker.track_external(model, optimizer, *batch)
    with tracker:
        step()
    return sum(peak["Total"] for peak in tracker.get_tracker_snapshot("peak").values())


@pytest.mark.parametrize("policy", POLICIES, ids=lambda p: p.name)
@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("warm_up", [0, 2], ids=["first step", "third step"])
def test_the_total_is_memtrackers_to_the_byte(name: str, policy: Policy, warm_up: int) -> None:
    """Each counts its own run of the same step; neither sees the other."""
    totals = []
    for count in ("ledger", "memtracker"):
        torch.manual_seed(0)
        model, optimizer, batch, step = steps_of(name, policy)
        for _ in range(warm_up):
            step()
        if count == "memtracker":
            totals.append(memtracker_peak(model, optimizer, batch, step))
            continue
        ledger = MemoryLedger(model, optimizer)
        with ledger:
            ledger.inputs(batch)
            step()
        record = ledger.record()
        totals.append(ledger.peak_seen_bytes)
        assert record.total_peak_bytes <= ledger.peak_seen_bytes
        assert sum(line.bytes for line in record.lines) == record.total_peak_bytes

    assert totals[0] == totals[1]


def test_micro_batches_are_counted_alike_as_well() -> None:
    """Two backward passes into the same gradients; MemTracker wants its modules reset between."""
    peaks = []
    for tracked in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64))
        optimizer = torch.optim.AdamW(model.parameters(), foreach=True)
        x = torch.randn(4, 64)
        tracker, ledger = MemTracker(), MemoryLedger(model, optimizer)
        tracker.track_external(model, optimizer, x)
        ledger.inputs(x)
        with tracker if tracked else ledger:
            for _ in range(2):
                with torch.autocast("cpu", torch.bfloat16):
                    loss = model(x).square().mean()
                loss.backward()
                tracker.reset_mod_stats()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        snapshot = tracker.get_tracker_snapshot("peak").values()
        peaks.append(sum(p["Total"] for p in snapshot) if tracked else ledger.peak_seen_bytes)

    assert peaks[0] == peaks[1]


def allocated_peak(step: Callable[[], object]) -> int:
    """Sum the CPU allocator's own reports of one step, up to their highest point."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def test_the_ledger_is_what_the_allocator_was_asked_for_and_asks_for_nothing() -> None:
    """An fp32 step of an MLP: growth in the ledger, of the plain step, of the watched step: one.

    Its kernels need no scratch memory of their own, which no ledger above the kernels could see.
    """
    model = nn.Sequential(nn.Linear(96, 96), nn.ReLU(), nn.Linear(96, 96), nn.Tanh())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(16, 96)

    def step() -> None:
        loss = model(x).square().sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    ledgers: list[MemoryLedger] = []

    def watched() -> None:
        ledgers.append(MemoryLedger(model, optimizer))
        ledgers[-1].inputs(x)
        with ledgers[-1]:
            step()

    step()
    plain = allocated_peak(step)
    observed = allocated_peak(watched)
    record = ledgers[-1].record()

    assert plain == observed == record.total_peak_bytes - record.timeline[0].bytes
