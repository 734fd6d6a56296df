"""A regression to start from: it learns the last column of a table from the others.

    narrowcast train THIS_FILE --precision bf16 --set table=my.csv --set columns=7
    narrowcast compare THIS_FILE --precisions fp32,bf16 --seeds 3

A table is a CSV file of numbers under one line of headings. Without one it learns a made-up
function.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Subset, TensorDataset, random_split

HIGHER_IS_BETTER = {"absolute_error": False}


@dataclass
class Options:
    table: str = ""
    """a CSV file of numbers, the target in the last column; empty: a made-up function"""
    columns: int = 5
    """columns that the target is learned from: all of the table but the last"""
    width: int = 64
    """hidden width"""
    batch_size: int = 64
    """rows a step"""
    steps: int = 200
    """optimizer steps"""
    lr: float = 3e-3
    """learning rate of AdamW"""


def model(options: Options) -> nn.Module:
    width = options.width
    return nn.Sequential(
        nn.Linear(options.columns, width),
        nn.SiLU(),
        nn.Linear(width, width),
        nn.SiLU(),
        nn.Linear(width, 1),
        nn.Flatten(0),
    )


def data(options: Options) -> tuple[Subset[Any], Subset[Any]]:
    """Standardise every column, and hold out a fifth of the rows."""
    if options.table:
        rows = torch.from_numpy(np.loadtxt(options.table, delimiter=",", skiprows=1)).float()
    else:
        rows = made_up(4000)
    rows = (rows - rows.mean(dim=0)) / rows.std(dim=0).clamp_min(1e-6)
    dataset = TensorDataset(rows[:, :-1].contiguous(), rows[:, -1].contiguous())
    train, held_out = random_split(dataset, [0.8, 0.2], torch.Generator().manual_seed(0))
    return train, held_out


def loss(model: nn.Module, batch: list[Tensor]) -> Tensor:
    features, target = batch
    return F.mse_loss(model(features), target)


def metrics(model: nn.Module, batch: list[Tensor]) -> dict[str, Tensor]:
    """Return one number a sample; the mean over all samples is reported."""
    features, target = batch
    return {"absolute_error": (model(features) - target).abs()}


def made_up(count: int) -> Tensor:
    """Rows of five inputs and a target that depends on them (Friedman 1991, equation 61)."""
    random = torch.Generator().manual_seed(0)
    x = torch.rand(count, 5, generator=random)
    y = 10 * torch.sin(torch.pi * x[:, 0] * x[:, 1]) + 20 * (x[:, 2] - 0.5) ** 2
    y = y + 10 * x[:, 3] + 5 * x[:, 4] + torch.randn(count, generator=random)
    return torch.cat([x, y.unsqueeze(1)], dim=1)
