"""A replayed step is the step that was taken, in its precision or in fp32, and moves nothing."""

from __future__ import annotations

import math
from dataclasses import replace
from time import process_time
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from narrowcast.diagnosis.evidence import gradient_errors
from narrowcast.engine.engine import Engine
from narrowcast.errors import UsageError
from narrowcast.plan import plan_named
from narrowcast.ranges.histogram import measure
from narrowcast.replay.moment import Moment
from narrowcast.replay.recorder import OpRecorder
from narrowcast.replay.step import replay_step
from replayed import Net, batch, compute_loss, engine_of

PRECISIONS = ["fp32", "fp16", "bf16", "bf16-true", "bf16-split", "lean"]


FAR = 2.0**-4
"""About what a thousand independent roundings to bf16 come to: sqrt(1000) * 2^-9 = 0.062."""


def step(engine: Engine, number: int) -> tuple[Moment, float, dict[str, Tensor]]:
    """Take a step; returns its moment, loss and unscaled gradients."""
    moment = Moment.of(engine, batch(number), number)
    with engine.forward():
        loss = compute_loss(engine.model, moment.batch)
    engine.backward(loss)
    (scale,) = engine.loss_scales().values()
    gradients = {
        name: parameter.grad.clone() if scale == 1 else parameter.grad / scale
        for name, parameter in engine.model.named_parameters()
        if parameter.grad is not None
    }
    return moment, loss.item(), gradients


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("ranges", ["all", "none", None])
def test_a_replay_is_the_step_bit_for_bit(precision: str, ranges: Any) -> None:
    """The same loss and the same gradients, however closely it is looked at."""
    engine = engine_of(precision)
    engine.model.train()
    moment, loss, gradients = step(engine, 1)
    engine.zero_grad()

    trace = replay_step(engine, compute_loss, moment, ranges=ranges)

    assert trace.loss == loss
    assert trace.gradients == {name: measure(g) for name, g in gradients.items()}
    assert trace.is_finite
    assert trace.precision == precision
    assert trace.scale == (65536.0 if precision == "fp16" else 1.0)
    assert bool(trace.events) == (ranges is not None)
    if ranges is not None:
        results = [name for op in trace.events for name in op.results]
        assert sorted(results) == sorted(["loss", *gradients])


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_reference_is_fp32_from_the_masters(precision: str) -> None:
    """What the same model computes in fp32 in training mode, dropout and batch statistics alike."""
    engine = engine_of(precision)
    engine.model.train()
    step(engine, 1)
    engine.step()
    moment = Moment.of(engine, batch(2), 2)
    plain = Net()
    plain.load_state_dict(engine.weights())
    plain.train()

    trace = replay_step(engine, compute_loss, moment, policy_reference=True)
    with moment.at(engine.model):
        loss = compute_loss(plain, moment.batch)
        loss.backward()

    assert trace.loss == pytest.approx(loss.item(), rel=1e-6)
    assert (trace.precision, trace.scale) == ("fp32", 1.0)
    assert {op.dtype for op in trace.events} == {"fp32"}
    for name, parameter in plain.named_parameters():
        assert parameter.grad is not None
        # One rounding of fp32 an addend, and some 1e3 of them in a row.
        assert trace.gradients[name].rms == pytest.approx(measure(parameter.grad).rms, rel=1e-4)


def test_what_a_reference_writes_into_16_bit_buffers_is_dropped() -> None:
    """A bf16 buffer that training writes is widened for the time being, and no error."""
    torch.manual_seed(0)
    engine = engine_of("bf16-true", Net(counts=True))
    engine.model.train()

    trace = replay_step(engine, compute_loss, Moment.of(engine, batch(), 1), policy_reference=True)

    assert trace.is_finite
    assert engine.model.seen.dtype is torch.bfloat16
    assert not engine.model.seen.any()


def test_another_scale_changes_nothing_but_what_underflows() -> None:
    """Gradients come out unscaled; where backward is fp32 they are the same at powers of two."""
    engine = engine_of("fp32")
    moment = Moment.of(engine, batch(), 1)

    plain = replay_step(engine, compute_loss, moment)
    scaled = replay_step(engine, compute_loss, moment, scale=1024.0)

    assert scaled.scale == 1024.0
    assert scaled.gradients == plain.gradients


