"""Gradients that step and go during backward: the same training, with fewer gradients alive."""

from __future__ import annotations

import gc
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from narrowcast.engine.engine import Engine
from narrowcast.errors import PrecisionError, UsageError
from narrowcast.memory.measure import MemoryLedger
from narrowcast.optim.adamw import AdamW
from narrowcast.plan import PLANS

KEEP = PLANS["bf16-split"]
RELEASE = replace(KEEP, name="release", gradients="release")


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 128), nn.Linear(128, 8))


def built(plan: Any, net: nn.Module | None = None, **options: Any) -> Engine:
    net = net or model()
    optimizer = AdamW(net.parameters(), lr=1e-2, weights=plan.weights, states=plan.states)
    return Engine(net, optimizer, plan, **options)


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(16, 64, generator=generator), torch.randint(8, (16,), generator=generator)


def step(engine: Engine, number: int, factor: float = 1.0) -> Any:
    inputs, targets = batch(number)
    with engine.forward():
        loss = F.cross_entropy(engine.model(inputs), targets) * factor
    engine.backward(loss)
    return engine.step()


def test_released_gradients_train_the_same_bits() -> None:
    """No parameter's update depends on another's."""
    kept, released = built(KEEP), built(RELEASE)
    for number in range(5):
        step(kept, number)
        report = step(released, number)

        assert report.applied
        assert math.isnan(report.gradient_norm)

    assert all(
        torch.equal(weight, released.weights()[name]) for name, weight in kept.weights().items()
    )


def test_schedulers_follow_released_steps() -> None:
    """One step of the scheduler for each step of the engine."""
    net = model()
    optimizer = AdamW(net.parameters(), lr=1.0, weights="split16", states="int8")
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    engine = Engine(net, optimizer, RELEASE, scheduler=scheduler)
    for number in range(3):
        step(engine, number)

    assert optimizer.param_groups[0]["lr"] == 0.125
    assert engine.applied_steps() == 3


def test_fewer_gradients_are_alive_at_once() -> None:
    """At no moment do all gradients of the kept training exist."""
    peaks = {}
    for plan in (KEEP, RELEASE):
        engine = built(plan)
        step(engine, 0)
        ledger = MemoryLedger(engine.model)
        with ledger:
            step(engine, 1)
        peaks[plan.name] = max(
            point.categories.get("gradients", 0) for point in ledger.record().timeline
        )

    assert peaks["release"] < 0.8 * peaks["bf16-split"]


def test_a_loss_that_is_not_finite_moves_nothing() -> None:
    """Every gradient is broken, no parameter steps, and the step is skipped with its reason."""
    engine = built(RELEASE)
    step(engine, 0)
    before = {name: w.clone() for name, w in engine.weights().items()}

    report = step(engine, 1, factor=math.nan)

    assert not report.applied
    assert report.reason == "non-finite loss"
    assert report.parameters
    assert all(torch.equal(w, before[name]) for name, w in engine.weights().items())
    assert step(engine, 2).applied


class _Break(torch.autograd.Function):
    """Passes forward, and gives NaN back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * math.nan


def test_gradients_that_break_halfway_end_the_training() -> None:
    """Layers nearer the loss have stepped, which cannot be undone: an error; no broken weight."""

    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.low, self.high = nn.Linear(64, 64), nn.Linear(64, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.high(_Break.apply(self.low(x)))  # type: ignore[no-any-return,no-untyped-call]

    torch.manual_seed(0)
    engine = built(RELEASE, Broken())

    with pytest.raises(PrecisionError, match=r"2 of 4 parameters .*low\.") as error:
        step(engine, 0)
    assert "gradients='keep'" in error.value.hint
    assert all(w.isfinite().all() for w in engine.weights().values())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"accumulate": 2}, "cannot be summed"),
        ({"clip_norm": 1.0}, "norm over all gradients"),
        ({"scale": 8.0}, "skipped"),
    ],
)
def test_what_needs_all_gradients_at_once_is_refused(options: dict[str, Any], said: str) -> None:
    """Both choices and the reason are named."""
    with pytest.raises(UsageError, match=said):
        built(RELEASE, **options)


def test_two_backward_passes_in_a_step_are_refused() -> None:
    """The first pass's gradients are used up when the second one's come."""
    engine = built(RELEASE)
    inputs, targets = batch(0)
    for _ in range(2):
        with engine.forward():
            loss = F.cross_entropy(engine.model(inputs), targets)
        if engine._only.source is None:  # type: ignore[union-attr]
            engine.backward(loss)

    with pytest.raises(UsageError, match="second gradient"):
        engine.backward(loss)
    assert step(engine, 1).applied


def test_an_engine_that_is_let_go_stops_releasing() -> None:
    """The optimizer goes on as an ordinary one."""
    engine = built(RELEASE)
    net, optimizer = engine.model, engine._only.optimizer  # type: ignore[union-attr]
    step(engine, 0)
    del engine
    gc.collect()

    F.cross_entropy(net(batch(1)[0]), batch(1)[1]).backward()

    assert all(p.grad is not None for p in net.parameters())
    optimizer.step()
