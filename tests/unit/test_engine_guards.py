"""Gradients at a loss scale, and a schedule that is the engine's, are moved by nobody else."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from narrowcast.engine.engine import Engine
from narrowcast.errors import UsageError
from narrowcast.scaling.scales import DynamicScale
from small_training import OVERFLOW, X, Y, adam, is_equal, sgd, small_model, train_step


def backward(engine: Engine, i: int = 0) -> None:
    with engine.forward():
        loss = F.cross_entropy(engine.model(X[i]), Y[i])
    engine.backward(loss)


def fp16_engine(**options: int) -> Engine:
    model = small_model()
    return Engine(model, sgd(model), "fp16", **options)


def clip(model: nn.Module) -> None:
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)


def replace_one(model: nn.Module) -> None:
    weight = next(model.parameters())
    assert weight.grad is not None
    weight.grad = weight.grad.clone() / 2


def zero(model: nn.Module) -> None:
    model.zero_grad(set_to_none=False)


def go_back_again(model: nn.Module) -> None:
    F.cross_entropy(model(X[1]), Y[1]).backward()


@pytest.mark.parametrize("change", [clip, replace_one, zero, go_back_again])
def test_a_gradient_that_stands_at_a_scale_is_not_to_be_changed(
    change: Callable[[nn.Module], None],
) -> None:
    """Clipped to 1 at scale 65,536 it would be nothing; the error names it and the way out."""
    engine = fp16_engine()
    backward(engine)
    change(engine.model)

    with pytest.raises(UsageError, match=r"'0\.weight' was changed .* loss scale 65536") as error:
        engine.step()

    assert "clip_norm=" in error.value.hint
    assert train_step(engine, 1).applied


def test_a_change_between_two_micro_batches_is_refused_at_the_next_backward() -> None:
    """Before another gradient is added to it."""
    engine = fp16_engine(accumulate=2)
    train_step(engine, 0)
    clip(engine.model)

    with pytest.raises(UsageError, match="was changed"):
        backward(engine, 1)


@pytest.mark.parametrize("policy", ["fp32", "bf16"])
def test_a_gradient_that_is_used_as_it_is_may_be_changed(policy: str) -> None:
    """Where there is no scale, clipping by hand is what clip_norm does."""
    by_hand, by_engine = small_model(), small_model()
    first = Engine(by_hand, sgd(by_hand), policy)
    second = Engine(by_engine, sgd(by_engine), policy, clip_norm=0.1)
    for i in range(5):
        backward(first, i)
        torch.nn.utils.clip_grad_norm_(by_hand.parameters(), 0.1)
        assert first.step().applied
        train_step(second, i)

    assert is_equal(by_hand, by_engine)


def test_a_gradient_beside_sums_that_are_kept_elsewhere_is_refused() -> None:
    """16-bit gradients are summed in fp32, and would be written over what somebody puts there."""
    model = small_model()
    engine = Engine(model, sgd(model), "bf16-true", accumulate=2)
    train_step(engine, 0)
    backward(engine, 1)
    model[0].weight.grad = torch.ones_like(model[0].weight)

    with pytest.raises(UsageError, match=r"'0\.weight' was changed .* summed elsewhere"):
        engine.step()


def test_what_hooks_do_during_backward_is_no_change() -> None:
    """Hooks on the gradient and after its accumulation, over micro-batches of an fp16 step."""
    engine = fp16_engine(accumulate=2)
    calls = []
    weight = next(engine.model.parameters())
    weight.register_hook(lambda gradient: gradient * 0.5)
    weight.register_post_accumulate_grad_hook(lambda p: calls.append(p.grad.mul_(1.0)))

    reports = [train_step(engine, i) for i in range(8)]

    assert [r.applied for r in reports] == [False, True] * 4
    assert len(calls) == 8


def test_losses_at_several_scales_and_a_dropped_gradient_are_no_change() -> None:
    """The engine rescales what is pending itself, and one gradient may be done without."""
    model = small_model()
    scales = {"a": DynamicScale(scale=1024.0), "b": DynamicScale(scale=64.0)}
    engine = Engine(model, adam(model), "fp16", scale=scales)
    for i in range(3):
        with engine.forward():
            logits = model(X[i])
            first, second = F.cross_entropy(logits, Y[i]), logits.square().mean()
        engine.backward(first, "a", retain_graph=True)
        engine.backward(second, "b")
        model[2].bias.grad = None
        assert engine.step().applied


def test_sparse_gradients_over_micro_batches_are_no_change() -> None:
    """Autograd replaces a sparse gradient by a sum, and the engine coalesces it."""
    model = nn.EmbeddingBag(8, 4, sparse=True)
    engine = Engine(model, sgd(model), "fp16", accumulate=2, scale=4.0)
    reports = []
    for _ in range(4):
        with engine.forward():
            loss = model(torch.tensor([[1, 2, 2]])).float().square().sum()
        engine.backward(loss)
        reports.append(engine.step())

    assert [r.applied for r in reports] == [False, True, False, True]


def scheduled(policy: str = "fp32") -> tuple[Engine, torch.optim.lr_scheduler.LRScheduler]:
    model = small_model()
    optimizer = sgd(model)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    return Engine(model, optimizer, policy, scheduler=scheduler), scheduler


@pytest.mark.filterwarnings("ignore:Detected call of")
@pytest.mark.parametrize("where", ["after the step", "before the step"])
def test_a_leftover_scheduler_step_is_refused(where: str) -> None:
    """At the next call of the engine that could see it, and with what to remove."""
    engine, scheduler = scheduled()
    if where == "after the step":
        train_step(engine, 0)
        scheduler.step()
        with pytest.raises(UsageError, match=r"StepLR stands at 2, .* left it at 1") as error:
            train_step(engine, 1)
    else:
        backward(engine)
        scheduler.step()
        engine.step()
        backward(engine, 1)
        scheduler.step()
        with pytest.raises(UsageError, match=r"StepLR stands at 3, .* left it at 2") as error:
            engine.step()

    assert "remove scheduler.step()" in error.value.hint


def test_a_schedule_stands_still_over_a_skipped_step() -> None:
    """And goes on with the next applied one."""
    engine, scheduler = scheduled("fp16")
    reports = [train_step(engine, i, f) for i, f in enumerate((1.0, OVERFLOW, 1.0))]

    assert [r.applied for r in reports] == [True, False, True]
    assert scheduler.last_epoch == 2


def test_a_schedule_that_was_loaded_is_not_taken_for_a_stepped_one() -> None:
    """By the engine at any time, and by hand before its first step."""
    ahead, _ = scheduled()
    for i in range(5):
        train_step(ahead, i)
    engine, scheduler = scheduled()
    scheduler.load_state_dict({**scheduler.state_dict(), "last_epoch": 7})
    train_step(engine, 0)

    assert scheduler.last_epoch == 8

    engine, scheduler = scheduled()
    train_step(engine, 0)
    engine.load_state_dict(ahead.state_dict())
    train_step(engine, 1)

    assert scheduler.last_epoch == 6


@pytest.mark.parametrize(
    ("start", "policy", "said"),
    [
        (torch.float16, "fp16", "fp16 weights became fp32: 0.weight and 3 more"),
        (torch.bfloat16, "bf16", "bf16 weights became fp32: 0.weight and 3 more"),
        (torch.float32, "bf16-true", "fp32 weights became bf16: 0.weight and 3 more"),
    ],
)
def test_the_notes_say_what_was_cast(start: torch.dtype, policy: str, said: str) -> None:
    """A model that comes in another format than the policy stores is cast, and it is told."""
    model = small_model().to(start)

    assert Engine(model, sgd(model), policy).notes == (said,)


@pytest.mark.parametrize("policy", ["fp32", "fp16", "bf16"])
def test_nothing_cast_is_nothing_noted(policy: str) -> None:
    """An fp32 model under a policy that stores fp32 stays what it is."""
    model = small_model()

    assert Engine(model, sgd(model), policy).notes == ()
