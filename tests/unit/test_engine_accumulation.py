"""Micro-batches: exact sums, one scale per effective batch, one step at its end."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from narrowcast.engine.engine import Engine
from narrowcast.scaling.scales import DynamicScale
from small_training import (
    OVERFLOW,
    X,
    Y,
    holds,
    is_equal,
    one_step,
    sgd,
    small_model,
    train_step,
    weights,
)


def accumulated(policy: str, batches: list[tuple[Tensor, Tensor]], accumulate: int) -> nn.Module:
    model = small_model()
    engine = Engine(model, sgd(model), policy, accumulate=accumulate)
    for x, y in batches:
        with engine.forward():
            loss = F.cross_entropy(model(x), y)
        engine.backward(loss)
        report = engine.step()
    assert report.complete
    return model


@pytest.mark.parametrize(("count", "size"), [(4, 4), (3, 5)])
def test_accumulation_gives_the_gradient_of_the_whole_batch(count: int, size: int) -> None:
    """Equal micro-batches sum to the full batch's gradient, to the rounding of the sums.

    A gradient element is a sum of n terms in either order, so both are within n eps sum|terms| of
    the truth (Higham 2002, section 4.2); n = 20 samples and |terms| below 2 bound the difference.
    """
    x, y = X[:4].flatten(0, 1)[: count * size], Y[:4].flatten()[: count * size]

    whole = accumulated("fp32", [(x, y)], 1)
    parts = accumulated("fp32", list(zip(x.split(size), y.split(size), strict=True)), count)

    bound = 2 * 20 * torch.finfo(torch.float32).eps * 2
    for p, q in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=0.1 * bound)


def test_inside_an_accumulation_step_does_nothing_and_says_so() -> None:
    """Only the last micro-batch steps; before it the report is incomplete and gradients stay."""
    model = small_model()
    engine = Engine(model, sgd(model), "fp16", accumulate=3)
    before = weights(model)

    first, second = train_step(engine, 0), train_step(engine, 1)
    untouched = holds(model, before)
    pending = all(p.grad is not None for p in model.parameters())
    third = train_step(engine, 2)

    assert (first.complete, second.complete, third.complete) == (False, False, True)
    assert (first.applied, first.step) == (False, 1)
    assert untouched
    assert pending
    assert (third.applied, third.step) == (True, 1)
    assert all(p.grad is None for p in model.parameters())


def test_the_scale_stands_still_within_an_effective_batch() -> None:
    """A scale due to grow after one finite step grows after the window, not inside it."""
    model = small_model()
    engine = Engine(
        model, sgd(model), "fp16", accumulate=4, scale=DynamicScale(scale=8.0, interval=1)
    )

    reports = [train_step(engine, i) for i in range(8)]

    assert [r.loss_scale for r in reports] == [8.0] * 4 + [16.0] * 4
    assert engine.loss_scales() == {"loss": 32.0}


@pytest.mark.parametrize("position", [0, 1, 2])
def test_an_overflow_in_any_micro_batch_skips_the_whole_step(position: int) -> None:
    """One bad micro-batch poisons its window wherever it stands, and backs the scale off once."""
    model = small_model()
    engine = Engine(model, sgd(model), "fp16", accumulate=3)
    before = weights(model)

    report = [train_step(engine, i, OVERFLOW if i == position else 1.0) for i in range(3)][-1]

    assert (report.applied, report.reason) == (False, "gradient overflow")
    assert holds(model, before)
    assert engine.loss_scales() == {"loss": 2.0**15}


def test_a_flushed_window_is_normalised_to_its_length() -> None:
    """Two of four micro-batches, flushed, step like two of two: the factors are powers of two."""
    flushed, plain = small_model(), small_model()
    four = Engine(flushed, sgd(flushed), "fp32", accumulate=4)
    two = Engine(plain, sgd(plain), "fp32", accumulate=2)

    train_step(four, 0)
    train_step(four, 1)
    report = four.step(flush=True)
    train_step(two, 0)
    train_step(two, 1)

    assert (report.complete, report.applied) == (True, True)
    assert is_equal(flushed, plain)


def test_flushing_an_empty_window_does_nothing() -> None:
    """At the end of an epoch that came out even there is nothing to flush."""
    engine, first = one_step()

    report = engine.step(flush=True)

    assert (report.complete, report.applied, engine.tried_steps()) == (False, False, first.step)


def test_bf16_weights_sum_their_micro_batches_in_the_reduce_format() -> None:
    """256 + 1 + 1 + 1 in bf16 is 256; summed in fp32 and rounded once it is 260 (ties to even)."""
    model = nn.Linear(1, 1, bias=False)
    engine = Engine(model, torch.optim.SGD(model.parameters(), lr=0.0), "bf16-true", accumulate=4)
    seen: list[float] = []
    engine._lanes["optimizer"].optimizer.register_step_pre_hook(
        lambda *_: seen.append(model.weight.grad.item())
    )

    for value in (256.0, 1.0, 1.0, 1.0):
        with engine.forward():
            loss = (model(torch.tensor([[value]])) * 4.0).sum()
        engine.backward(loss)
        report = engine.step()

    assert seen == [260.0]
    assert report.gradient_norm == 259.0
    assert model.weight.grad is None


@pytest.mark.parametrize("policy", ["fp32", "fp16", "bf16-true"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_evaluating_in_between_changes_nothing(policy: str, accumulate: int) -> None:
    """Pending gradients survive an evaluation between backward and step, bit for bit."""
    models = []
    for evaluates in (False, True):
        model = small_model()
        engine = Engine(model, sgd(model), policy, accumulate=accumulate)
        for i in range(2 * accumulate):
            with engine.forward():
                loss = F.cross_entropy(model(X[i]), Y[i])
            engine.backward(loss)
            if evaluates:
                with engine.evaluating():
                    model(X[0])
            engine.step()
        models.append(model)

    assert is_equal(*models)
