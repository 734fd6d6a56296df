"""The price of a diamond from its grades and measures: a regression, scored in log price.

Small regression losses are where low precision bites without an accuracy to hide behind: the
squared error falls below 0.02, close to the square of bf16's step at the size of the targets.

Shape suffixes: B batch, F features.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

HIGHER_IS_BETTER = {"absolute_error": False, "within_10_percent": True}

GRADES = {"cut": 5, "color": 7, "clarity": 8}
MEASURES = ("carat", "depth", "table", "x", "y", "z")


@dataclass
class Options:
    width: int = 128
    """hidden width"""
    layers: int = 3
    """hidden layers"""
    batch_size: int = 256
    """diamonds a step"""
    steps: int = 400
    """optimizer steps"""
    lr: float = 2e-3
    """learning rate of AdamW"""


def model(options: Options) -> nn.Module:
    widths = [len(MEASURES) + sum(GRADES.values()), *[options.width] * options.layers]
    hidden = [
        part
        for inputs, outputs in pairwise(widths)
        for part in (nn.Linear(inputs, outputs), nn.SiLU())
    ]
    return nn.Sequential(*hidden, nn.Linear(widths[-1], 1), nn.Flatten(0))


def data(options: Options) -> tuple[TensorDataset, TensorDataset]:
    """48,546 diamonds to train on; every tenth of the 53,940 rows, sorted by price, is held out.

    Features are fp32 (26,): six standardised measures and three one-hot grades; the target is the
    natural logarithm of the price, centred, fp32.
    """
    with np.load(Path(__file__).parent / "data" / "diamonds.npz", allow_pickle=False) as arrays:
        columns = {name: torch.from_numpy(arrays[name].astype(np.int64)) for name in arrays.files}
    held_out = torch.arange(len(columns["price"])) % 10 == 0
    measures = torch.stack([columns[name].float() for name in MEASURES], dim=1)
    deviation, mean = torch.std_mean(measures[~held_out], dim=0)
    # Some sizes were mistyped (a diamond of 58.9 mm); 5 deviations is as far as we believe them.
    parts = [((measures - mean) / deviation).clamp(-5, 5)]
    parts += [F.one_hot(columns[name] - 1, levels).float() for name, levels in GRADES.items()]
    features = torch.cat(parts, dim=1)
    target = columns["price"].float().log()
    target = target - target[~held_out].mean()
    return (
        TensorDataset(features[~held_out], target[~held_out]),
        TensorDataset(features[held_out], target[held_out]),
    )


def loss(model: nn.Module, batch: Any) -> Tensor:
    features_BF, target_B = batch
    return F.mse_loss(model(features_BF), target_B)


def metrics(model: nn.Module, batch: Any) -> dict[str, Tensor]:
    features_BF, target_B = batch
    error_B = (model(features_BF).float() - target_B).abs()
    return {"absolute_error": error_B, "within_10_percent": (error_B < math.log(1.1)).float()}