def test_the_scale_in_force_at_the_moment_is_used_though_it_has_moved() -> None:
    """A step that overflowed halves the scale; its replay overflows again."""
    model = nn.Sequential(nn.Linear(16, 40))
    engine = engine_of("fp16", model, scale=None)

    def steep(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return compute_loss(model, batch) * 100

    moment = Moment.of(engine, batch(), 1)
    with engine.forward():
        loss = steep(model, moment.batch)
    engine.backward(loss)
    report = engine.step()
    trace = replay_step(engine, steep, moment)

    assert not report.applied
    assert engine.loss_scales() == {"loss": 32768.0}
    assert trace.scale == 65536.0
    assert not trace.is_finite
    assert math.isfinite(trace.loss)


def test_micro_batches_count_as_in_the_engine() -> None:
    """Backward starts from scale / accumulate, and the gradients are those of the micro-batch."""
    engine = engine_of("bf16", accumulate=4)
    moment = Moment.of(engine, batch(), 1)
    whole = replay_step(engine_of("bf16"), compute_loss, moment)

    part = replay_step(engine, compute_loss, moment)

    assert part.gradients == whole.gradients  # a quarter of it times four: exact


def test_gradients_released_during_backward_are_kept_here() -> None:
    """The optimizer does not step, and each gradient is looked at."""
    plan = replace(plan_named("bf16-split"), name="released", gradients="release")
    engine = engine_of(plan)
    before = {name: p.detach().clone() for name, p in engine.model.named_parameters()}

    trace = replay_step(engine, compute_loss, Moment.of(engine, batch(), 1))

    assert set(trace.gradients) == set(before)
    assert all(torch.equal(p, before[name]) for name, p in engine.model.named_parameters())
    with engine.forward():
        loss = compute_loss(engine.model, batch())
    engine.backward(loss)
    assert engine.step().applied


def test_gradients_behind_a_layer_that_errs_are_off() -> None:
    """Where digits are lost on the way, the weights before are hit less than those behind."""

    class Cancels(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)
            self.head = nn.Linear(16, 40)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            x = (x + 100) - 100  # loses seven bits
            return self.head(self.second(x))

    torch.manual_seed(0)
    engine = engine_of("bf16", Cancels())
    moment = Moment.of(engine, batch(), 1)
    low = replay_step(engine, compute_loss, moment, samples=64)
    high = replay_step(engine, compute_loss, moment, samples=64, policy_reference=True)

    errors = gradient_errors(low, high)
    assert errors["first.weight"] < errors["second.weight"]


def test_healthy_precisions_stay_near_and_fp32_is_equal() -> None:
    """What bf16 does to gradients are roundings; fp32 against itself is nothing."""
    for precision, most in (("fp32", 0.0), ("bf16", FAR)):
        engine = engine_of(precision)
        moment = Moment.of(engine, batch(), 1)
        low = replay_step(engine, compute_loss, moment, samples=32)
        high = replay_step(engine, compute_loss, moment, samples=32, policy_reference=True)

        assert max(gradient_errors(low, high).values()) <= most


def test_gradients_are_compared_unscaled() -> None:
    """A scale of 65,536 is no difference."""
    engine = engine_of("fp16")
    moment = Moment.of(engine, batch(), 1)
    low = replay_step(engine, compute_loss, moment, samples=32)
    high = replay_step(engine, compute_loss, moment, samples=32, policy_reference=True)

    assert max(gradient_errors(low, high).values()) < FAR


def test_a_replay_says_what_it_cannot_do() -> None:
    """Inside autocast, of something that is no loss, without a scale."""
    engine = engine_of("bf16")
    moment = Moment.of(engine, batch(), 1)

    with engine.forward(), pytest.raises(UsageError, match="inside autocast"):
        replay_step(engine, compute_loss, moment)
    with pytest.raises(UsageError, match="does not depend on anything"):
        replay_step(engine, lambda model, batch: torch.ones(()), moment)
    with pytest.raises(UsageError, match="not one real number"):
        replay_step(engine, lambda model, batch: model(batch[0]), moment)
    bare = Moment(step=1, batch=batch(), random=moment.random)
    with pytest.raises(UsageError, match="loss scale is not known"):
        replay_step(engine, compute_loss, bare)
    two = Moment(step=1, batch=batch(), random=moment.random, scales={"a": 1.0, "b": 2.0})
    with pytest.raises(UsageError, match="2 losses: a, b"):
        replay_step(engine, compute_loss, two)
    assert replay_step(engine, compute_loss, two, scale=1.0).is_finite


def test_a_failed_loss_leaves_no_hook_and_no_trace_of_the_forward_pass() -> None:
    """The engine goes on after a replay that raised."""
    engine = engine_of("bf16")
    engine.model.train()
    moment = Moment.of(engine, batch(), 1)
    mean = engine.model.blocks[0].norm.running_mean.clone()  # type: ignore[union-attr]

    def fails(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        model(batch[0])
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        replay_step(engine, fails, moment)

    assert torch.equal(engine.model.blocks[0].norm.running_mean, mean)  # type: ignore[union-attr]
    assert not torch.nn.modules.module._global_forward_pre_hooks
    assert not torch.is_autocast_enabled("cpu")
    step(engine, 1)
    assert engine.step().applied


def test_islands_are_kept_in_a_replay() -> None:
    """A policy's fp32 modules execute in fp32; all others do not."""
    plan = plan_named("bf16")
    engine = engine_of(plan.with_policy(plan.policy.keeping_fp32("blocks.1")))
    trace = replay_step(engine, compute_loss, Moment.of(engine, batch(), 1))

    products = {
        (op.module, op.dtype) for op in trace.events if op.op.startswith(("aten.addmm", "aten.mm"))
    }
    assert {d for m, d in products if m.startswith("blocks.1")} == {"fp32"}
    assert {d for m, d in products if m.startswith("blocks.0")} == {"bf16"}


@pytest.mark.slow
def test_a_plain_recording_costs_less_than_ten_steps() -> None:
    """The bound is the issue's; benchmarks/replay_cost.py has the figures."""
    torch.manual_seed(0)
    engine = engine_of("bf16", Net(width=128))
    part = batch(rows=256, width=128)
    moment = Moment.of(engine, part, 1)

    def seconds(ranges: Any, *, errors: bool = False) -> float:
        best = math.inf
        for _ in range(5):
            began = process_time()
            replay_step(engine, compute_loss, moment, ranges=ranges, errors=errors)
            best = min(best, process_time() - began)
        return best

    assert seconds("none") < 10 * seconds(None)


def test_the_recorder_works_without_an_engine() -> None:
    """Round any loss of any model."""
    model, x, y = nn.Linear(4, 2), torch.ones(3, 4), torch.zeros(3, 2)
    with OpRecorder(model) as ops:
        F.mse_loss(model(x), y).backward()

    assert [op.op for op in ops.events][:2] == ["aten.addmm.default", "aten.mse_loss.default"]
