"""Where non-finite values began that reached the loss or a gradient, and what is not to blame."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from narrowcast.replay.culprit import BadOp, bad_ops, first_bad
from narrowcast.replay.moment import Moment
from narrowcast.replay.recorder import OpRecorder, Ranges
from narrowcast.replay.step import SEED, StepTrace, replay_step
from replayed import Net, at, attention, batch, compute_loss, engine_of

Loss = Callable[[nn.Module, Tensor], Tensor]


def judged(
    loss_of: Loss, x: Tensor | None = None, *, mark: bool = True, ranges: Ranges = "all"
) -> tuple[BadOp, ...]:
    """Record a loss over a linear layer, and its backward pass."""
    model = nn.Linear(4, 4)
    with torch.no_grad():
        model.weight.copy_(torch.eye(4))
        model.bias.zero_()
    inputs = torch.arange(-4.0, 8.0).reshape(3, 4) if x is None else x
    with OpRecorder(model, batch=inputs, ranges=ranges) as ops:
        loss = loss_of(model, inputs)
        loss.backward()
        if mark:
            ops.mark(loss, "loss")
            for name, parameter in model.named_parameters():
                assert parameter.grad is not None
                ops.mark(parameter.grad, name)
    return bad_ops(ops.events)


def all_masked(model: nn.Module, x: Tensor) -> Tensor:
    scores = model(x).masked_fill(torch.ones(3, 4, dtype=torch.bool), -math.inf)
    return scores.softmax(-1).square().mean()  # a row of -inf alone


def too_large(model: nn.Module, x: Tensor) -> Tensor:
    y = model(x) * 1e5
    return y.half().float().mean()  # overflow


def zero_by_zero(model: nn.Module, x: Tensor) -> Tensor:
    y = model(x).relu()
    return (y / y).sum()  # 0 / 0


def log_of_masked(model: nn.Module, x: Tensor) -> Tensor:
    y = model(x).relu()
    return torch.where(y > 0, y.log(), 0).mean()


def log_times_mask(model: nn.Module, x: Tensor) -> Tensor:
    y = model(x).relu()
    logarithm = y.log()  # -inf
    return (logarithm * (y > 0)).mean()


def discarded(model: nn.Module, x: Tensor) -> Tensor:
    y = model(x)
    (y * 1e30).exp()
    return y.mean()


def square_root_at_zero(model: nn.Module, x: Tensor) -> Tensor:
    y = model(x).square()
    return y.sqrt().sum()  # derivative


def infinite_loss(model: nn.Module, x: Tensor) -> Tensor:
    mean = model(x).mean()
    return mean + math.inf  # meant


def nearly_full_mask(model: nn.Module, x: Tensor) -> Tensor:
    scores = model(x) + torch.full((3, 4), -math.inf).triu(1)
    return scores.softmax(-1).amax() + torch.logsumexp(scores, -1).mean()


@pytest.mark.parametrize(
    "healthy", [attention, log_of_masked, discarded, nearly_full_mask], ids=lambda f: f.__name__
)
@pytest.mark.parametrize("ranges", ["all", "suspects"])
def test_infinities_that_do_not_arrive_are_innocent(healthy: Loss, ranges: Ranges) -> None:
    """Masks of -inf, logarithms behind where, a branch that nobody reads."""
    assert judged(healthy, ranges=ranges) == ()


@pytest.mark.parametrize(
    ("loss_of", "op", "origin", "code"),
    [
        (too_large, "_to_copy", "operation", "return y.half().float().mean()  # overflow"),
        (zero_by_zero, "div", "operation", "return (y / y).sum()  # 0 / 0"),
        (log_times_mask, "log", "operation", "logarithm = y.log()  # -inf"),
        (infinite_loss, "add", "infinite constant", "return mean + math.inf  # meant"),
        (
            all_masked,
            "_softmax",
            "infinite constant",
            "return scores.softmax(-1).square().mean()  # a row of -inf alone",
        ),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
@pytest.mark.parametrize("ranges", ["all", "suspects"])
def test_the_first_operation_is_named(
    loss_of: Loss, op: str, origin: str, code: str, ranges: Ranges
) -> None:
    """Forward: with its line, what it fed on and that the loss was reached."""
    found = judged(loss_of, ranges=ranges)

    bad = found[0]
    assert (bad.op.op.split(".")[1], bad.origin) == (op, origin)
    assert bad.op.code == code
    assert bad.op.phase == "forward"
    assert bad.reaches[0] == "loss"
    assert bad.evidence[-1] == bad.op
    assert len(bad.evidence) > 1


def test_a_failure_of_backward_alone_is_found_there() -> None:
    """The loss is finite; the gradient is not, from the derivative of sqrt at 0 on."""
    (bad,) = judged(square_root_at_zero)

    assert at(bad.op) == ("backward", "", "return y.sqrt().sum()  # derivative")
    assert bad.op.op == "aten.div.Tensor"
    assert bad.reaches == ("weight", "bias")


def test_without_marks_what_nobody_reads_counts_as_a_result() -> None:
    """So a recorder round half a step says something; a discarded branch is then a result too."""
    assert judged(too_large, mark=False)[0].op.op == "aten._to_copy.default"
    assert judged(attention, mark=False) == ()
    assert judged(discarded, mark=False)[0].op.op == "aten.exp.default"


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_bad_data_are_called_so(value: float) -> None:
    """No operation is to blame for what the batch holds."""
    x = torch.ones(3, 4)
    x[1, 1] = value

    bad = judged(lambda model, x: model(x).square().mean(), x)[0]

    assert (bad.origin, bad.source) == ("outside", "batch")
    assert bad.op.phase == "forward"


def test_a_weight_that_was_broken_before_is_called_so() -> None:
    """The step began with it."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    with torch.no_grad():
        model[1].weight[0, 0] = math.nan
    with OpRecorder(model) as ops:
        model(torch.ones(2, 4)).sum().backward()

    bad = first_bad(ops.events, "forward")
    assert bad is not None
    assert (bad.origin, bad.source, bad.op.module) == ("outside", "1.weight", "1")


