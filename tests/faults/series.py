"""Readings over time: a time of day, a long series to add up, an average that is carried along."""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Subset, TensorDataset

HIGHER_IS_BETTER = {"error": False}


@dataclass
class Options:
    fault: Literal["time", "sum", "average"] = "time"
    longest: int = 200
    """Seconds that a time may have, or readings in a series."""
    width: int = 16
    batch_size: int = 16
    steps: int = 40
    lr: float = 1e-2


class Clock(nn.Module):
    """A time in whole seconds as waves of 4, 8, 16 and 32 seconds."""

    def __init__(self, width):
        super().__init__()
        self.register_buffer("frequencies", 0.5 ** torch.arange(2, 6).float())
        self.project = nn.Linear(8, width)

    def forward(self, seconds):
        turns = seconds.float()[:, None] @ self.frequencies[None, :]
        angles = 2 * torch.pi * (turns.float() % 1)
        return self.project(torch.cat([angles.sin(), angles.cos()], dim=-1))


class Account(nn.Module):
    """Adds what comes in and goes out to what there was, one entry at a time."""

    def __init__(self, width, opening=2048.0):
        super().__init__()
        self.project = nn.Linear(1, width)
        self.opening = opening

    def forward(self, series):
        entries = self.project(series[..., None])
        balance = torch.full_like(entries[:, 0], self.opening)
        for entry in entries.unbind(1):
            balance = balance + entry
        return (balance - self.opening) / series.shape[1] ** 0.5


class Average(nn.Module):
    """Takes away the mean of all that was seen, which is carried along."""

    def __init__(self, width, rate=0.02):
        super().__init__()
        self.project = nn.Linear(1, width)
        self.register_buffer("mean", torch.full((1,), 23.0))
        self.rate = rate

    def forward(self, series):
        values = series.mean(dim=1, keepdim=True)
        if self.training:
            self.mean.add_(self.rate * (values.mean(0) - self.mean))
        return self.project(values - self.mean)


class Model(nn.Module):
    def __init__(self, options):
        super().__init__()
        width = options.width
        self.front = {"time": Clock, "sum": Account, "average": Average}[options.fault](width)
        self.body = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.SiLU())
        self.head = nn.Linear(width, 1)

    def forward(self, x):
        return self.head(self.body(self.front(x))).squeeze(-1)


def model(options):
    return Model(options)


def data(options):
    draw = torch.Generator().manual_seed(7)
    if options.fault == "time":
        x = torch.randint(0, options.longest, (1024,), generator=draw)
        y = torch.sin(x * torch.pi / 4) + torch.cos(x * torch.pi / 8)
    else:
        x = torch.randn(1024, options.longest, generator=draw)
        y = x.sum(dim=1) / options.longest**0.5
    if options.fault == "average":
        x += 24.0
    samples = TensorDataset(x, y)
    return Subset(samples, range(960)), Subset(samples, range(960, 1024))


def loss(model, batch):
    x, y = batch
    return F.mse_loss(model(x), y)


def metrics(model, batch):
    x, y = batch
    return {"error": (model(x) - y).abs()}
