"""A recipe of a few milliseconds a step, whose data can break or leave out what a test asks for.

The last column of an input says what happens to its sample: 1 makes the loss overflow in fp16, 2
makes it infinite. `odd` is where such a sample stands in the first batch.
"""

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import TensorDataset


@dataclass
class Options:
    batch_size: int = 8
    steps: int = 6
    width: int = 16
    dropout: float = 0.0
    unused: bool = False
    buffers: bool = False
    felt: bool = False
    unseeded: bool = False
    plain_sgd: bool = False
    odd: int = -1
    kind: float = 0.0


class Net(nn.Module):
    def __init__(self, options):
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(8, options.width), nn.GELU(), nn.Dropout(options.dropout)
        )
        self.head = nn.Linear(options.width, 2)
        self.spare = nn.Linear(2, 2) if options.unused else None
        self.norm = nn.BatchNorm1d(8) if options.buffers else nn.Identity()
        if options.buffers:
            self.register_buffer("mask", torch.ones(3, 3, dtype=torch.bool).tril())
            self.register_buffer("small", torch.arange(6, dtype=torch.int16).view(2, 3).t())
            self.register_buffer("count", torch.zeros(()))
        self.felt = options.felt
        if options.unseeded:
            seed = int.from_bytes(os.urandom(4), "big")
            nn.init.normal_(self.head.bias, generator=torch.Generator().manual_seed(seed))

    def forward(self, x):
        if self.training and hasattr(self, "count"):
            self.count += x.detach().float().mean()
        if self.felt:
            x = x * (1 + self.count.tanh())
        return self.head(self.body(self.norm(x)))


def model(options):
    return nn.Linear(8, 2, bias=False) if options.plain_sgd else Net(options)


def data(options):
    from narrowcast.data import epoch_order

    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(90, 8, generator=generator)
    targets = inputs @ torch.randn(8, 2, generator=generator)
    flags = torch.zeros(90, 1)
    if options.odd >= 0:
        flags[epoch_order(64, 0, 0)[options.odd]] = options.kind
    inputs = torch.cat([inputs, flags], 1)
    return TensorDataset(inputs[:64], targets[:64]), TensorDataset(inputs[64:], targets[64:])


def optimizer(model, options):
    if options.plain_sgd:
        return torch.optim.SGD(model.parameters(), lr=0.1)
    return torch.optim.AdamW(model.parameters(), lr=0.01)


def loss(model, batch):
    inputs, targets = batch
    flags = inputs[:, 8]
    outputs = model(inputs[:, :8])
    if model.training:
        _misbehave(model)
    if (flags == 1).any():
        outputs = outputs * 3e4
    found = nn.functional.mse_loss(outputs.float(), targets)
    return found * float("inf") if (flags == 2).any() else found


def metrics(model, batch):
    inputs, targets = batch
    return {"squared_error": ((model(inputs[:, :8]) - targets) ** 2).mean(1)}


HIGHER_IS_BETTER = {"squared_error": False}


def _misbehave(model):
    """Fail on the rank and at the forward pass that the environment names."""
    how, rank = os.environ.get("TEST_FAILS"), os.environ.get("TEST_RANK")
    if how is None or os.environ.get("RANK") != rank:
        return
    model.passes = getattr(model, "passes", 0) + 1
    if model.passes < 4:
        return
    if how == "kill":
        Path(os.environ["TEST_KILLED_AT"]).write_text(str(time.time()))
        os.kill(os.getpid(), signal.SIGKILL)
    if how.startswith("interrupt"):
        if model.passes == 4:
            for _ in range(2 if how.endswith("twice") else 1):
                os.kill(os.getpid(), signal.SIGINT)
        return
    raise ValueError("the cat is on the keyboard")