def test_a_mask_in_a_buffer_is_meant() -> None:
    """A buffer of -inf and zeros is a mask like another."""

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.register_buffer("mask", torch.full((4, 4), -math.inf).triu(1))

        def forward(self, x: Tensor) -> Tensor:
            return (self.linear(x) + self.mask).softmax(-1)

    model = Masked()
    with OpRecorder(model) as ops:
        loss = model(torch.randn(4, 4)).square().sum()
        loss.backward()
        ops.mark(loss, "loss")
    assert bad_ops(ops.events) == ()

    model.mask.fill_(-math.inf)
    with OpRecorder(model) as ops:
        loss = model(torch.randn(4, 4)).square().sum()
        ops.mark(loss, "loss")
    (bad,) = bad_ops(ops.events)
    assert (bad.op.op, bad.origin, bad.source) == ("aten._softmax.default", "outside", "mask")


def replayed(model: nn.Module, precision: str, **options: Any) -> StepTrace:
    engine = engine_of(precision, model)
    engine.model.train()
    return replay_step(engine, compute_loss, Moment.of(engine, batch(), 1), **options)


def overflowing(factor: float) -> Net:
    """Return a model of which one layer, deep inside, gives more than 65,504."""
    torch.manual_seed(0)
    model = Net()
    with torch.no_grad():
        model.blocks[1].down.weight.mul_(factor)
    return model


@pytest.mark.parametrize("precision", ["fp16", "bf16", "fp32", "bf16-true", "bf16-split", "lean"])
def test_an_overflow_deep_in_a_block_is_named_exactly(precision: str) -> None:
    """In fp16; every other precision has the range, and nothing to accuse."""
    trace = replayed(overflowing(3e5), precision)

    found = [bad for bad in bad_ops(trace.events) if "loss" in bad.reaches]
    if precision != "fp16":
        assert found == []
        assert math.isfinite(trace.loss)
        return
    assert not trace.is_finite
    bad = first_bad(trace.events, "forward")
    assert bad == found[0]
    assert bad.origin == "operation"
    assert bad.op.op == "aten.addmm.default"
    assert bad.op.dtype == "fp16"
    assert bad.op.module == "blocks.1.down"
    assert bad.op.code.startswith("return x + self.drop(self.down(")
    assert all(values.is_finite for values in bad.op.inputs)
    assert {op.module for op in bad.evidence} >= {"blocks.1", "blocks.1.down"}


class Sensitive(nn.Module):
    """Its gradient is some 1e4 times larger than its output."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 16)
        self.head = nn.Linear(16, 40)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).square() + 1e-6
        return self.head(x.sqrt())  # steep


def test_an_overflow_of_backward_depends_on_the_scale() -> None:
    """At a scale that fp16 gradients hold it is gone; the forward pass is never to blame."""
    torch.manual_seed(0)
    model = Sensitive()

    high = replayed(model, "fp16", scale=2.0**24)
    low = replayed(model, "fp16", scale=1.0)

    assert math.isfinite(high.loss)
    assert low.is_finite
    assert first_bad(high.events, "forward") is None
    bad = first_bad(high.events, "backward")
    assert bad is not None
    assert bad.origin == "operation"
    assert bad.op.module in ("head", "")
    assert "loss" not in bad.reaches


def test_a_scale_that_the_losses_format_does_not_hold_is_told_apart() -> None:
    """65,536 is infinite in fp16: where the loss itself is fp16, backward begins with infinity."""

    def narrow_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.mse_loss(model(batch[0]), torch.zeros(8, 40, dtype=torch.float16)).half()

    engine = engine_of("fp16")
    trace = replay_step(engine, narrow_loss, Moment.of(engine, batch(), 1))

    assert math.isfinite(trace.loss)
    bad = first_bad(trace.events)
    assert bad is not None
    assert (bad.origin, bad.source, bad.op.phase) == ("outside", SEED, "backward")
