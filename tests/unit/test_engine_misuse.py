"""What is wrong with a loop or with its parts is said at once, with a way out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from narrowcast.engine.engine import Engine
from narrowcast.errors import UnknownName, UsageError
from narrowcast.policy import Policy
from small_training import X, Y, adam, one_step, sgd, small_model, train_step


def pending(policy: str = "fp16", **options: Any) -> tuple[Engine, torch.Tensor]:
    """Return an engine and a loss that can be used once."""
    model = small_model()
    engine = Engine(model, sgd(model), policy, **options)
    with engine.forward():
        loss = F.cross_entropy(model(X[0]), Y[0])
    return engine, loss


def test_a_step_needs_a_backward_pass() -> None:
    """Also a second step without a second backward pass."""
    engine, _ = one_step()

    with pytest.raises(UsageError, match=r"without engine\.backward"):
        engine.step()


def test_backward_needs_a_forward_pass_under_the_policy() -> None:
    """A loop that forgets engine.forward() altogether would train in fp32 under another name."""
    model = small_model()
    engine = Engine(model, sgd(model), "bf16")

    with pytest.raises(UsageError, match="never entered"):
        engine.backward(F.cross_entropy(model(X[0]), Y[0]))


@pytest.mark.parametrize(
    "call",
    [
        lambda engine, loss: engine.backward(loss),
        lambda engine, loss: engine.step(),
        lambda engine, loss: engine.forward().__enter__(),
        lambda engine, loss: engine.evaluating().__enter__(),
    ],
    ids=["backward", "step", "forward", "evaluating"],
)
@pytest.mark.parametrize("policy", ["fp32", "fp16"])
def test_only_the_forward_pass_belongs_inside_forward(
    call: Callable[[Engine, torch.Tensor], None], policy: str
) -> None:
    """Anything else inside the with block is refused; afterwards the engine works as before."""
    engine, loss = pending(policy)

    with pytest.raises(UsageError, match=r"inside engine\.forward"), engine.forward():
        call(engine, loss)

    engine.backward(loss)
    assert engine.step().applied


def test_backward_under_somebodys_autocast_is_refused() -> None:
    """torch advises against it; gradients of casts would be computed by autocast's rules."""
    engine, loss = pending("fp32")

    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        pytest.raises(UsageError, match="inside autocast"),
    ):
        engine.backward(loss)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda loss: loss.item(), "float"),
        (lambda loss: loss.detach(), "requires a gradient"),
        (lambda loss: torch.stack([loss, loss]), r"shape \(2,\)"),
        (lambda loss: loss * 1j, "complex64"),
    ],
)
def test_a_loss_is_one_real_number_with_a_graph(
    make: Callable[[torch.Tensor], Any], message: str
) -> None:
    """Each other thing has its own message."""
    engine, loss = pending()

    with pytest.raises(UsageError, match=message):
        engine.backward(make(loss))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_loss_may_have_one_element_and_any_real_dtype(dtype: torch.dtype) -> None:
    """Shape (1,) and 16-bit losses, as autocast on a CPU returns them, are losses too."""
    engine, loss = pending(scale=1024.0)

    engine.backward(loss.to(dtype).reshape(1))

    assert engine.step().applied


def test_the_optimizer_is_the_engines_to_step() -> None:
    """`optimizer.step()` on pending gradients, by hand or by a scaler, would use scaled ones."""
    engine, loss = pending()
    optimizer = engine._lanes["optimizer"].optimizer
    engine.backward(loss)

    with pytest.raises(UsageError, match="was stepped while gradients"):
        optimizer.step()

    assert engine.step().applied
    optimizer.step()


def test_gradients_that_the_engine_did_not_write_are_refused() -> None:
    """A hand-scaled backward before ours would add gradients of another scale."""
    engine, loss = pending()
    torch.amp.GradScaler("cpu").scale(loss).backward(retain_graph=True)

    with pytest.raises(UsageError, match="did not write"):
        engine.backward(loss)

    engine.zero_grad()
    engine.backward(loss)
    assert engine.step().applied


def test_a_loss_of_other_parameters_is_noticed() -> None:
    """When no gradient reached the optimizer there is nothing to step with."""
    engine, _ = pending()
    engine.backward(torch.ones((), requires_grad=True) * 2)

    with pytest.raises(UsageError, match="no backward pass reached"):
        engine.step()


