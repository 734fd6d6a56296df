"""Taking a step again leaves no trace: the training goes on bit for bit as if nobody had looked."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from narrowcast.engine.engine import Engine
from narrowcast.errors import UsageError
from narrowcast.plan import ActivationRule, plan_named
from narrowcast.randomness import random_state
from narrowcast.replay.moment import Moment, untouched
from narrowcast.replay.step import replay_step
from replayed import Net, batch, compute_loss, engine_of

PRECISIONS = ["fp32", "fp16", "bf16", "bf16-true", "bf16-split", "lean"]


def trained(precision: Any, steps: int, *, replays: bool, rows: int = 8, **options: Any) -> Engine:
    """Train, and replay before and after each step in every way if asked."""
    engine = engine_of(precision, **options)
    engine.model.train()
    torch.manual_seed(5)
    for step in range(steps):
        part = batch(step, rows)
        moment = Moment.of(engine, part, step + 1)
        if replays:
            replay_step(engine, compute_loss, moment)
        with engine.forward():
            loss = compute_loss(engine.model, part)
        engine.backward(loss)
        if replays:  # with gradients pending
            replay_step(engine, compute_loss, moment, ranges="suspects", scale=4.0)
        engine.step()
        if replays:
            replay_step(engine, compute_loss, moment, policy_reference=True, samples=16)
            replay_step(engine, compute_loss, moment, ranges=None)
    return engine


def state_of(engine: Engine) -> dict[str, Any]:
    """All that a training consists of."""
    return {
        "weights": engine.model.state_dict(),
        "masters": engine.weights(),
        "engine": engine.state_dict(),
        "random": random_state(),
    }


def assert_same(one: Any, other: Any) -> None:
    if isinstance(one, Tensor):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, (list, tuple)):
        for a, b in zip(one, other, strict=True):
            assert_same(a, b)
    elif hasattr(one, "tobytes"):
        assert one.tobytes() == other.tobytes()
    else:
        assert one == other


@pytest.mark.slow
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_training_is_the_same_with_and_without_replays(precision: str) -> None:
    """Weights, masters, optimizer, scale, buffers and random states agree bit for bit."""
    plain = trained(precision, 3, replays=False)
    replayed = trained(precision, 3, replays=True)

    assert_same(state_of(plain), state_of(replayed))


@pytest.mark.slow
def test_micro_batches_and_lossy_levers_go_on_as_if_not_replayed() -> None:
    """Pending sums of 16-bit gradients stay, and the stream of roundings stands where it stood."""
    plan = plan_named("bf16-split")
    rules = (ActivationRule(modules="blocks.*", lever="int8"),)
    plan = replace(plan, name="rounded", activations=rules)

    plain = trained(plan, 4, replays=False, rows=128, accumulate=2)
    replayed = trained(plan, 4, replays=True, rows=128, accumulate=2)

    assert state_of(plain)["engine"]["roundings"]["drawn"] > 0
    assert_same(state_of(plain), state_of(replayed))


def test_everything_that_a_forward_pass_writes_is_given_back() -> None:
    """Buffers (also replaced and new ones), gradients, modes, random states."""
    model = Net(counts=True)
    model.train()
    model.blocks[1].eval()
    model.head.weight.grad = held = torch.ones_like(model.head.weight)
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    seen, before = model.seen, random_state()

    with untouched(model):
        assert model.head.weight.grad is None
        model.eval()
        model.train()
        model(batch()[0]).sum().backward()
        model.seen = torch.full((3,), 9.0)
        model.register_buffer("made", torch.ones(1))

    assert model.head.weight.grad is held
    assert model.norm.weight.grad is None
    assert model.seen is seen
    assert_same(buffers, dict(model.named_buffers()))
    assert [block.training for block in model.blocks] == [True, False]
    assert_same(before, random_state())


def test_it_is_given_back_after_an_exception_too() -> None:
    """A forward pass that fails half-way has written buffers all the same."""
    model = Net()
    buffers = {name: b.clone() for name, b in model.named_buffers()}

    def fail() -> None:
        with untouched(model):
            model(batch()[0])
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()

    assert_same(buffers, dict(model.named_buffers()))


def test_a_batch_that_takes_gradients_keeps_its_own() -> None:
    """Also of leaves in nests."""
    inputs = torch.randn(8, 16, requires_grad=True)
    inputs.grad = held = torch.zeros(8, 16)
    model = Net()

    with untouched(model, {"x": [inputs]}):
        model(inputs).sum().backward()
        assert inputs.grad is not None

    assert inputs.grad is held
    assert not held.any()


def test_rows_that_an_embedding_brings_down_to_size_are_given_back() -> None:
    """nn.Embedding(max_norm=1) writes into its weight in forward."""
    model = nn.Embedding(4, 3, max_norm=0.1)
    before = model.weight.detach().clone()

    with untouched(model):
        model(torch.arange(4))
        assert not torch.equal(model.weight, before)

    assert torch.equal(model.weight, before)


@pytest.mark.parametrize("how", ["in place", "as a new tensor"])
def test_a_target_network_is_given_back(how: str) -> None:
    """Frozen weights that follow the trained ones, in place or by ``weight.data = ...``."""
    model = nn.ModuleDict({"own": nn.Linear(2, 2), "target": nn.Linear(2, 2).requires_grad_(False)})
    target = model["target"].weight
    before, storage = target.detach().clone(), target.data_ptr()

    with untouched(model), torch.no_grad():
        if how == "in place":
            target.lerp_(model["own"].weight, 0.5)
        else:
            target.data = target.data * 0.5 + model["own"].weight.data * 0.5
        assert not torch.equal(target, before)

    assert torch.equal(target, before)
    assert target.data_ptr() == storage


def test_a_frozen_base_that_is_larger_than_what_is_trained_is_not_copied() -> None:
    """Adapters: what is written there is refused, as it cannot be given back."""
    model = nn.ModuleDict({"own": nn.Linear(2, 2), "base": nn.Linear(9, 9).requires_grad_(False)})
    refused = pytest.raises(UsageError, match="wrote into its weight 'base")

    with refused, untouched(model), torch.no_grad():
        model["base"].weight.zero_()


def test_a_model_that_writes_its_weights_is_refused() -> None:
    """What cannot be given back is said."""
    model = nn.Linear(2, 2)
    refused = pytest.raises(UsageError, match="wrote into its weight 'weight'")

    with refused, untouched(model), torch.no_grad():
        model.weight.add_(1)


def test_expanded_buffers_cannot_be_written_and_do_no_harm() -> None:
    """Position ids are often an expanded arange; copying into them would raise."""
    model = nn.Linear(2, 2)
    model.register_buffer("ids", torch.arange(3.0).expand(4, 3))
    model.register_buffer("sparse", torch.eye(3).to_sparse())

    with untouched(model):
        model(torch.ones(1, 2))

    assert torch.equal(model.ids, torch.arange(3.0).expand(4, 3))
    assert torch.equal(model.sparse.to_dense(), torch.eye(3))


def test_the_first_moment_knows_the_scale_that_the_first_loss_will_have() -> None:
    """Scales begin with the first backward pass; a moment before it has the same one."""
    asked, usual = engine_of("fp16", scale=128.0), engine_of("fp16")

    assert list(Moment.of(asked, batch(), 1).scales.values()) == [128.0]
    assert list(Moment.of(usual, batch(), 1).scales.values()) == [65536.0]
    assert usual.loss_scales() == {}
