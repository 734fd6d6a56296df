"""Fashion-MNIST: ten kinds of clothes in 28 x 28 grey pixels, by an MLP, a small ViT or ResNet.

The three models fail differently in low precision: the MLP is all matrix products, the ViT adds
softmax and layer norm, the ResNet adds convolutions and the running statistics of batch norm.

Shape suffixes: B batch, C channels, H and W pixels, T patches, D width, N heads, K width of a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

HIGHER_IS_BETTER = {"accuracy": True}

WIDTHS = {"mlp": 256, "vit": 64, "resnet": 16}


@dataclass
class Options:
    model: Literal["mlp", "vit", "resnet"] = "mlp"
    """which network"""
    width: int | None = None
    """hidden (mlp), of a token (vit), channels of the first stage (resnet); none: 256, 64, 16"""
    batch_size: int = 128
    """images a step"""
    steps: int = 300
    """optimizer steps"""
    lr: float = 1e-3
    """learning rate of AdamW"""

    def __post_init__(self) -> None:
        self.width = self.width or WIDTHS[self.model]


def model(options: Options) -> nn.Module:
    assert options.width is not None
    if options.model == "mlp":
        return mlp(options.width)
    return VisionTransformer(options.width) if options.model == "vit" else resnet(options.width)


def data(options: Options) -> tuple[TensorDataset, TensorDataset]:
    """10,000 training and 3,000 test images; fp32 (1, 28, 28) each, labels int64."""
    with np.load(Path(__file__).parent / "data" / "fashion.npz", allow_pickle=False) as arrays:
        pixels = {part: torch.from_numpy(arrays[f"{part}_images"]) for part in ("train", "test")}
        labels = {part: torch.from_numpy(arrays[f"{part}_labels"]) for part in ("train", "test")}
    deviation, mean = torch.std_mean(pixels["train"].float())
    train, test = (
        TensorDataset(((pixels[part].float() - mean) / deviation).unsqueeze(1), labels[part].long())
        for part in ("train", "test")
    )
    return train, test


def loss(model: nn.Module, batch: Any) -> Tensor:
    images_BCHW, labels_B = batch
    return F.cross_entropy(model(images_BCHW), labels_B)


def metrics(model: nn.Module, batch: Any) -> dict[str, Tensor]:
    images_BCHW, labels_B = batch
    return {"accuracy": (model(images_BCHW).argmax(dim=-1) == labels_B).float()}


def mlp(width: int) -> nn.Module:
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(784, width),
        nn.ReLU(),
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Linear(width, 10),
    )


class VisionTransformer(nn.Module):
    """Pre-norm transformer over 16 patches of 7 x 7, mean-pooled (Dosovitskiy et al. 2021)."""

    def __init__(self, width: int, *, layers: int = 4, heads: int = 4, patch: int = 7) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, kernel_size=patch, stride=patch)
        self.positions = nn.Parameter(0.02 * torch.randn((28 // patch) ** 2, width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        x_BTD = self.patches(images_BCHW).flatten(2).transpose(1, 2) + self.positions
        return self.head(self.norm(self.blocks(x_BTD)).mean(dim=1))  # type: ignore[no-any-return]


class Block(nn.Module):
    """Attention and MLP, each on a normalised copy and added back."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm_mlp = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_BTD = x_BTD + self.out(self.attend(self.norm_attention(x_BTD)))
        return x_BTD + self.mlp(self.norm_mlp(x_BTD))  # type: ignore[no-any-return]

    def attend(self, x_BTD: Tensor) -> Tensor:
        qkv = self.qkv(x_BTD).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q_BNTK, k_BNTK, v_BNTK = qkv.unbind(0)
        y_BNTK = F.scaled_dot_product_attention(q_BNTK, k_BNTK, v_BNTK)
        return y_BNTK.transpose(1, 2).flatten(2)


class Residual(nn.Module):
    """Two 3 x 3 convolutions with batch norm, and a shortcut (He et al. 2016, figure 2)."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels_in != channels:
            self.shortcut = nn.Conv2d(channels_in, channels, 1, stride, bias=False)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return F.relu(self.body(x_BCHW) + self.shortcut(x_BCHW))


def resnet(width: int) -> nn.Module:
    """Three stages at 14, 7 and 4 pixels, one residual block each: eight layers with weights."""
    return nn.Sequential(
        nn.Conv2d(1, width, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        Residual(width, width, stride=1),
        Residual(width, 2 * width, stride=2),
        Residual(2 * width, 4 * width, stride=2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4 * width, 10),
    )
