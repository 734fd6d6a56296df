"""An engine carries out a whole plan: stores, masters, levers, micro-batches, and says so."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from narrowcast.engine.engine import Engine
from narrowcast.engine.stores import planned_optimizer
from narrowcast.errors import CheckpointError, UsageError
from narrowcast.optim.adamw import AdamW
from narrowcast.plan import PLANS, ActivationRule, Plan

SPLIT, LEAN = PLANS["bf16-split"], PLANS["lean"]
MICRO = replace(SPLIT, name="micro", micro_batches=4)


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))  # type: ignore[no-any-return]


class Stack(nn.Module):
    """Two blocks and a head with 40 classes, wide enough for block-wise states."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width) for _ in range(2))
        self.head = nn.Linear(width, 40)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)  # type: ignore[no-any-return]


def batch(seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(16, 64, generator=generator)
    return inputs, torch.randint(40, (16,), generator=generator)


def built(plan: Plan, seed: int = 0, **options: Any) -> Engine:
    torch.manual_seed(seed)
    model = Stack()
    optimizer = AdamW(model.parameters(), lr=1e-2, weights=plan.weights, states=plan.states)
    return Engine(model, optimizer, plan, **options)


def train(engine: Engine, steps: int, first: int = 0) -> list[float]:
    engine.model.train()
    losses = []
    for step in range(first, first + steps):
        inputs, targets = batch(step)
        with engine.forward():
            loss = F.cross_entropy(engine.model(inputs), targets)
        engine.backward(loss)
        assert engine.step().applied
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("plan", [SPLIT, LEAN], ids=lambda p: p.name)
def test_plain_optimizers_are_refused_with_the_one_to_build(plan: Plan) -> None:
    """bf16 weights under torch's AdamW lose updates; the plan's name says that they do not."""
    model = Stack()

    with pytest.raises(UsageError, match="AdamW has no such stores") as error:
        Engine(model, torch.optim.AdamW(model.parameters()), plan)
    assert f"weights={plan.weights!r}, states={plan.states!r}" in error.value.hint


@pytest.mark.parametrize(
    ("weights", "states", "said"),
    [("split16", "fp32", "keeps it as split16 with fp32"), ("fp32", "int8", "stores .* as fp32")],
)
def test_stores_other_than_the_plans_are_refused(weights: str, states: str, said: str) -> None:
    """What ran is what the plan's name says."""
    model = Stack()
    optimizer = AdamW(model.parameters(), weights=weights, states=states)

    with pytest.raises(UsageError, match=said) as error:
        Engine(model, optimizer, SPLIT)
    assert "weights='split16', states='int8'" in error.value.hint


def test_narrow_weights_under_a_policy_with_fp32_weights_are_refused() -> None:
    """The policy would widen the weights under their store."""
    model = Stack()
    optimizer = AdamW(model.parameters(), weights="split16")

    with pytest.raises(UsageError, match=r"policy 'bf16' keeps it in fp32"):
        Engine(model, optimizer, "bf16")


@pytest.mark.parametrize("plan", [SPLIT, LEAN], ids=lambda p: p.name)
def test_full_precision_evaluates_the_masters(plan: Plan) -> None:
    """Logits equal, bit for bit, those of an fp32 model that holds the masters."""
    engine = built(plan)
    train(engine, 3)
    full = Stack()
    full.load_state_dict(engine.weights())
    inputs, _ = batch()

    with engine.evaluating():
        logits = engine.model(inputs)

    assert logits.dtype is torch.float32
    assert torch.equal(logits, full.eval()(inputs))
    assert not torch.equal(logits, Stack.forward(engine.model.float(), inputs))  # type: ignore[arg-type]


def test_weights_are_the_fp32_masters_and_load_back() -> None:
    """split16 holds every fp32 number: what is exported and loaded again is the same."""
    engine, other = built(SPLIT), built(SPLIT, seed=5)
    train(engine, 3)
    weights = engine.weights()

    other.load_weights(weights)

    assert {w.dtype for w in weights.values()} == {torch.float32}
    assert all(torch.equal(w, other.weights()[name]) for name, w in weights.items())


def test_weights_of_another_model_are_refused() -> None:
    """The error is ours and names what does not fit."""
    with pytest.raises(CheckpointError, match="do not fit the model"):
        built(SPLIT).load_weights({"head.weight": torch.zeros(2, 2)})


@pytest.mark.slow
@pytest.mark.parametrize("plan", [SPLIT, LEAN, MICRO], ids=lambda p: p.name)
def test_a_restored_engine_goes_on_with_the_same_bits(plan: Plan) -> None:
    """Model state and engine state are all that there is to save."""
    whole, half, rest = built(plan), built(plan), built(plan, seed=9)
    parts = plan.micro_batches
    inputs, targets = batch()

    def steps(engine: Engine, count: int) -> None:
        engine.model.train()
        for _ in range(count * parts):
            with engine.forward():
                loss = F.cross_entropy(engine.model(inputs), targets)
            engine.backward(loss)
            engine.step()

    steps(whole, 4)
    steps(half, 2)
    rest.model.load_state_dict(half.model.state_dict())
    rest.load_state_dict(half.state_dict())
    steps(rest, 2)

    assert all(torch.equal(w, rest.weights()[name]) for name, w in whole.weights().items())


def test_micro_batches_of_a_plan_make_one_step() -> None:
    """They multiply with what the engine accumulates anyway."""
    engine = built(MICRO, accumulate=2)
    inputs, targets = batch()
    complete = []
    for _ in range(8):
        with engine.forward():
            loss = F.cross_entropy(engine.model(inputs), targets)
        engine.backward(loss)
        complete.append(engine.step().complete)

    assert complete == [False] * 7 + [True]


def test_islands_keep_fp32_weights_in_an_fp32_store() -> None:
    """The norms of a bf16 model may be fp32 islands: the engine moves them, bit for bit."""
    torch.manual_seed(0)
    model = Stack()
    torch.nn.init.normal_(model.blocks[0].norm.weight)  # type: ignore[union-attr,arg-type]
    norms = [p for n, p in model.named_parameters() if "norm" in n]
    others = [p for n, p in model.named_parameters() if "norm" not in n]
    before = [p.detach().clone() for p in norms]
    optimizer = AdamW(model.parameters(), weights="split16", states="int8")
    plan = replace(SPLIT, policy=SPLIT.policy.keeping_fp32(nn.LayerNorm))

    engine = Engine(model, optimizer, plan)

    assert all(torch.equal(p, was) for p, was in zip(norms, before, strict=True))
    train(engine, 2)
    assert {p.dtype for p in norms} == {torch.float32}
    assert {p.dtype for p in others} == {torch.bfloat16}


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-split", "lean"])
def test_batch_norms_keep_fp32_statistics_and_16_bit_inputs(precision: str) -> None:
    """Running means and variances do not stop moving, and what is saved for backward is bf16."""
    torch.manual_seed(0)
    plan = PLANS[precision]
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.LazyLinear(4))
    model(torch.zeros(2, 1, 8, 8))
    optimizer: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine = Engine(model, planned_optimizer(optimizer, model, plan), plan)
    norm = model[1]
    norm.register_forward_hook(lambda _, args, out: seen.extend([args[0].dtype, out.dtype]))
    seen: list[torch.dtype] = []

    with engine.forward():
        loss = F.cross_entropy(model(torch.randn(4, 1, 8, 8)), torch.arange(4))
    engine.backward(loss)
    engine.step()

    assert {t.dtype for t in (*norm.parameters(), norm.running_mean, norm.running_var)} == {
        torch.float32
    }
    assert seen == [torch.bfloat16, torch.bfloat16]
    assert model[0].weight.dtype is torch.bfloat16