def test_a_failed_backward_drops_its_half_of_the_gradients() -> None:
    """After an exception inside backward the next batch starts from nothing."""

    def fail(_: torch.Tensor) -> None:
        raise RuntimeError("out of memory, say")

    engine, loss = pending()
    handle = engine.model[0].weight.register_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        engine.backward(loss)
    handle.remove()

    assert all(p.grad is None for p in engine.model.parameters())
    assert train_step(engine, 1).applied


def test_closures_are_refused() -> None:
    """LBFGS calls the model several times a step; so does nothing else here."""
    model = small_model()

    with pytest.raises(UsageError, match=r"LBFGS\.step needs closure"):
        Engine(model, torch.optim.LBFGS(model.parameters()), "fp32")
    engine, loss = pending()
    engine.backward(loss)
    with pytest.raises(UsageError, match="closure"):
        engine.step(lambda: loss)  # type: ignore[arg-type]


def test_the_optimizer_must_hold_the_models_parameters() -> None:
    """An optimizer of a copy, or of a model that was replaced, would train nothing."""
    with pytest.raises(UsageError, match="4 parameters, of which 4 are not"):
        Engine(small_model(), sgd(small_model()), "fp32")


def test_an_optimizer_built_before_keeps_working_in_another_format() -> None:
    """Casting to bf16 changes parameters in place."""
    model = small_model()
    optimizer = adam(model)

    engine = Engine(model, optimizer, "bf16-true")

    assert model[0].weight.dtype == torch.bfloat16
    assert optimizer.param_groups[0]["params"][0] is model[0].weight
    assert train_step(engine, 0).applied


def test_a_parameter_group_added_later_is_trained_checked_and_unscaled() -> None:
    """Unfreezing by add_param_group works: parameters are not remembered from the start."""
    model, twin = small_model(), small_model()
    optimizer = sgd(model[2])
    engine = Engine(model, optimizer, "fp16")
    optimizer.add_param_group({"params": model[0].parameters()})
    other = Engine(twin, sgd(twin), "fp16")

    train_step(engine, 0)
    train_step(other, 0)

    assert torch.equal(model[0].weight, twin[0].weight)


def _shared() -> None:
    model = small_model()
    Engine(model, {"a": sgd(model), "b": sgd(model[2])}, "fp32")


def _fp16_weights() -> None:
    model, other = small_model(), small_model().half()
    Engine(model, {"a": sgd(model), "b": sgd(other)}, "fp16")


def _options(**options: Any) -> Callable[[], None]:
    def build() -> None:
        model = small_model()
        Engine(model, sgd(model), "fp32", **options)

    return build


def _scheduler(kind: Callable[..., Any], *, own: bool, **options: Any) -> Callable[[], None]:
    def build() -> None:
        model = small_model()
        optimizer = sgd(model)
        owner = optimizer if own else sgd(model)
        Engine(model, optimizer, "fp32", scheduler=kind(owner, **options))

    return build


def _several(**options: Any) -> Callable[[], None]:
    def build() -> None:
        model = small_model()
        Engine(model, {"a": sgd(model[0]), "b": sgd(model[2])}, "fp32", **options)

    return build


def _policy_none() -> None:
    model = small_model()
    Engine(model, sgd(model), None)  # type: ignore[arg-type]


LR = torch.optim.lr_scheduler


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (_shared, "both hold parameter '2.weight'"),
        (_fp16_weights, "fp16 parameters"),
        (_options(accumulate=0), "accumulate=0"),
        (_options(accumulate=2.0), "accumulate=2.0"),
        (_options(clip_norm=0.0), r"clip_norm=0\.0"),
        (_options(clip_norm=float("nan")), "clip_norm=nan"),
        (_options(clip_norm="1"), "clip_norm='1'"),
        (_options(clip_norm=True), "clip_norm=True"),
        (_options(scale="dynamic"), "'dynamic' is not a loss scale"),
        (_options(scale=0.0), r"loss scale 0\.0"),
        (_options(max_consecutive_skips=0), "max_consecutive_skips=0"),
        (_options(ema=nn.Linear(1, 1)), "update_parameters"),
        (_options(ema=torch.optim.swa_utils.AveragedModel(nn.Linear(1, 1))), "EMA averages 2"),
        (_options(ema=3), "ema is a int"),
        (_scheduler(LR.ReduceLROnPlateau, own=True), "ReduceLROnPlateau.step needs metrics"),
        (_scheduler(LR.StepLR, own=False, step_size=1), "another optimizer"),
        (_several(scheduler=lambda: None), "several optimizers"),
        (lambda: Engine(small_model(), {}, "fp32"), "empty mapping"),
        (_policy_none, "the policy is None, a NoneType"),
        (lambda: Engine("model", sgd(small_model()), "fp32"), "a str stands where the model"),  # type: ignore[arg-type]
        (lambda: Engine(sgd(small_model()), small_model(), "fp32"), "SGD stands where the"),  # type: ignore[arg-type]
        (lambda: Engine(small_model(), "adam", "fp32"), "not a torch.optim.Optimizer"),  # type: ignore[arg-type]
    ],
)
def test_parts_that_do_not_fit_are_refused_with_a_hint(
    build: Callable[[], None], message: str
) -> None:
    """Before the first step, with the values in the message and a hint what to do."""
    with pytest.raises(UsageError, match=message) as caught:
        build()

    assert caught.value.hint


