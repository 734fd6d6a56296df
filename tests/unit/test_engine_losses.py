"""Several losses, several optimizers: each has its own scale, and gradients do not get mixed."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from narrowcast.engine.engine import Engine
from narrowcast.scaling.scales import DynamicScale, StaticScale
from small_training import OVERFLOW, X, Y, holds, is_equal, sgd, small_model, weights

NOISE = torch.randn(20, 8, 4, generator=torch.Generator().manual_seed(5))
REAL = torch.randn(20, 8, 6, generator=torch.Generator().manual_seed(6))


def gan() -> nn.ModuleDict:
    torch.manual_seed(7)
    return nn.ModuleDict(
        {
            "g": nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 6)),
            "d": nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 1)),
        }
    )


def optimizers(model: nn.ModuleDict) -> dict[str, torch.optim.Optimizer]:
    return {name: torch.optim.Adam(part.parameters(), lr=1e-2) for name, part in model.items()}


def judged(model: nn.ModuleDict, samples: Tensor, truth: float) -> Tensor:
    verdict = model["d"](samples)
    return F.binary_cross_entropy_with_logits(verdict, torch.full_like(verdict, truth))


def train_gan(engine: Engine, i: int, g_factor: float = 1.0) -> list[Any]:
    """Train as everybody does: the discriminator, then the generator through it."""
    model = engine.model
    with engine.forward():
        fake = model["g"](NOISE[i])
        d_loss = judged(model, REAL[i], 1.0) + judged(model, fake.detach(), 0.0)
    engine.backward(d_loss, "d")
    d_report = engine.step("d")
    with engine.forward():
        g_loss = judged(model, fake, 1.0) * g_factor
    engine.backward(g_loss, "g")
    return [d_report, engine.step("g")]


def reference_gan(steps: int) -> nn.ModuleDict:
    """Return the plain fp32 GAN; both sets of gradients are dropped before each backward."""
    model = gan()
    parts = optimizers(model)
    for i in range(steps):
        fake = model["g"](NOISE[i])
        for name in ("d", "g"):
            loss = (
                judged(model, REAL[i], 1.0) + judged(model, fake.detach(), 0.0)
                if name == "d"
                else judged(model, fake, 1.0)
            )
            model.zero_grad()
            loss.backward()
            parts[name].step()
    return model


def test_a_gan_with_two_scales_is_bitwise_the_fp32_gan() -> None:
    """Scales 2^10 and 2^-3 are exact in fp32, so any gradient of the wrong scale would show."""
    model = gan()
    scales = {"g": StaticScale(scale=2.0**10), "d": StaticScale(scale=2.0**-3)}
    engine = Engine(model, optimizers(model), "fp32", scale=scales)

    for i in range(20):
        train_gan(engine, i)

    assert is_equal(model, reference_gan(20))


def test_the_generators_backward_leaves_no_gradient_in_the_discriminator() -> None:
    """`backward(loss, "g")` writes into parameters of optimizer "g" only."""
    model = gan()
    engine = Engine(model, optimizers(model), "fp16")
    with engine.forward():
        loss = judged(model, model["g"](NOISE[0]), 1.0)

    engine.backward(loss, "g")

    assert all(p.grad is not None for p in model["g"].parameters())
    assert all(p.grad is None for p in model["d"].parameters())


def test_both_backwards_before_both_steps_are_kept_apart() -> None:
    """Joint training: pending gradients of one optimizer survive the other's backward and step."""
    model, other = gan(), gan()
    engine = Engine(model, optimizers(model), "fp32", scale={"g": 2.0**10, "d": 2.0**-3})
    parts = optimizers(other)

    for i in range(5):
        with engine.forward():
            fake = model["g"](NOISE[i])
            d_loss = judged(model, REAL[i], 1.0) + judged(model, fake, 0.0)
            g_loss = judged(model, fake, 1.0)
        engine.backward(d_loss, "d", retain_graph=True)
        engine.backward(g_loss, "g")
        engine.step("d")
        engine.step("g")
        fake = other["g"](NOISE[i])
        losses = {
            "d": judged(other, REAL[i], 1.0) + judged(other, fake, 0.0),
            "g": judged(other, fake, 1.0),
        }
        for name, loss in losses.items():
            own = list(other[name].parameters())
            for p, gradient in zip(
                own, torch.autograd.grad(loss, own, retain_graph=True), strict=True
            ):
                p.grad = gradient
        for name in losses:
            parts[name].step()

    assert is_equal(model, other)


def test_an_overflow_of_the_generator_lowers_its_scale_only() -> None:
    """The discriminator steps, keeps its scale and its count; the generator is skipped."""
    model = gan()
    engine = Engine(model, optimizers(model), "fp16")
    before = weights(model["g"])

    d_report, g_report = train_gan(engine, 0, g_factor=OVERFLOW)

    assert d_report.applied
    assert (g_report.applied, g_report.reason) == (False, "gradient overflow")
    assert engine.loss_scales("d") == {"d": 2.0**16}
    assert engine.loss_scales("g") == {"g": 2.0**15}
    assert (engine.applied_steps("d"), engine.applied_steps("g")) == (1, 0)
    assert holds(model["g"], before)
    assert all(name.startswith("g.") for name in g_report.parameters)


