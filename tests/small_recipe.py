"""A recipe of a second that draws from every random source and keeps every kind of state.

Written as a user would write it: it does not import narrowcast. Dropout draws from torch, `collate`
from Python and numpy; batch norm keeps buffers, one of them not in the state dict; the scheduler
and AdamW count steps.
"""

import random
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

HIGHER_IS_BETTER = {"accuracy": True}


@dataclass
class Options:
    width: int = 16
    samples: int = 44
    batch_size: int = 8
    steps: int = 12
    lr: float = 0.02


class Net(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(6, width), nn.BatchNorm1d(width), nn.Dropout(0.2), nn.Linear(width, 3)
        )
        self.register_buffer("seen", torch.zeros(()), persistent=False)

    def forward(self, x):
        if self.training:
            self.seen.add_(1)
            x = x * (1 + self.seen / 1000)
        return self.layers(x)


def model(options):
    return Net(options.width)


def data(options):
    x = torch.randn(options.samples, 6)
    y = (x[:, 0] > 0).long() + (x[:, 1] > 0).long()
    samples = [(a, int(b)) for a, b in zip(x, y, strict=True)]
    return samples[: -options.batch_size], samples[-options.batch_size :]


def loss(model, batch):
    x, y = batch
    return F.cross_entropy(model(x), y)


def metrics(model, batch):
    x, y = batch
    return {"accuracy": (model(x).argmax(-1) == y).float()}


def optimizer(model, options):
    return torch.optim.AdamW(model.parameters(), lr=options.lr)


def scheduler(optimizer, options, steps):
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)


def collate(samples):
    x = torch.stack([s[0] for s in samples])
    x = x + 0.01 * random.random() + 0.01 * float(np.random.rand())  # noqa: NPY002
    return x, torch.tensor([s[1] for s in samples])