def test_names_are_checked_with_the_nearest_match() -> None:
    """Of optimizers, of evaluation precisions, of mappings."""
    model = small_model()
    engine = Engine(model, {"gen": sgd(model[0]), "dis": sgd(model[2])}, "fp32")

    with pytest.raises(UnknownName, match="did you mean 'gen'"):
        engine.step("gan")
    with pytest.raises(UsageError, match="which optimizer"):
        engine.step()
    with pytest.raises(UnknownName, match="did you mean 'dis'"):
        Engine(model, {"gen": sgd(model[0]), "dis": sgd(model[2])}, "fp32", ema={"bis": print})
    with pytest.raises(UnknownName, match="did you mean 'training'"), engine.evaluating("train"):  # type: ignore[arg-type]
        pass


def test_a_lane_whose_parameters_are_all_frozen_is_refused() -> None:
    """An empty list of inputs would mean all parameters to autograd."""
    model = small_model()
    engine = Engine(model, {"a": sgd(model[0]), "b": sgd(model[2])}, "fp32")
    model[0].requires_grad_(False)
    with engine.forward():
        loss = F.cross_entropy(model(X[0]), Y[0])

    with pytest.raises(UsageError, match="frozen"):
        engine.backward(loss, "a")


def test_sparse_bf16_gradients_cannot_be_summed_and_say_so() -> None:
    """Wide sums are dense; the hint keeps the embedding in fp32, and that works."""
    model = nn.Embedding(10, 4, sparse=True)
    refused = Engine(model, sgd(model), "bf16-true", accumulate=2)
    with refused.forward():
        loss = model(torch.tensor([1])).sum()
    with pytest.raises(UsageError, match="sparse"):
        refused.backward(loss)

    policy = Policy(name="mine", param="bf16", compute="bf16").keeping_fp32(nn.Embedding)
    model = nn.Embedding(10, 4, sparse=True)
    engine = Engine(model, sgd(model), policy, accumulate=2)
    for _ in range(2):
        with engine.forward():
            loss = model(torch.tensor([1])).sum()
        engine.backward(loss)
        report = engine.step()

    assert report.applied


def test_a_second_engine_of_another_policy_is_refused() -> None:
    """It would take the first one's casts away; the first works on as before."""
    engine, _ = one_step("bf16-true")

    with pytest.raises(UsageError, match="to an engine with precision 'bf16-true'") as caught:
        Engine(engine.model, sgd(engine.model), "fp32")

    assert caught.value.hint
    assert train_step(engine, 1).applied


def test_a_second_engine_of_the_same_policy_is_an_engine() -> None:
    """A notebook cell that is run again makes the same preparation again."""
    first, _ = one_step("bf16")

    second = Engine(first.model, sgd(first.model), "bf16")

    assert train_step(second, 1).applied


def test_a_model_whose_engine_is_gone_is_free() -> None:
    """Also while the dropped engine's cycle waits for the garbage collector."""
    engine, _ = one_step("bf16")
    model = engine.model
    del engine

    second = Engine(model, sgd(model), "fp32")

    assert train_step(second, 1).applied


def test_a_step_whose_scheduler_raises_was_applied() -> None:
    """The weights have moved, and the count says so."""
    model = small_model()
    optimizer = sgd(model)
    schedule = LR.OneCycleLR(optimizer, 0.1, total_steps=1)
    engine = Engine(model, optimizer, "fp32", scheduler=schedule)
    train_step(engine, 0)

    with pytest.raises(ValueError, match="total"):
        train_step(engine, 1)

    assert (engine.tried_steps(), engine.applied_steps()) == (2, 2)
