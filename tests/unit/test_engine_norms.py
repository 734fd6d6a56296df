"""The reported norm and clipping, always of unscaled gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from narrowcast.engine.engine import Engine
from small_training import (
    X,
    Y,
    one_step,
    sgd,
    small_model,
    train_step,
    weights,
)


@pytest.mark.parametrize("policy", ["fp32", "bf16", "fp16", "bf16-true"])
def test_the_norm_is_of_unscaled_gradients_before_clipping(policy: str) -> None:
    """The report's norm is that of the fp64 gradient, to the compute format's rounding."""
    exact = small_model().double()
    F.cross_entropy(exact(X[0].double()), Y[0]).backward()
    expected = nn.utils.get_total_norm([p.grad for p in exact.parameters()]).item()

    _, report = one_step(policy, clip_norm=1e-3)

    # bf16 rounds each of a few operations to 2^-9; the norm averages over 340 elements.
    assert report.gradient_norm == pytest.approx(expected, rel=2**-6)


def test_clipping_limits_the_unscaled_norm() -> None:
    """At scale 65,536 and limit 1e-3 SGD with lr 1 moves the weights by 1e-3."""
    model = small_model()
    engine = Engine(model, sgd(model, lr=1.0), "fp16", clip_norm=1e-3)
    before = weights(model)

    train_step(engine, 0)

    moved = [p.detach() - q for p, q in zip(model.parameters(), before, strict=True)]
    assert nn.utils.get_total_norm(moved).item() == pytest.approx(1e-3, rel=1e-2)


def test_finite_gradients_whose_squares_overflow_are_stepped_with() -> None:
    """An infinite sum of squares is no infinite gradient: both norm and clipping go to fp64."""
    weight = nn.Parameter(torch.zeros(4))
    model = nn.Module()
    model.weight = weight
    engine = Engine(model, torch.optim.SGD([weight], lr=1.0), "fp32", clip_norm=1.0)

    with engine.forward():
        loss = (weight * 1e30).sum()
    engine.backward(loss)
    report = engine.step()

    assert report.applied
    assert report.gradient_norm == pytest.approx(2e30)
    assert torch.allclose(weight.detach(), torch.full((4,), -0.5))


def test_sparse_gradients_are_normed_and_clipped_by_value() -> None:
    """An embedding with sparse=True trains as its dense twin does, repeated rows included."""
    sparse, dense = (nn.Embedding(10, 4, sparse=s) for s in (True, False))
    dense.load_state_dict(sparse.state_dict())
    reports = []

    for model in (sparse, dense):
        engine = Engine(model, sgd(model), "fp16", clip_norm=0.1)
        with engine.forward():
            loss = model(torch.tensor([1, 1, 7])).pow(2).sum()
        engine.backward(loss)
        reports.append(engine.step())

    torch.testing.assert_close(sparse.weight, dense.weight)
    assert reports[0].gradient_norm == pytest.approx(reports[1].gradient_norm, rel=1e-6)
    assert reports[0].applied
