"""Small trainings with one planted fault each, and healthy ones that look as if they had one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from narrowcast.diagnosis.diagnose import diagnose_training
from narrowcast.records.diagnosis import DiagnosisRecord

WIDTH = 16
Batch = tuple[Tensor, Tensor]


class Net(nn.Module):
    """A layer, something in the middle, and a layer."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.stem = nn.Linear(4, WIDTH)
        self.body = body
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.stem(x))).squeeze(-1)  # type: ignore[no-any-return]


def plain() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH))


class Strong(nn.Module):
    """Two layers of which the outputs are beyond fp16, and normalised afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH, elementwise_affine=False)
        for layer in (self.first, self.second):
            with torch.no_grad():
                layer.weight.mul_(2e5)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.norm(self.first(x))
        return x + self.norm(self.second(x))


class Epsilon(nn.Module):
    """Divides by a norm that is 0 for some columns, and an epsilon that fp16 does not hold."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("mask", (torch.arange(WIDTH) > 3).float(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(x) * self.mask.to(x.dtype)
        return y / (y.abs().amax(0, keepdim=True) + 1e-8)


class Filled(nn.Module):
    """A mask of a number that torch refuses to convert to fp16."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.project(x)
        return x + scores.masked_fill(scores < 0, -1e9).softmax(-1)


class EdgeMask(nn.Module):
    """The smallest number of the dtype as a mask, on which a score is added: minus infinity."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.project(x) * 100 - 100
        hidden = torch.zeros_like(scores, dtype=torch.bool)
        hidden[0] = True
        mask = torch.zeros_like(scores).masked_fill(hidden, torch.finfo(scores.dtype).min)
        return x + (scores + mask).softmax(-1)


class Clock(nn.Module):
    """Waves of a count of seconds."""

    def __init__(self, start: int = 4096) -> None:
        super().__init__()
        self.start = start
        self.register_buffer("frequencies", 2 * torch.pi / torch.tensor([4.0, 8.0] * (WIDTH // 2)))

    def forward(self, x: Tensor) -> Tensor:
        seconds = torch.arange(self.start, self.start + len(x)).float()[:, None]
        return x + (seconds @ self.frequencies[None, :].float()).sin()


class Loop(nn.Module):
    """Adds the same up many times."""

    def __init__(self, times: int = 600) -> None:
        super().__init__()
        self.times = times
        self.project = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        reading = torch.sigmoid(self.project(x))
        total = torch.zeros_like(reading)
        for _ in range(self.times):
            total = total + reading
        return total / self.times


class Average(nn.Module):
    """Subtracts a running mean that moves by a five-hundredth of the way."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.full((WIDTH,), 4.0))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.mean.mul_(0.998).add_(0.002 * x.mean(0))
        return x - self.mean


class Unseeded(nn.Module):
    """Adds noise that no seed decides."""

    def forward(self, x: Tensor) -> Tensor:
        noise = np.random.default_rng().normal(size=WIDTH)
        return x + torch.from_numpy(noise).to(x.dtype)


class Counting(nn.Module):
    """Counts its calls in a plain attribute, and computes with the count."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * (1 + self.calls / 10)


class Adapter(nn.Module):
    """A frozen layer with a low-rank addition that begins at 0."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.down, self.up = nn.Linear(WIDTH, 4, bias=False), nn.Linear(4, WIDTH, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))  # type: ignore[no-any-return]


class Masked(nn.Module):
    """Causal attention: its mask is made of infinities that are meant."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x.view(2, -1, WIDTH)).chunk(3, -1)
        scores = q @ k.transpose(1, 2) / 4
        future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        weights = scores.masked_fill(future, float("-inf")).softmax(-1)
        return x + self.out((weights @ v).reshape(-1, WIDTH))  # type: ignore[no-any-return]


class Rows(nn.Module):
    """An embedding of which a batch reads a few rows."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.table((x[:, 0].float() * 3).long().abs() % 50)  # type: ignore[no-any-return]


class TwoTasks(nn.Module):
    """Two heads; the loss weighs the second next to nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.main, self.side = nn.Linear(4, 1), nn.Linear(4, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.main(x), self.side(x)], dim=1)


def batches(count: int = 20, *, size: int = 8, scale: float = 1.0) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    inputs = [torch.randn(size, 4, generator=generator) for _ in range(count)]
    return [(x * scale, x.sum(1).sin()) for x in inputs]


def squares(model: nn.Module, batch: Batch) -> Tensor:
    return F.mse_loss(model(batch[0]).float(), batch[1])


def two_losses(model: nn.Module, batch: Batch) -> Tensor:
    out = model(batch[0]).float()
    return F.mse_loss(out[:, 0], batch[1]) + 1e-13 * out[:, 1:].square().mean()


def adam(lr: float = 3e-3) -> Callable[[nn.Module], torch.optim.Optimizer]:
    def make(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr)

    return make


def diagnosed(
    body: Callable[[], nn.Module] = plain,
    precision: Any = "fp16",
    *,
    steps: int = 20,
    loss: Callable[[nn.Module, Batch], Tensor] = squares,
    lr: float = 3e-3,
    data: list[Batch] | None = None,
    model: Callable[[], nn.Module] | None = None,
    **more: Any,
) -> DiagnosisRecord:
    """Diagnose a net with such a body, or another model."""
    return diagnose_training(
        model or (lambda: Net(body())),
        adam(lr),
        loss,
        batches(steps) if data is None else data,
        precision,
        steps=steps,
        **more,
    )
