"""A recipe whose weights are hard to cut: odd rows, fewer rows than ranks, no dimensions, tied.

Two blocks make it a stack; `wide` is of a size that gets block-wise states, with rows that divide
by neither ranks nor blocks unless `even`. `fickle` leaves a layer out where a sample says so;
`leaving` runs a block in every other pass alone; `crossed` takes blocks in another order on rank 1;
`frozen` trains one block in part and the other not at all, beside a parameter without elements;
`tied` uses the weight of a block outside of it as well.
"""

import os
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.data import TensorDataset


@dataclass
class Options:
    batch_size: int = 8
    steps: int = 6
    even: bool = False
    norms: bool = False
    fickle: bool = False
    adafactor: bool = False
    strided: bool = False
    still: bool = False
    frozen: bool = False
    crossed: bool = False
    leaving: bool = False
    thawing: bool = False
    tied: bool = False


class Block(nn.Module):
    def __init__(self, width, norms):
        super().__init__()
        self.norm = nn.BatchNorm1d(width) if norms else nn.LayerNorm(width)
        self.layer = nn.Linear(width, width)

    def forward(self, x):
        return x + torch.tanh(self.layer(self.norm(x)))


class Net(nn.Module):
    def __init__(self, options):
        super().__init__()
        width, rows = (128, 64) if options.even else (80, 65)
        self.crossed = options.crossed
        self.leaving, self.passes = options.leaving, 0
        self.thawing = options.thawing
        self.enter = nn.Linear(3, width)
        self.blocks = nn.ModuleList(Block(width, options.norms) for _ in range(2))
        self.wide = nn.Linear(width, rows)
        self.head = nn.Linear(rows, 3)
        self.again = nn.Linear(rows, 3)
        self.again.weight = self.head.weight
        self.outer = nn.Linear(width, width) if options.tied else None
        if options.tied:
            self.outer.weight = self.blocks[1].layer.weight
        self.gain = nn.Parameter(torch.tensor(1.5))
        self.one = nn.Parameter(torch.ones(1))
        self.spare = nn.Linear(3, 3) if options.fickle else None
        if options.frozen:
            self.nothing = nn.Parameter(torch.zeros(0, 4))
            self.blocks[0].requires_grad_(False)
            self.blocks[1].layer.weight.requires_grad_(False)
            self.enter.bias.requires_grad_(False)
        if options.strided:
            self.wide.weight = nn.Parameter(self.wide.weight.detach().t().contiguous().t())

    def forward(self, x, fickle):
        y = self.enter(x)
        # Rank 1 takes the blocks in the other order, as a path that depends on the data may.
        rank = int(os.environ.get("RANK", "0")) if self.crossed else 0
        self.passes += self.training
        blocks = self.blocks[:1] if self.leaving and self.passes % 2 == 0 else self.blocks
        for block in reversed(blocks) if rank == 1 else blocks:
            y = block(y)
        if self.outer is not None:
            y = y + self.outer(y)
        y = torch.relu(self.wide(y))
        if hasattr(self, "nothing"):
            y = y + self.nothing.sum()
        y = self.gain * self.head(y) + self.one * self.again(y)
        return y if self.spare is None or fickle else self.spare(y)


def model(options):
    return Net(options)


def data(options):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(90, 3, generator=generator)
    targets = inputs @ torch.randn(3, 3, generator=generator)
    flags = torch.zeros(90, 1)
    flags[::5] = 1.0
    inputs = torch.cat([inputs, flags], 1)
    return TensorDataset(inputs[:64], targets[:64]), TensorDataset(inputs[64:], targets[64:])


def optimizer(model, options):
    if options.adafactor:
        return torch.optim.Adafactor(model.parameters())
    return torch.optim.AdamW(model.parameters(), lr=0.0 if options.still else 0.003)


def _predict(model, inputs):
    return model(inputs[:, :3], bool(inputs[0, 3]))


def loss(model, batch):
    inputs, targets = batch
    if hasattr(model, "nothing") and model.thawing:
        model.blocks[0].requires_grad_(True)
    return nn.functional.mse_loss(_predict(model, inputs).float(), targets)


def metrics(model, batch):
    inputs, targets = batch
    return {"squared_error": ((_predict(model, inputs) - targets) ** 2).mean(1)}


HIGHER_IS_BETTER = {"squared_error": False}
