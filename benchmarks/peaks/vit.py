"""ViT-L/16 (Dosovitskiy et al. 2021) with the modules and shapes of torchvision's vit_l_16."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["AdamOfJune2023", "VisionTransformer"]


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


class AdamOfJune2023(torch.optim.Optimizer):
    """Adam by foreach as torch had it before July 2023: sqrt and denominator both held.

    pytorch/pytorch#104991 (12 July 2023) made the second one an update in place; the rows are of a
    nightly of 23 June.
    """

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        (group,) = self.param_groups
        parameters = [p for p in group["params"] if p.grad is not None]
        gradients = [p.grad for p in parameters]
        for p in parameters:
            if not self.state[p]:
                self.state[p] = {"first": torch.zeros_like(p), "second": torch.zeros_like(p)}
        firsts = [self.state[p]["first"] for p in parameters]
        seconds = [self.state[p]["second"] for p in parameters]
        torch._foreach_lerp_(firsts, gradients, 0.1)
        torch._foreach_mul_(seconds, 0.999)
        torch._foreach_addcmul_(seconds, gradients, gradients, 0.001)
        roots = torch._foreach_sqrt(seconds)
        torch._foreach_div_(roots, 0.9)
        denominators = torch._foreach_add(roots, 1e-8)
        torch._foreach_addcdiv_(parameters, firsts, denominators, -group["lr"])
