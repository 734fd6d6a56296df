"""Small models with every kind of thing that a replay must follow, and planted failures."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from narrowcast.engine.engine import Engine
from narrowcast.engine.stores import planned_optimizer
from narrowcast.plan import plan_named
from narrowcast.records.diagnosis import ExecutedOp

Batch = tuple[Tensor, Tensor]


class Block(nn.Module):
    """Draws random numbers and writes buffers in forward, as real blocks do."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)
        self.drop = nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(self.down(F.gelu(self.up(self.norm(x)))))  # type: ignore[no-any-return]


class Net(nn.Module):
    """Two blocks, a head that lean takes for one, and a buffer that is written where asked."""

    def __init__(self, width: int = 16, classes: int = 40, *, counts: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width) for _ in range(2))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)
        self.counts = counts
        self.register_buffer("seen", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        if self.counts and self.training:
            self.seen.add_(0.25)
        return self.head(self.norm(x))  # type: ignore[no-any-return]


def batch(seed: int = 1, rows: int = 8, width: int = 16) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(rows, width, generator=generator)
    return inputs, torch.randint(40, (rows,), generator=generator)


def compute_loss(model: nn.Module, batch: Batch) -> Tensor:
    inputs, targets = batch
    return F.cross_entropy(model(inputs), targets)


def engine_of(precision: Any, model: nn.Module | None = None, **options: Any) -> Engine:
    """Build an engine in a precision by name (or plan), as a training assembles it."""
    plan = plan_named(precision) if isinstance(precision, str) else precision
    if model is None:
        torch.manual_seed(0)
        model = Net()
    optimizer = planned_optimizer(torch.optim.AdamW(model.parameters(), lr=1e-2), model, plan)
    return Engine(model, optimizer, plan, **options)


class Checkpointed(nn.Module):
    """Recomputes a module, and a function of none, as torch's checkpoint does."""

    def __init__(self, *, use_reentrant: bool = False) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
        self.use_reentrant = use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = checkpoint(self.inner, x, use_reentrant=self.use_reentrant)
        return checkpoint(twice_exp, x, use_reentrant=self.use_reentrant)  # type: ignore[no-any-return]


def twice_exp(x: Tensor) -> Tensor:
    return x.sin().exp()  # recomputed


class Square(torch.autograd.Function):
    """The user's own backward."""

    @staticmethod
    def forward(context: Any, x: Tensor) -> Tensor:
        context.save_for_backward(x)
        return x * x  # own forward

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> Tensor:
        (x,) = context.saved_tensors
        return 2 * gradients[0] * x  # own backward


def attention(model: nn.Module, x: Tensor) -> Tensor:
    """Scores with a mask of -inf, as everybody writes it."""
    scores = model(x)[:, :, None] * model(x)[:, None, :]
    mask = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
    return scores.masked_fill(mask, -math.inf).softmax(-1).square().mean()


def at(op: ExecutedOp) -> tuple[str, str, str]:
    """Return where an operation stands: phase, module and line of code."""
    return op.phase, op.module, op.code
