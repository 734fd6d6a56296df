"""A model, data and steps small enough for any test of the engine, the same in each."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from narrowcast.engine.engine import Engine, StepReport

STEPS = 50
X = torch.randn(STEPS, 8, 16, generator=torch.Generator().manual_seed(1))
Y = torch.randint(0, 4, (STEPS, 8), generator=torch.Generator().manual_seed(2))

OVERFLOW = 1e36
"""A factor on the loss that leaves it finite and makes gradients scaled by 65,536 infinite."""


def small_model() -> nn.Sequential:
    """Return the MLP 16-16-4, with the same weights at each call."""
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def sgd(model: nn.Module, lr: float = 0.1) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=lr)


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def is_equal(a: nn.Module, b: nn.Module) -> bool:
    """Whether two models hold the same weights, bit for bit."""
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def holds(model: nn.Module, before: list[Tensor]) -> bool:
    """Whether a model still has the weights that it had."""
    return all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def train_step(engine: Engine, i: int, factor: float = 1.0) -> StepReport:
    """Make one micro-batch of batch `i`, its loss multiplied by `factor`."""
    with engine.forward():
        loss = F.cross_entropy(engine.model(X[i]), Y[i]) * factor
    engine.backward(loss)
    return engine.step()


def one_step(
    policy: str = "fp32", factor: float = 1.0, **options: Any
) -> tuple[Engine, StepReport]:
    """Make one step of a new engine with SGD."""
    model = small_model()
    engine = Engine(model, sgd(model), policy, **options)
    return engine, train_step(engine, 0, factor)


def require_average_in_fp32(policy: str) -> None:
    """Skip where torch cannot average bf16 weights in fp32: AveragedModel of torch 2.11 raises."""
    if policy != "bf16-true":
        return
    model = nn.Linear(1, 1)
    average = torch.optim.swa_utils.AveragedModel(model)
    model.bfloat16()
    try:
        for _ in range(2):  # the first time it copies
            average.update_parameters(model)
    except RuntimeError as error:
        pytest.skip(f"torch {torch.__version__}: {error}")
