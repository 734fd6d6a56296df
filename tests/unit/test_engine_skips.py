"""Steps that are not made: why, what stays where it was, and when it is enough."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from narrowcast.engine.engine import Engine
from narrowcast.errors import PrecisionError, UsageError
from narrowcast.scaling.scales import DynamicScale, StaticScale
from small_training import (
    OVERFLOW,
    STEPS,
    adam,
    holds,
    require_average_in_fp32,
    sgd,
    small_model,
    train_step,
    weights,
)


def test_schedulers_ema_and_counts_follow_applied_steps_only() -> None:
    """A skipped step leaves learning rate, average and applied count where they were."""
    model = small_model()
    optimizer = sgd(model)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    calls: list[int] = []
    engine = Engine(
        model,
        optimizer,
        "fp16",
        scheduler=scheduler,
        ema=lambda _: calls.append(engine.tried_steps()),
    )

    rates = []
    for i, factor in enumerate((1.0, OVERFLOW, 1.0)):
        train_step(engine, i, factor)
        rates.append(optimizer.param_groups[0]["lr"])

    assert rates == [0.05, 0.05, 0.025]
    assert len(calls) == 2
    assert (engine.tried_steps(), engine.applied_steps()) == (3, 2)


@pytest.mark.parametrize("policy", ["fp32", "bf16-true"])
def test_an_averaged_model_averages_the_stepped_weights(policy: str) -> None:
    """The EMA sees the weights after each applied step, bf16 weights included."""
    require_average_in_fp32(policy)
    model = small_model()
    average = torch.optim.swa_utils.AveragedModel(model)
    engine = Engine(model, sgd(model), policy, ema=average)

    seen = []
    for i in range(3):
        train_step(engine, i)
        seen.append(model[0].weight.detach().float().clone())

    expected = torch.stack(seen).mean(0)
    torch.testing.assert_close(average.module[0].weight.float(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("policy", ["fp32", "bf16", "fp16", "bf16-true"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_non_finite_loss_skips_without_moving_the_scale(policy: str, bad: float) -> None:
    """No lower scale cures a loss that is NaN or infinite in the forward pass."""
    model = small_model()
    engine = Engine(model, sgd(model), policy)
    scale = 2.0**16 if policy == "fp16" else 1.0
    before = weights(model)

    report = train_step(engine, 0, bad)

    assert (report.applied, report.reason, report.loss) == (False, "non-finite loss", "loss")
    assert engine.loss_scales() == {"loss": scale}
    assert holds(model, before)
    assert all(p.grad is None for p in model.parameters())


class _InfiniteGradient(torch.autograd.Function):
    """Identity whose gradient is infinite in one element."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        bad = gradient.clone()
        bad.view(-1)[0] = math.inf
        return bad


@pytest.mark.parametrize(
    ("policy", "reason"),
    [
        ("fp32", "non-finite gradient"),
        ("bf16", "non-finite gradient"),
        ("bf16-true", "non-finite gradient"),
        ("fp16", "gradient overflow"),
    ],
)
def test_a_non_finite_gradient_never_reaches_the_weights(policy: str, reason: str) -> None:
    """The guard holds in every precision and names the parameters, nearest the loss first."""
    model = small_model()
    engine = Engine(model, adam(model), policy)
    before = weights(model)
    model[0].register_forward_hook(lambda _m, _i, output: _InfiniteGradient.apply(output))

    report = train_step(engine, 0)

    assert (report.applied, report.reason) == (False, reason)
    assert set(report.parameters) <= {"0.weight", "0.bias"}
    assert report.parameters
    assert holds(model, before)
    assert not engine._lanes["optimizer"].optimizer.state
    assert [s.reason for s in engine.skips] == [reason]
    assert engine.skips[0].parameters == report.parameters


def test_a_value_too_large_only_after_unscaling_is_caught() -> None:
    """A scale below 1 enlarges gradients when they are unscaled: 6e37 becomes 1e39, infinity."""
    model = nn.Linear(1, 1, bias=False)
    engine = Engine(model, sgd(model), "fp32", scale=StaticScale(scale=2.0**-4))

    with engine.forward():
        loss = (model(torch.ones(1, 1)) * 1e20 * 1e19).sum()
    engine.backward(loss)
    report = engine.step()

    assert not report.applied
    assert torch.isfinite(model.weight).all()


def test_hopeless_skips_end_in_an_error_that_says_what_to_do() -> None:
    """Eight NaN losses in a row stop the training, with step, scale and the batch in the message.

    No parameter is named: such a loss breaks the gradients of all.
    """
    model = small_model()
    engine = Engine(model, sgd(model), "fp16")

    for i in range(7):
        train_step(engine, i, math.nan)

    with pytest.raises(PrecisionError, match="non-finite loss") as caught:
        train_step(engine, 7, math.nan)

    assert len(engine.skips) == 8
    message = str(caught.value)
    assert "step 8" in message
    assert "65536" in message
    assert "2.weight" not in message
    assert "in the batch" in caught.value.hint


def test_the_number_of_skips_in_a_row_is_an_option() -> None:
    """With 2, the second skip in a row raises; one applied step in between starts anew."""
    model = small_model()
    engine = Engine(model, sgd(model), "fp32", max_consecutive_skips=2)

    for i, factor in enumerate((math.nan, 1.0, math.nan)):
        train_step(engine, i, factor)

    with pytest.raises(PrecisionError, match="2 optimizer steps"):
        train_step(engine, 3, math.nan)


def test_finding_the_scale_from_above_is_not_hopeless() -> None:
    """A scale that has to come down from 2^40 skips two dozen times and then trains."""
    model = small_model()
    engine = Engine(model, sgd(model), "fp16", scale=DynamicScale(scale=2.0**40))

    reports = [train_step(engine, i % STEPS) for i in range(60)]

    assert not reports[20].applied
    assert reports[-1].applied


def test_misuse_of_skips_is_refused() -> None:
    """A limit that is no count is an error at once."""
    model = small_model()

    with pytest.raises(UsageError, match="max_consecutive_skips=0"):
        Engine(model, sgd(model), "fp32", max_consecutive_skips=0)
