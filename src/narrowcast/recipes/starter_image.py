"""An image classifier to start from: put your own images into `data`, your network into `model`.

    narrowcast train THIS_FILE --precision bf16 --set steps=100
    narrowcast compare THIS_FILE --precisions fp32,bf16 --seeds 3

As it stands it tells level, upright and slanting stripes apart under noise so heavy that it errs:
where every run is right on every image, no comparison can tell one from another.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

HIGHER_IS_BETTER = {"accuracy": True}


@dataclass
class Options:
    width: int = 16
    """channels of the first convolution"""
    batch_size: int = 64
    """images a step"""
    steps: int = 150
    """optimizer steps"""
    lr: float = 2e-3
    """learning rate of AdamW"""


def model(options: Options) -> nn.Module:
    width = options.width
    return nn.Sequential(
        nn.Conv2d(1, width, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(2 * width, 3),
    )


def data(options: Options) -> tuple[TensorDataset, TensorDataset]:
    """Return what to train on and what to evaluate on; any dataset with len() and [i] will do."""
    return stripes(2000, seed=1), stripes(2000, seed=2)


def loss(model: nn.Module, batch: list[Tensor]) -> Tensor:
    images, labels = batch
    return F.cross_entropy(model(images), labels)


def metrics(model: nn.Module, batch: list[Tensor]) -> dict[str, Tensor]:
    """Return one number a sample; the mean over all samples is reported."""
    images, labels = batch
    return {"accuracy": (model(images).argmax(dim=1) == labels).float()}


def stripes(count: int, seed: int) -> TensorDataset:
    """Images of shape (1, 16, 16) and labels 0 (level), 1 (upright) and 2 (slanting)."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (count,), generator=random)
    rows, columns = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    along = torch.stack([rows, columns, (rows + columns) / 2**0.5])[labels]
    phase = 6.3 * torch.rand(count, 1, 1, generator=random)
    noise = 2.5 * torch.randn(count, 16, 16, generator=random)
    return TensorDataset((torch.sin(1.5 * along + phase) + noise).unsqueeze(1), labels)
