"""Fabric and Accelerate take our GradScaler for torch's and train to the same bits with it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import narrowcast

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # of the peers' own making
]
SCALERS = [torch.amp.GradScaler, narrowcast.GradScaler]
STEPS, OVERFLOW_AT = 8, 3


def model_and_data() -> tuple[nn.Module, torch.optim.Optimizer, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    return model, optimizer, torch.randn(STEPS, 16, 6), torch.randint(0, 3, (STEPS, 16))


def assert_same_bits(first: Any, second: Any) -> None:
    pairs = zip(first.state_dict().values(), second.state_dict().values(), strict=True)

    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("clip", [False, True])
def test_fabric_trains_with_it(clip: bool) -> None:
    """As the scaler of its MixedPrecision plugin, with its clipping, and with one skipped step."""
    fabric_module = pytest.importorskip("lightning_fabric")
    from lightning_fabric.plugins.precision import MixedPrecision

    trained = []
    for scaler_class in SCALERS:
        scaler = scaler_class("cpu", growth_interval=2)
        precision = MixedPrecision("16-mixed", "cpu", scaler=scaler)
        fabric = fabric_module.Fabric(accelerator="cpu", devices=1, plugins=[precision])
        plain_model, plain_optimizer, inputs, targets = model_and_data()
        model, optimizer = fabric.setup(plain_model, plain_optimizer)
        for i in range(STEPS):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(inputs[i]), targets[i])
            fabric.backward(loss)
            if i == OVERFLOW_AT:
                plain_model[0].weight.grad[0, 0] = math.inf
            if clip:
                fabric.clip_gradients(model, optimizer, max_norm=0.1, error_if_nonfinite=False)
            optimizer.step()
        trained.append((plain_model, precision))

    (torch_model, torch_precision), (our_model, our_precision) = trained
    assert_same_bits(torch_model, our_model)
    assert [skip.step for skip in our_precision.scaler.skips] == [OVERFLOW_AT + 1]
    assert our_precision.scaler.skips[0].reason == "gradient overflow"
    assert our_precision.state_dict().items() >= torch_precision.state_dict().items()
    torch_precision.load_state_dict(our_precision.state_dict())


def test_accelerate_trains_with_it(tmp_path: Path) -> None:
    """As `accelerator.scaler`: skipped steps are noticed, its checkpoints hold our state."""
    accelerate = pytest.importorskip("accelerate")

    trained = []
    for scaler_class in SCALERS:
        accelerator = accelerate.Accelerator(cpu=True)
        accelerator.scaler = scaler_class("cpu", growth_interval=2)
        model, optimizer, inputs, targets = model_and_data()
        model, optimizer = accelerator.prepare(model, optimizer)
        skipped = []
        for i in range(STEPS):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(inputs[i]), targets[i])
            accelerator.backward(loss)
            if i == OVERFLOW_AT:
                accelerator.unwrap_model(model)[0].weight.grad[0, 0] = math.inf
            accelerator.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            skipped.append(accelerator.optimizer_step_was_skipped)
        trained.append((model, skipped))

    (torch_model, torch_skipped), (our_model, our_skipped) = trained
    assert_same_bits(torch_model, our_model)
    assert our_skipped == torch_skipped == [i == OVERFLOW_AT for i in range(STEPS)]

    accelerator.save_state(str(tmp_path))
    saved = accelerator.scaler.state_dict()
    accelerator.scaler.update(2.0)
    accelerator.load_state(str(tmp_path))
    assert accelerator.scaler.state_dict() == saved
    assert [skip.step for skip in accelerator.scaler.skips] == [OVERFLOW_AT + 1]
