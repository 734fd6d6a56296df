"""The engine against the loops that people write by hand; its contexts and its report."""

from __future__ import annotations

import copy
import runpy
from collections.abc import Callable, Iterator
from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from narrowcast.engine.engine import Engine
from narrowcast.errors import UnknownName
from narrowcast.policy import POLICIES
from narrowcast.scaling.scales import StaticScale
from small_training import (
    OVERFLOW,
    STEPS,
    X,
    Y,
    adam,
    is_equal,
    one_step,
    sgd,
    small_model,
    train_step,
)


@pytest.mark.parametrize("make", [sgd, adam])
@pytest.mark.parametrize("clip", [None, 0.5])
def test_fp32_is_bitwise_the_plain_loop(
    make: Callable[[nn.Module], torch.optim.Optimizer], clip: float | None
) -> None:
    """In fp32 the engine adds a check and changes no bit, with clipping as torch's too."""
    ours, theirs = small_model(), small_model()
    engine = Engine(ours, make(ours), "fp32", clip_norm=clip)
    optimizer = make(theirs)

    for i in range(STEPS):
        train_step(engine, i)
        F.cross_entropy(theirs(X[i]), Y[i]).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(theirs.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()

    assert is_equal(ours, theirs)


@pytest.mark.parametrize(("policy", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
@pytest.mark.parametrize("clip", [None, 0.5])
def test_mixed_precision_is_bitwise_the_torch_amp_loop(
    policy: str, dtype: torch.dtype, clip: float | None
) -> None:
    """Weights and scale equal torch.amp's with GradScaler over 50 steps, one of which overflows."""
    ours, theirs = small_model(), small_model()
    engine = Engine(ours, adam(ours), policy, clip_norm=clip)
    optimizer = adam(theirs)
    scaler = torch.amp.GradScaler("cpu", enabled=policy == "fp16")
    factors = [OVERFLOW if policy == "fp16" and i == 20 else 1.0 for i in range(STEPS)]

    for i, factor in enumerate(factors):
        train_step(engine, i, factor)
        with torch.autocast("cpu", dtype=dtype):
            loss = F.cross_entropy(theirs(X[i]), Y[i]) * factor
        scaler.scale(loss).backward()
        if clip is not None:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(theirs.parameters(), clip)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    assert is_equal(ours, theirs)
    assert len(engine.skips) == factors.count(OVERFLOW)
    assert engine.loss_scales() == {"loss": scaler.get_scale()}


def test_the_public_and_the_private_backward_write_the_same_gradients(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where torch's internal entry is missing, its public function does the same."""
    fast, slow = small_model(), small_model()
    train_step(Engine(fast, sgd(fast), "fp16"), 0)
    monkeypatch.setattr("narrowcast.engine.gradients._RUN_BACKWARD", None)

    train_step(Engine(slow, sgd(slow), "fp16"), 0)

    assert is_equal(fast, slow)


def test_a_report_is_a_frozen_value() -> None:
    """Reports compare by value and cannot be changed."""
    _, report = one_step()

    assert report == replace(report)
    with pytest.raises(FrozenInstanceError):
        report.applied = False  # type: ignore[misc]


@pytest.mark.parametrize("policy", ["fp32", "bf16", "fp16", "bf16-true"])
def test_evaluating_is_fp32_from_the_stored_weights(policy: str) -> None:
    """Logits are those of the stored weights widened to fp32; modes are restored one by one."""
    engine, _ = one_step(policy)
    model = engine.model
    model[1].eval()
    plain = copy.deepcopy(small_model())
    plain.load_state_dict({k: v.float() for k, v in model.state_dict().items()})

    with engine.evaluating() as label:
        logits = model(X[1])
        modes = [m.training for m in model.modules()]

    assert label == "fp32"
    assert torch.equal(logits, plain(X[1]))
    assert not logits.requires_grad
    assert modes == [False] * 4
    assert [m.training for m in model.modules()] == [True, True, False, True]


def test_evaluating_in_training_precision_is_labelled() -> None:
    """Under the policy's autocast a matrix product is in bf16, and the label says so."""
    engine, _ = one_step("bf16")

    with engine.evaluating("training") as label:
        product = engine.model[0](X[1])

    assert (label, product.dtype) == ("bf16", torch.bfloat16)


def test_evaluating_another_model_leaves_the_trained_one_in_its_mode() -> None:
    """An EMA is evaluated under the same rules."""
    engine, _ = one_step()
    other = small_model()

    with engine.evaluating(model=other):
        inside = (other.training, engine.model.training)

    assert inside == (False, True)
    assert other.training


def test_auto_is_resolved_and_explained() -> None:
    """'auto' becomes a policy of the device, with the reason; aliases of peers work."""
    model = small_model()

    auto = Engine(model, sgd(model), "auto")
    alias = Engine(model, sgd(model), "bf16-mixed")

    assert auto.policy.name in POLICIES
    assert len(auto.policy_reason) > 20
    assert alias.policy == POLICIES["bf16"]
    with pytest.raises(UnknownName, match="fp61"):
        Engine(model, sgd(model), "fp61")


@pytest.fixture
def reduced_matmul() -> Iterator[None]:
    """The process lets oneDNN multiply fp32 matrices in bf16."""
    before = torch._C._get_fp32_precision_getter("mkldnn", "matmul")
    torch._C._set_fp32_precision_setter("mkldnn", "matmul", "bf16")
    yield
    torch._C._set_fp32_precision_setter("mkldnn", "matmul", before)


@pytest.mark.usefixtures("reduced_matmul")
def test_fp32_holds_although_the_process_allows_less() -> None:
    """Reduced precision is off inside forward, backward and step, and as it was in between."""

    def note(*_: object) -> None:
        seen.append(torch._C._get_fp32_precision_getter("mkldnn", "matmul"))

    seen: list[str] = []
    model = nn.Linear(4, 4)
    optimizer = sgd(model)
    engine = Engine(model, optimizer, "fp32")
    model.weight.register_hook(note)
    optimizer.register_step_pre_hook(note)

    with engine.forward():
        note()
        loss = model(torch.ones(1, 4)).sum()
    note()
    engine.backward(loss)
    engine.step()
    note()

    assert seen == ["ieee", "bf16", "ieee", "ieee", "bf16"]


def test_a_scalar_parameter_as_loss_keeps_the_seed_intact() -> None:
    """Backward from a leaf must not hand the engine's own seed out as a gradient to be changed."""
    model = nn.Module()
    model.w = nn.Parameter(torch.tensor(2.0))
    engine = Engine(model, torch.optim.SGD([model.w], lr=1.0), "fp16", scale=StaticScale(scale=4.0))

    for _ in range(3):
        with engine.forward():
            loss = model.w * 1
        engine.backward(loss)
        engine.step()

    assert model.w.item() == -1.0


def test_the_two_example_loops_train_the_same_weights(capsys: pytest.CaptureFixture[str]) -> None:
    """examples/plain_loop: engine.py is torch_amp.py with an engine, bit for bit."""
    examples = Path(__file__).parents[2] / "examples" / "plain_loop"

    plain, ours = (runpy.run_path(str(examples / f"{n}.py")) for n in ("torch_amp", "engine"))

    assert is_equal(plain["model"], ours["model"])
    first, second = capsys.readouterr().out.splitlines()
    assert first == second


def test_cudas_cast_lists_are_rehearsed_in_forward_and_backward() -> None:
    """On a CPU softmax returns fp32 under CUDA's rules and bf16 under the CPU's own."""
    seen = []
    for rules in ("native", "cuda"):
        model = small_model()
        policy = replace(POLICIES["bf16"], autocast_rules=rules)
        engine = Engine(model, sgd(model), policy, device="cpu")
        with engine.forward():
            probabilities = model(X[0].to(engine.device)).softmax(-1)
        engine.backward(probabilities.float().pow(2).sum())
        seen.append((probabilities.dtype, engine.step().applied))

    assert seen == [(torch.bfloat16, True), (torch.float32, True)]
