"""ViT-L/16 (Dosovitskiy et al. 2021) with the modules and shapes of torchvision's vit_l_16."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["VisionTransformer"]


class EncoderBlock(nn.Module):
    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.feed = nn.Sequential(
            nn.Linear(width, hidden),
            nn.GELU(),
            nn.Dropout(0.0),
            nn.Linear(hidden, width),
            nn.Dropout(0.0),
        )

    def forward(self, value: Tensor) -> Tensor:
        x = self.norm1(value)
        x, _ = self.attention(x, x, x, need_weights=False)
        x = x + value
        y = self.norm2(x)
        y = self.feed(y)
        return x + y


class VisionTransformer(nn.Module):
    def __init__(
        self,
        classes: int,
        *,
        size: int = 224,
        patch: int = 16,
        width: int = 1024,
        layers: int = 24,
        heads: int = 16,
        hidden: int = 4096,
    ) -> None:
        super().__init__()
        self.cut = nn.Conv2d(3, width, patch, patch)
        self.start = nn.Parameter(torch.empty(1, 1, width))
        self.places = nn.Parameter(torch.empty(1, (size // patch) ** 2 + 1, width))
        self.blocks = nn.Sequential(*(EncoderBlock(width, heads, hidden) for _ in range(layers)))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.cut(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.start.expand(x.shape[0], -1, -1), x], dim=1)
        x = self.norm(self.blocks(x + self.places))
        return self.head(x[:, 0])
