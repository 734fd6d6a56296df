"""Regression on a table by a residual MLP."""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Subset, TensorDataset

HIGHER_IS_BETTER = {"error": False}
COLUMNS = 8


@dataclass
class Options:
    fault: Literal[
        "none",
        "strong",
        "two_strong",
        "strong_but_clamped",
        "strong_but_finite",
        "bend",
        "bend_without_gradient",
        "unscaled_column",
        "faint",
        "quotient",
        "second_task",
        "rising_weight",
        "falling_weight",
        "loud",
        "dropout",
        "zero_init",
        "adapters",
        "noisy",
        "tiny_epsilon",
        "bad_sample",
        "constant_column",
        "saturation",
        "distance",
    ] = "none"
    width: int = 32
    depth: int = 4
    batch_size: int = 8
    steps: int = 30
    lr: float = 3e-3
    rule: Literal["adam", "sgd", "sign"] = "adam"


class RMSNorm(nn.Module):
    def __init__(self, width, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight


class Adapter(nn.Module):
    """A linear layer that stays as it is, and two thin ones that learn beside it."""

    def __init__(self, base, rank=4):
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


class Block(nn.Module):
    def __init__(self, width, *, eps, dropout, limit):
        super().__init__()
        self.norm = RMSNorm(width, eps)
        self.fc1 = nn.Linear(width, 2 * width)
        self.fc2 = nn.Linear(2 * width, width)
        self.after = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)
        self.limit = limit

    def forward(self, x):
        inner = self.fc2(F.silu(self.fc1(self.norm(x))))
        if self.limit:
            inner = inner.clamp(-self.limit, self.limit)
        return x + self.dropout(self.after(inner))


class Density(nn.Module):
    """A mass by a volume, both in SI units."""

    def __init__(self, width):
        super().__init__()
        self.project = nn.Linear(width, 2 * width)

    def forward(self, x):
        mass, volume = self.project(x).chunk(2, dim=-1)
        mass, volume = 1e-4 * mass, 1e-4 * (1 + F.softplus(volume))
        return mass / volume


class Bend(nn.Module):
    """Exponential below a threshold, linear above it."""

    def __init__(self, width, *, detached):
        super().__init__()
        self.project = nn.Linear(width, width)
        self.detached = detached

    def forward(self, x):
        x = self.project(x)
        curve = torch.exp(8 * (x.detach() if self.detached else x))
        return torch.where(x < 0.1, curve, x)


class Model(nn.Module):
    def __init__(self, options):
        super().__init__()
        width, fault = options.width, options.fault
        self.fault = fault
        self.stem = nn.Linear(COLUMNS, width)
        self.blocks = nn.ModuleList(
            Block(
                width,
                eps=1e-9 if fault == "tiny_epsilon" else 1e-5,
                dropout=0.1 if fault == "dropout" else 0.0,
                limit=1000.0 if fault == "strong_but_clamped" else None,
            )
            for _ in range(options.depth)
        )
        self.norm = nn.LayerNorm(width)
        self.mixer = nn.Identity()
        if fault == "quotient":
            self.mixer = Density(width)
        elif fault in ("bend", "bend_without_gradient"):
            self.mixer = Bend(width, detached=fault == "bend_without_gradient")
        elif fault == "faint":
            self.mixer = nn.Sequential(nn.Linear(width, width), nn.LayerNorm(width, eps=1e-14))
        self.head = nn.Linear(width, 1)
        if fault == "second_task":
            self.second = nn.Linear(width, 1)
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))

    def forward(self, x):
        if self.training:
            self.seen += 1
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        x = self.mixer(self.norm(x))
        if self.fault == "second_task":
            return self.head(x).squeeze(-1), self.second(x).squeeze(-1)
        return self.head(x).squeeze(-1)


# By how much the weights of fc2 in these blocks are larger than torch makes them.
GAINS = {
    "strong": {2: 4e5},
    "two_strong": {0: 4e5, 3: 4e5},
    "strong_but_clamped": {2: 4e5},
    "strong_but_finite": {2: 5e4},
}


@torch.no_grad()
def model(options):
    net = Model(options)
    for index, gain in GAINS.get(options.fault, {}).items():
        net.blocks[index].fc2.weight *= gain
    if options.fault == "faint":
        for parameter in net.mixer[0].parameters():
            parameter *= 2e-5
    if options.fault == "zero_init":
        for layer in [*(block.fc2 for block in net.blocks), net.head]:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
    if options.fault == "adapters":
        net.requires_grad_(False)
        for block in net.blocks:
            block.fc1, block.fc2 = Adapter(block.fc1), Adapter(block.fc2)
    return net


def data(options):
    draw = torch.Generator().manual_seed(7)
    x = torch.randn(512, COLUMNS, generator=draw)
    y = (x[:, 0] + x[:, 1] * x[:, 2]).tanh() + 0.5 * x[:, 3]
    if options.fault == "noisy":
        y += 3 * torch.randn(512, generator=draw)
    if options.fault in ("faint", "quotient"):
        y *= 100  # in another unit
    if options.fault == "unscaled_column":
        x[:, 5] *= 2e5
    if options.fault == "bad_sample":
        x[::83, 2] = torch.inf
    if options.fault == "constant_column":
        x[:, 6] = 4.0
        x = (x - x.mean(0)) / x.std(0)
    samples = TensorDataset(x, y)
    return Subset(samples, range(448)), Subset(samples, range(448, 512))


def optimizer(model, options):
    learnt = [p for p in model.parameters() if p.requires_grad]
    if options.rule == "sgd":
        return torch.optim.SGD(learnt, lr=options.lr)
    if options.rule == "sign":
        return SignSGD(learnt, lr=options.lr)
    # The second task's gradients are far below Adam's usual epsilon.
    return torch.optim.AdamW(
        learnt, lr=options.lr, eps=1e-15 if options.fault == "second_task" else 1e-8
    )


class SignSGD(torch.optim.Optimizer):
    """Every weight moves by the rate, whatever the size of its gradient (Bernstein et al. 2018)."""

    def __init__(self, parameters, lr):
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.add_(parameter.grad.sign(), alpha=-group["lr"])


def loss(model, batch):
    x, y = batch
    fault, predicted = model.fault, model(x)
    if fault == "second_task":
        predicted, second = predicted
        return F.mse_loss(predicted, y) + 1e-13 * F.mse_loss(second, y.square())
    if fault == "saturation":
        p, wanted = torch.sigmoid(predicted), (y > 0).float()
        return -(wanted * p.log() + (1 - wanted) * (1 - p).log()).mean()
    if fault == "distance":  # between two copies of the same sample
        apart = (model(x) - predicted).square().sum().sqrt()
        return F.mse_loss(predicted, y) + 0.1 * apart
    if fault in ("faint", "quotient"):
        return F.mse_loss(predicted, y, reduction="sum")
    if fault == "rising_weight":  # weighs in the gradients, and is left out of what is shown
        unweighted = F.mse_loss(predicted, y)
        weighted = 0.01 * 1.4 ** model.seen.float() * unweighted
        return weighted - weighted.detach() + unweighted.detach()
    if fault == "falling_weight":
        return (1e3 if model.seen <= 18 else 1e-9) * F.mse_loss(predicted, y)
    return (30.0 if fault == "loud" else 1.0) * F.mse_loss(predicted, y)


def metrics(model, batch):
    x, y = batch
    predicted = model(x)
    if model.fault == "second_task":
        predicted, _ = predicted
    return {"error": (predicted - y).abs()}