def test_an_fp16_gan_stays_near_the_fp32_gan() -> None:
    """After 20 Adam steps of 0.01 the weights differ by a fraction of the way that they went.

    Each could have moved by 0.2 at most; fp16's rounding (2^-11) of gradients may turn the sign of
    single small updates, but not of the direction: a twentieth of the way is allowed on average.
    """
    model = gan()
    engine = Engine(model, optimizers(model), "fp16")

    for i in range(20):
        train_gan(engine, i)

    pairs = zip(model.parameters(), reference_gan(20).parameters(), strict=True)
    mean = torch.cat([(p - q).abs().flatten() for p, q in pairs]).mean().item()
    assert 0 < mean < 0.2 / 20


def test_a_discriminator_outside_the_model_may_be_trained() -> None:
    """With several optimizers, one may hold a module that is not the engine's."""
    model = gan()
    engine = Engine(model["g"], optimizers(model), "fp16")
    before = weights(model["d"])

    with engine.forward():
        loss = judged(model, REAL[0], 1.0)
    engine.backward(loss, "d")
    report = engine.step("d")

    assert report.applied
    assert not holds(model["d"], before)


def two_losses(engine: Engine, i: int, main: float = 1.0, aux: float = 1.0) -> Any:
    with engine.forward():
        logits = engine.model(X[i]).float()
        losses = F.cross_entropy(logits, Y[i]) * main, logits.pow(2).mean() * aux
    engine.backward(losses[0], retain_graph=True)
    engine.backward(losses[1], name="aux")
    return engine.step()


def test_two_losses_with_two_scales_add_up_exactly() -> None:
    """Rescaling what is pending by a power of two makes the sum bitwise the unscaled one."""
    model, plain = small_model(), small_model()
    scales = {"loss": StaticScale(scale=2.0**12), "aux": StaticScale(scale=2.0**-2)}
    engine = Engine(model, sgd(model), "fp32", scale=scales)
    optimizer = sgd(plain)

    for i in range(20):
        two_losses(engine, i)
        logits = plain(X[i])
        F.cross_entropy(logits, Y[i]).backward(retain_graph=True)
        logits.pow(2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    assert is_equal(model, plain)


@pytest.mark.parametrize("guilty", ["loss", "aux"])
def test_an_overflow_is_attributed_to_the_loss_that_made_it(guilty: str) -> None:
    """Only the guilty loss's scale goes down, though both write into the same gradients."""
    model = small_model()
    engine = Engine(model, sgd(model), "fp16")
    before = weights(model)

    report = two_losses(
        engine, 0, *(OVERFLOW if name == guilty else 1.0 for name in ("loss", "aux"))
    )

    expected = {name: 2.0**15 if name == guilty else 2.0**16 for name in ("loss", "aux")}
    assert (report.applied, report.reason, report.loss) == (False, "gradient overflow", guilty)
    assert engine.loss_scales() == expected
    assert holds(model, before)


def test_a_nan_in_one_loss_moves_neither_scale() -> None:
    """The NaN came from the forward pass, so no scale is to blame."""
    model = small_model()
    engine = Engine(model, sgd(model), "fp16")

    report = two_losses(engine, 0, aux=math.nan)

    assert (report.reason, report.loss) == ("non-finite loss", "aux")
    assert engine.loss_scales() == {"loss": 2.0**16, "aux": 2.0**16}


def test_each_loss_grows_its_scale_by_its_own_steps() -> None:
    """A loss that takes part in every second step grows half as often."""
    model = small_model()
    engine = Engine(model, sgd(model), "fp16", scale=DynamicScale(scale=8.0, interval=2))

    for i in range(4):
        with engine.forward():
            logits = model(X[i])
            main, aux = F.cross_entropy(logits, Y[i]), logits.pow(2).mean()
        engine.backward(main, retain_graph=True)
        if i % 2:
            engine.backward(aux, "aux")
        engine.step()

    assert engine.loss_scales() == {"loss": 32.0, "aux": 16.0}


def test_a_loss_on_one_of_several_optimizers_has_a_scale_of_its_own() -> None:
    """`optimizer=` says where a named loss belongs."""
    model = gan()
    engine = Engine(model, optimizers(model), "fp16", scale={"penalty": 4.0})

    with engine.forward():
        loss, penalty = judged(model, REAL[0], 1.0), model["d"](REAL[0]).pow(2).mean()
    engine.backward(loss, "d")
    engine.backward(penalty, "penalty", optimizer="d")
    report = engine.step("d")

    assert report.applied
    assert engine.loss_scales("d") == {"d": 2.0**16, "penalty": 4.0}


def test_schedulers_and_emas_are_given_by_optimizer() -> None:
    """Each follows the applied steps of its own optimizer."""
    model = gan()
    parts = optimizers(model)
    halving = torch.optim.lr_scheduler.StepLR(parts["g"], step_size=1, gamma=0.5)
    calls: list[str] = []
    engine = Engine(
        model,
        parts,
        "fp16",
        scheduler={"g": halving},
        ema={"d": lambda _: calls.append("d")},
    )

    train_gan(engine, 0)
    train_gan(engine, 1, g_factor=OVERFLOW)

    assert parts["g"].param_groups[0]["lr"] == 5e-3
    assert parts["d"].param_groups[0]["lr"] == 1e-2
    assert calls == ["d", "d"]