def test_levers_do_what_they_say() -> None:
    """What a plan asks of whatever model is there, and where it is; all used in the first step."""
    engine = built(LEAN)
    train(engine, 1)

    assert engine.levers.notes == (
        "checkpoint: blocks.0, blocks.1",
        "remake: the whole model",
        "narrow_norm: blocks.0.norm, blocks.1.norm",
        "loss: in chunks, from the inputs of 'head'",
    )
    assert engine.levers.without_effect() == ()


@pytest.mark.slow
def test_exact_levers_do_not_change_a_bit() -> None:
    """Checkpointing computes again what was computed before, and so does remaking."""
    exact = (
        ActivationRule(modules="auto", lever="checkpoint"),
        ActivationRule(modules="*", lever="remake"),
    )

    with_lever = train(built(replace(SPLIT, activations=(*SPLIT.activations, *exact))), 3)

    assert with_lever == train(built(SPLIT), 3)


def test_a_model_without_blocks_or_head_trains_and_says_so() -> None:
    """A named plan asks for whatever the model has; what it has not is named."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 4))
    optimizer = AdamW(model.parameters(), weights=LEAN.weights, states=LEAN.states)

    notes = Engine(model, optimizer, LEAN).levers.notes

    assert [note.split(":")[0] for note in notes] == [
        "without checkpoint",
        "without narrow_norm",
        "remake",
        "loss",
    ]
    assert "Sequential has no repeated blocks" in notes[0]
    assert "none of the model's modules is a norm that it knows" in notes[1]
    assert "whole, since" in notes[3]


def test_a_lever_without_effect_is_named() -> None:
    """Logits that are used for something else than cross-entropy are computed whole."""
    engine = built(LEAN)
    inputs, _ = batch()
    with engine.forward():
        loss = engine.model(inputs).pow(2).mean()
    engine.backward(loss)
    engine.step()

    (said,) = engine.levers.without_effect()

    assert said.startswith("the logits of 'head' were computed whole, for ")


def test_a_chunked_loss_that_must_be_is_an_error_where_there_is_no_head() -> None:
    """Only `auto` may leave it out."""
    model = nn.Sequential(nn.Linear(64, 4))
    optimizer = AdamW(model.parameters(), weights="split16", states="int8")

    with pytest.raises(UsageError, match="look like its head"):
        Engine(model, optimizer, replace(SPLIT, loss="chunked"))


def test_a_new_engine_takes_the_levers_of_the_old_one_off() -> None:
    """A model is trained under one plan at a time, and nothing of an earlier one stays."""
    engine = built(LEAN)
    model = engine.model
    optimizer = engine._only.optimizer  # type: ignore[union-attr]
    del engine

    plain = Engine(model, optimizer, replace(LEAN, name="plain", activations=(), loss="whole"))
    train(plain, 1)

    assert plain.levers.notes == ()
    assert type(plain.model(batch()[0])) is Tensor
