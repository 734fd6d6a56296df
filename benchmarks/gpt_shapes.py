"""A recipe: the GPT of `austen` in any shape, on zeros, for what depends on sizes alone."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from narrowcast.recipes import austen

HIGHER_IS_BETTER = {"loss": False}


@dataclass
class Options:
    layers: int = 2
    width: int = 128
    heads: int = 4
    context: int = 64
    vocabulary: int = 256
    batch_size: int = 4
    steps: int = 4
    lr: float = 1e-3


def model(options: Options) -> nn.Module:
    name = f"{options.layers} x {options.width}"
    austen.SIZES[name] = austen.Size(
        options.layers, options.width, options.heads,
        options.context, options.vocabulary, options.batch_size, options.lr,
    )  # fmt: skip
    shape: Any = SimpleNamespace(
        size=name, vocabulary=options.vocabulary, context=options.context, dropout=0.0
    )
    return austen.GPT(shape)


def data(options: Options) -> tuple[TensorDataset, TensorDataset]:
    windows = torch.zeros(options.batch_size, options.context + 1, dtype=torch.uint8)
    return TensorDataset(windows), TensorDataset(windows[:1])


def loss(model: nn.Module, batch: Any) -> Tensor:
    return austen.loss(model, batch)


def metrics(model: nn.Module, batch: Any) -> dict[str, Tensor]:
    (windows,) = batch
    return {"loss": austen.loss(model, batch).expand(len(windows))}


def optimizer(model: nn.Module, options: Options) -> torch.optim.Optimizer:
    shape: Any = options
    return austen.optimizer(model, shape)
