"""Loops that would train something else than they say: found at the first step that goes wrong."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel

from narrowcast.engine.engine import Engine
from narrowcast.errors import UsageError
from small_training import X, Y, adam, sgd, small_model, train_step


def forward(engine: Engine, i: int = 0) -> torch.Tensor:
    with engine.forward():
        return F.cross_entropy(engine.model(X[i]), Y[i])


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_leftover_zero_grad_is_found_in_the_second_micro_batch(precision: str) -> None:
    """At the top of an accumulating loop it drops all micro-batches but the last."""
    model = small_model()
    optimizer = sgd(model)
    engine = Engine(model, optimizer, precision, accumulate=4)
    optimizer.zero_grad()
    engine.backward(forward(engine))
    engine.step()
    optimizer.zero_grad()

    with pytest.raises(UsageError, match="1 of the micro-batches of this step would be lost") as e:
        engine.backward(forward(engine, 1))

    assert "remove optimizer.zero_grad()" in e.value.hint


def test_a_zero_grad_before_the_step_is_found_by_the_step() -> None:
    """Afterwards the engine works as before: the step that could not be made is over."""
    model = small_model()
    optimizer = sgd(model)
    engine = Engine(model, optimizer, "fp32")
    engine.backward(forward(engine))
    optimizer.zero_grad()

    with pytest.raises(UsageError, match="were dropped"):
        engine.step()

    assert train_step(engine, 0).applied


def test_sums_of_16_bit_gradients_cannot_be_dropped_by_others() -> None:
    """With bf16 weights the engine holds the sums itself: the same step as without zero_grad."""
    steps = []
    for drops in (False, True):
        model = small_model()
        optimizer = sgd(model)
        engine = Engine(model, optimizer, "bf16-true", accumulate=2)
        for i in range(2):
            if drops:
                optimizer.zero_grad()
            report = train_step(engine, i)
        steps.append((report.applied, report.gradient_norm))

    assert steps[0] == steps[1]


def test_gradients_of_some_parameters_may_be_dropped() -> None:
    """As some methods do with those of a last layer; the others are used."""
    model = small_model()
    engine = Engine(model, sgd(model), "fp32", accumulate=2)
    for i in range(2):
        engine.backward(forward(engine, i))
        model[0].weight.grad = model[0].bias.grad = None
        report = engine.step()

    assert report.applied


def test_every_step_needs_a_forward_pass_of_its_own() -> None:
    """Entering engine.forward() once does not vouch for the steps after."""
    model = small_model()
    engine = Engine(model, sgd(model), "bf16")
    train_step(engine, 0)

    with pytest.raises(UsageError, match="never entered for this step"):
        engine.backward(F.cross_entropy(model(X[1]), Y[1]))

    assert train_step(engine, 1).applied


def test_one_forward_pass_may_serve_two_optimizers() -> None:
    """A GAN whose two losses come out of one block: each optimizer's step uses it up for itself."""
    model = nn.ModuleDict({"g": nn.Linear(2, 2), "d": nn.Linear(2, 1)})
    optimizers = {name: sgd(model[name]) for name in ("g", "d")}
    engine = Engine(model, optimizers, "bf16")
    with engine.forward():
        fake = model["g"](torch.ones(3, 2))
        losses = {"d": model["d"](fake.detach()).mean(), "g": fake.mean()}

    for name, loss in losses.items():
        engine.backward(loss, name)
        assert engine.step(name).applied
    with pytest.raises(UsageError, match="never entered for this step"):
        engine.backward(losses["g"], "g")


@pytest.mark.parametrize("make", [adam, sgd, lambda m: torch.optim.Adagrad(m.parameters())])
def test_an_optimizer_may_bring_its_state(make: object) -> None:
    """Moments of fp32 weights are cast with them, by torch's own rules of loading; it is told."""
    model = small_model()
    optimizer = make(model)  # type: ignore[operator]
    F.cross_entropy(model(X[0]), Y[0]).backward()
    optimizer.step()
    optimizer.zero_grad()
    has_state = any(isinstance(v, torch.Tensor) and v.dim() for s in optimizer.state.values()
                    for v in s.values())  # fmt: skip

    engine = Engine(model, optimizer, "bf16-true")

    assert train_step(engine, 1).applied
    told = "the state that 'optimizer' brought was cast to bf16 with its weights"
    assert (told in engine.notes) == has_state
    moments = [v for s in optimizer.state.values() for v in s.values() if v is not None and v.dim()]
    assert {m.dtype for m in moments} <= {torch.bfloat16}


def test_an_average_made_before_the_engine_is_not_called_bf16_true() -> None:
    """Its weights are fp32: it would compute in fp32 under another name."""
    model = small_model()
    early = AveragedModel(model)
    engine = Engine(model, sgd(model), "bf16-true")
    late = AveragedModel(model)

    with (
        pytest.raises(UsageError, match="would compute in fp32"),
        engine.evaluating("training", model=early),
    ):
        pass

    with engine.evaluating("training", model=late) as label:
        assert (label, late(X[0]).dtype) == ("bf16-true", torch.float32)
    with engine.evaluating(model=early) as label:
        assert label == "fp32"


def test_any_average_is_evaluated_under_autocast() -> None:
    """Autocast needs nothing of the model."""
    model = small_model()
    early = AveragedModel(model)
    engine = Engine(model, sgd(model), "bf16")

    with engine.evaluating("training", model=early) as label:
        found = early(X[0])

    assert (label, found.dtype) == ("bf16", torch.bfloat16)


def test_writes_of_the_model_in_an_evaluation_are_named_once() -> None:
    """Stored weights keep their bits, and the engine remembers whose they are."""
    model = nn.Sequential(nn.Embedding(8, 4, max_norm=0.1))
    engine = Engine(model, sgd(model), "bf16-true")
    before = model[0].weight.detach().clone()

    for _ in range(2):
        with engine.evaluating():
            model(torch.arange(8))

    assert engine.restored == ["0.weight"]
    assert torch.equal(model[0].weight, before)
