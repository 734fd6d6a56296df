"""Sparse gradients, folds and parameters that were numbers: predicted as they are measured."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from narrowcast.engine.engine import Engine
from narrowcast.engine.stores import planned_optimizer
from narrowcast.memory.measure import MemoryLedger
from narrowcast.plan import PLANS
from narrowcast.prediction.predict import predict_step_memory
from narrowcast.records.memory import MemoryRecord

# Adagrad makes sparse tensors without saying whether they are to be checked.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:Sparse invariant checks")]

CPU = torch.device("cpu")
Make = Callable[[nn.Module], Optimizer]


def loss_of(model: nn.Module, batch: Any) -> Tensor:
    return model(batch).float().square().mean()


def measured(
    make: Callable[[], nn.Module], optimizer: Make, batch: Tensor, plan: str
) -> MemoryRecord:
    torch.manual_seed(0)
    model = make()
    made = planned_optimizer(optimizer(model), model, PLANS[plan])
    engine = Engine(model, made, PLANS[plan], device=CPU)

    def step() -> None:
        with engine.forward():
            loss = loss_of(model, batch)
        engine.backward(loss)
        engine.step()

    step()
    step()
    ledger = MemoryLedger(model, made, device=CPU)
    with ledger:
        ledger.inputs(batch)
        step()
    return ledger.record()


def predicted(
    make: Callable[[], nn.Module], optimizer: Make, batch: Tensor, plan: str
) -> MemoryRecord:
    return predict_step_memory(make, optimizer, loss_of, batch, plan, break_even=False)


def sgd(model: nn.Module) -> Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


def sparse_adam(model: nn.Module) -> Optimizer:
    return torch.optim.SparseAdam(model.parameters(), lr=0.1)


def adamw(model: nn.Module) -> Optimizer:
    return torch.optim.AdamW(model.parameters(), fused=True)


def adagrad(model: nn.Module) -> Optimizer:
    return torch.optim.Adagrad(model.parameters(), lr=0.1)


class Table(nn.Module):
    """Looks every row up that is asked for, `times` times."""

    def __init__(self, rows: int, times: int = 1) -> None:
        super().__init__()
        self.table = nn.Embedding(rows, 64, sparse=True)
        self.times = times

    def forward(self, x: Tensor) -> Tensor:
        return sum(self.table(x + i).mean(1) for i in range(self.times))  # type: ignore[return-value]


class Bag(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.EmbeddingBag(100, 64, sparse=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.table(x)


INDICES = torch.arange(16 * 32).reshape(16, 32) % 90


@pytest.mark.parametrize("optimizer", [sgd, sparse_adam, adagrad], ids=lambda o: o.__name__)
@pytest.mark.parametrize("make", [lambda: Table(100), lambda: Table(100, 2), Bag])
def test_sparse_gradients_take_what_is_measured(
    make: Callable[[], nn.Module], optimizer: Make
) -> None:
    """To the byte: every index has an element, and a sum or a coalesced copy room for all."""
    real, told = (ledger(make, optimizer, INDICES, "fp32") for ledger in (measured, predicted))

    assert told.total_peak_bytes == real.total_peak_bytes
    assert told.lines == real.lines


@pytest.mark.parametrize("optimizer", [sgd, sparse_adam, adagrad], ids=lambda o: o.__name__)
def test_of_indices_that_repeat_the_prediction_is_an_upper_bound(optimizer: Make) -> None:
    """How many of 512 indices into 5,000 rows differ is in their values: 90 of them do here."""
    real, told = (
        ledger(lambda: Table(5000), optimizer, INDICES, "fp32") for ledger in (measured, predicted)
    )

    assert real.total_peak_bytes <= told.total_peak_bytes <= 1.15 * real.total_peak_bytes


class Convolved(nn.Module):
    """A convolution, and what is done to its result."""

    def __init__(self, then: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 16, 3, padding=1)
        self.then = then

    def forward(self, x: Tensor) -> Tensor:
        return self.then(self.conv(x))


FOLDS: dict[str, Callable[[Tensor], Tensor]] = {
    "unfold": lambda h: F.unfold(h, 3),
    "unfold less than there is": lambda h: F.unfold(h, 2, stride=4),
    "fold": lambda h: F.fold(h.flatten(2)[:, :1].expand(-1, 9, -1)[..., :900], (32, 32), 3),
    "fold into more": lambda h: F.fold(h.flatten(2)[:, :4, :64], (32, 32), 2, stride=4),
    "unfold one sample": lambda h: F.unfold(h[0], 3),
}


@pytest.mark.parametrize("plan", ["fp32", "bf16", "lean"])
@pytest.mark.parametrize("then", FOLDS.values(), ids=FOLDS)
def test_unfold_and_fold_take_what_is_measured(then: Callable[[Tensor], Tensor], plan: str) -> None:
    """To the byte: on a CPU the result keeps the storage of an input that is larger."""
    images = torch.zeros(16, 1, 32, 32, dtype=torch.bfloat16 if plan == "lean" else torch.float32)
    real, told = (
        ledger(lambda: Convolved(then), adamw, images, plan) for ledger in (measured, predicted)
    )

    assert told.total_peak_bytes == real.total_peak_bytes


class Scaled(nn.Module):
    """Has a parameter and a buffer that were numbers, such as the logit scale of CLIP."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.register_buffer("shift", torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * self.scale + self.shift


@pytest.mark.parametrize("plan", ["fp32", "bf16", "bf16-split", "lean"])
def test_a_parameter_that_was_a_number_has_the_format_of_its_store(plan: str) -> None:
    """And not, in every view of it, that of the number."""
    dtype = torch.float32 if PLANS[plan].policy.param == "fp32" else torch.bfloat16
    batch = torch.zeros(4, 8, dtype=dtype)
    real, told = (ledger(Scaled, adamw, batch, plan) for ledger in (measured, predicted))

    assert told.total_peak_bytes == real.total_peak_bytes
