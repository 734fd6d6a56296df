"""The engine on a CUDA device: the same bits as the hand-written loop, one wait a step."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from narrowcast.engine.engine import Engine, StepReport
from small_training import OVERFLOW, X, Y, is_equal, small_model, weights

pytestmark = pytest.mark.gpu

CUDA = "cuda"
STEPS = 30


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def batch(i: int) -> tuple[Tensor, Tensor]:
    return X[i].to(CUDA), Y[i].to(CUDA)


def train_step(engine: Engine, i: int, factor: float = 1.0) -> StepReport:
    x, y = batch(i)
    with engine.forward():
        loss = F.cross_entropy(engine.model(x), y) * factor
    engine.backward(loss)
    return engine.step()


def plain_training(dtype: torch.dtype, factors: list[float], *, clip: float | None) -> nn.Module:
    """Return the model of the loop that people write, with torch's scaler where it is fp16."""
    model = small_model().to(CUDA)
    optimizer = adam(model)
    scaler = torch.amp.GradScaler(CUDA, enabled=dtype is torch.float16)
    for i, factor in enumerate(factors):
        x, y = batch(i)
        with torch.autocast(CUDA, dtype=dtype, enabled=dtype is not torch.float32):
            loss = F.cross_entropy(model(x), y) * factor
        scaler.scale(loss).backward()
        if clip is not None:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    return model


@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize(
    ("policy", "dtype"),
    [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)],
)
def test_weights_are_bitwise_those_of_the_plain_loop(
    policy: str, dtype: torch.dtype, clip: float | None
) -> None:
    """Thirty steps, one of which overflows in fp16, with and without clipping."""
    factors = [OVERFLOW if policy == "fp16" and i == 10 else 1.0 for i in range(STEPS)]
    model = small_model()
    model.to(CUDA)
    engine = Engine(model, adam(model), policy, clip_norm=clip)

    for i, factor in enumerate(factors):
        train_step(engine, i, factor)

    assert is_equal(model, plain_training(dtype, factors, clip=clip))
    assert len(engine.skips) == factors.count(OVERFLOW)


@pytest.mark.parametrize("policy", ["fp32", "bf16", "fp16"])
def test_a_step_waits_for_the_device_once(policy: str) -> None:
    """Forward, backward, check, clipping and step synchronise once, where the norm is read."""
    model = small_model()
    engine = Engine(model, adam(model), policy, device=CUDA, clip_norm=1e-3)
    for i in range(3):
        train_step(engine, i)
    x, y = batch(3)
    torch.cuda.synchronize()

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with engine.forward():
                loss = F.cross_entropy(model(x), y)
            engine.backward(loss)
            report = engine.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")

    waits = [w for w in caught if "synchronizing CUDA operation" in str(w.message)]
    assert report.applied
    assert len(waits) == 1


@pytest.mark.parametrize("policy", ["fp16", "bf16"])
def test_a_fused_optimizer_is_clipped_and_skipped_like_any_other(policy: str) -> None:
    """Gradients are unscaled and clipped before the fused kernel, which knows of no scale.

    One skipped step and one applied one: the kernels order their few roundings differently, which
    is an ulp of weights below 1 and of an update of 0.01. A scale or a clipping missed is 1e-4.
    """
    models = []
    for fused in (True, False):
        model = small_model().to(CUDA)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-2, fused=fused)
        engine = Engine(model, optimizer, policy, clip_norm=0.1)
        reports = [train_step(engine, i, (math.nan, 1.0)[i]) for i in range(2)]
        models.append(model)

        assert [r.applied for r in reports] == [False, True]

    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=2**-21)


def test_the_model_follows_to_the_device_and_the_optimizer_keeps_it() -> None:
    """An optimizer built on the CPU trains the model that the engine moved; so does the EMA."""
    model = small_model()
    optimizer = adam(model)
    average = torch.optim.swa_utils.AveragedModel(model)

    engine = Engine(model, optimizer, "bf16", device=CUDA, ema=average)
    before = weights(model)
    report = train_step(engine, 0)

    assert report.applied
    assert engine.device.type == "cuda"
    assert all(p.is_cuda for p in (*model.parameters(), *average.parameters()))
    assert not torch.equal(before[0], model[0].weight)


@pytest.mark.parametrize("policy", ["fp32", "bf16", "fp16", "bf16-true"])
def test_the_guard_and_the_report_hold_on_the_device(policy: str) -> None:
    """A NaN loss is skipped and named, the scale stays; the next step is applied."""
    model = small_model()
    engine = Engine(model, adam(model), policy, device=CUDA, accumulate=2)
    scale = 2.0**16 if policy == "fp16" else 1.0

    train_step(engine, 0)
    skipped = train_step(engine, 1, math.nan)
    train_step(engine, 2)
    applied = train_step(engine, 3)

    assert (skipped.applied, skipped.reason) == (False, "non-finite loss")
    assert skipped.parameters[0].startswith("2.")
    assert (applied.applied, applied.loss_scale) == (True, scale)
    assert 0 < applied.gradient_norm < 100


def test_two_losses_are_told_apart_on_the_device() -> None:
    """The overflow of one loss lowers its scale and not the other's."""
    model = small_model()
    engine = Engine(model, adam(model), "fp16", device=CUDA)
    x, y = batch(0)

    with engine.forward():
        logits = model(x).float()
        main, aux = F.cross_entropy(logits, y) * OVERFLOW, logits.pow(2).mean()
    engine.backward(main, retain_graph=True)
    engine.backward(aux, "aux")
    report = engine.step()

    assert (report.applied, report.loss) == (False, "loss")
    assert engine.loss_scales() == {"loss": 2.0**15, "aux": 2.0**16}


def test_fp32_multiplies_in_fp32_although_tf32_is_allowed_elsewhere() -> None:
    """TF32 (10 mantissa bits) is off inside the engine's passes and as before outside."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        model = nn.Linear(512, 512, bias=False)
        engine = Engine(model, torch.optim.SGD(model.parameters(), lr=0.0), "fp32", device=CUDA)
        x = torch.randn(256, 512, device=CUDA)
        with engine.forward():
            inside = model(x)
        outside = model(x)
        after = torch.backends.cuda.matmul.fp32_precision
    finally:
        torch.backends.cuda.matmul.fp32_precision = before

    exact = x.double() @ model.weight.double().t()
    # 512 products rounded to 2^-24 stay well below 2^-16; inputs rounded to 2^-11 do not.
    assert (inside - exact).abs().max() < 2**-16
    assert (outside - exact).abs().max() > 2**-14
    assert after == "tf32"


def test_evaluating_is_fp32_on_the_device() -> None:
    """Logits under evaluating() are those of an fp32 copy; in bf16 they would be 1e-3 away."""
    model = small_model()
    engine = Engine(model, adam(model), "bf16-true", device=CUDA)
    plain = small_model().to(CUDA)
    plain.load_state_dict({k: v.float() for k, v in model.state_dict().items()})
    x, _ = batch(0)

    with engine.evaluating() as label:
        logits = model(x)

    assert label == "fp32"
    torch.testing.assert_close(logits, plain(x), rtol=0, atol=1e-6)
