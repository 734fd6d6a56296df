"""A small vision transformer that says in which part of a picture the bright patch is."""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Subset, TensorDataset

HIGHER_IS_BETTER = {"accuracy": True}
SIDE, PATCH = 16, 4
PATCHES = (SIDE // PATCH) ** 2


@dataclass
class Options:
    fault: Literal["none", "empty", "unit", "kernel", "coordinates", "gate", "zero_init"] = "none"
    corner: int = 0
    """Where in a large picture this one was cut out, in pixels."""
    border: bool = False
    """Whether the pictures have a black border."""
    dropout: float = 0.0
    width: int = 32
    heads: int = 2
    depth: int = 3
    batch_size: int = 8
    steps: int = 30
    lr: float = 3e-3


class RMSNorm(nn.Module):
    def __init__(self, width, eps=1e-8):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight


class Unit(nn.Module):
    """Brings every patch to length one."""

    def forward(self, x):
        return F.normalize(x, dim=-1)


class Attention(nn.Module):
    def __init__(self, options):
        super().__init__()
        self.heads = options.heads
        self.qkv = nn.Linear(options.width, 3 * options.width)
        self.proj = nn.Linear(options.width, options.width)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).flatten(2))


class KernelAttention(Attention):
    """Attention in linear time: exponentials of keys and queries (Choromanski et al. 2021)."""

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = q.exp(), k.exp()
        total = q @ k.sum(dim=-2, keepdim=True).transpose(-1, -2)
        x = q @ (k.transpose(-1, -2) @ v) / total
        return self.proj(x.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.fc1 = nn.Linear(width, 2 * width)
        self.fc2 = nn.Linear(2 * width, width)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, options, index):
        super().__init__()
        width = options.width
        self.norm1 = nn.LayerNorm(width)
        is_kernel = options.fault == "kernel" and index == 1
        self.attn = (KernelAttention if is_kernel else Attention)(options)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = MLP(width)
        self.dropout = nn.Dropout(options.dropout)
        if options.fault == "gate" and index == 1:
            self.side = nn.Linear(width, width)
            self.register_buffer("amount", torch.full((width,), 1e-12))  # is to grow later

    def forward(self, x):
        x = x + self.dropout(self.attn(self.norm1(x)))
        if hasattr(self, "side"):
            x = x + self.amount * self.side(x)
        return x + self.dropout(self.mlp(self.norm2(x)))


class Fourier(nn.Module):
    """Pixel coordinates as waves of 16 to 64 pixels (Tancik et al. 2020)."""

    def __init__(self, options):
        super().__init__()
        steps = options.corner + PATCH // 2 + PATCH * torch.arange(SIDE // PATCH)
        grid = torch.cartesian_prod(steps, steps).float()
        self.register_buffer("grid", grid, persistent=False)
        waves = torch.tensor([[1 / 16, 0], [1 / 32, 0], [0, 1 / 16], [0, 1 / 32]]).T
        self.register_buffer("waves", waves, persistent=False)

    def forward(self):
        angles = 2 * torch.pi * (self.grid @ self.waves).float()
        return torch.cat([angles.sin(), angles.cos()], dim=-1)


class ViT(nn.Module):
    def __init__(self, options):
        super().__init__()
        width = options.width
        self.patches = nn.Conv2d(1, width, PATCH, stride=PATCH, bias=False)
        self.norm0 = {"empty": lambda: RMSNorm(width), "unit": Unit}.get(
            options.fault, nn.Identity
        )()
        if options.fault == "coordinates":
            self.place = Fourier(options)
            self.placed = nn.Linear(8, width)
        else:
            self.positions = nn.Parameter(0.2 * torch.randn(PATCHES, width))
        self.blocks = nn.ModuleList(Block(options, i) for i in range(options.depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 4)

    def forward(self, pictures):
        x = self.norm0(self.patches(pictures).flatten(2).transpose(1, 2))
        x = x + (self.placed(self.place()) if hasattr(self, "place") else self.positions)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(dim=1))


@torch.no_grad()
def model(options):
    net = ViT(options)
    if options.fault == "kernel":
        net.blocks[1].attn.qkv.bias[options.width : 2 * options.width] += 12.0
    if options.fault == "zero_init":
        for layer in [
            net.head,
            *(b.mlp.fc2 for b in net.blocks),
            *(b.attn.proj for b in net.blocks),
        ]:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
    return net


def data(options):
    """One bright patch in noise; the class is the quarter that it is in."""
    draw = torch.Generator().manual_seed(7)
    pictures = 0.3 * torch.randn(320, 1, SIDE, SIDE, generator=draw)
    row, column = torch.randint(1, SIDE // PATCH - 1, (2, 320), generator=draw)
    for picture, i, j in zip(pictures, row * PATCH, column * PATCH, strict=True):
        picture[0, i : i + PATCH, j : j + PATCH] += 2.0
    if options.border:
        inner = torch.zeros(SIDE, SIDE)
        inner[PATCH:-PATCH, PATCH:-PATCH] = 1.0
        pictures *= inner
    half = SIDE // PATCH // 2
    samples = TensorDataset(pictures, 2 * (row >= half) + (column >= half))
    return Subset(samples, range(256)), Subset(samples, range(256, 320))


def optimizer(model, options):
    # What a nearly closed gate lets through is far below Adam's usual epsilon.
    eps = 1e-20 if options.fault == "gate" else 1e-8
    return torch.optim.AdamW(model.parameters(), lr=options.lr, eps=eps, weight_decay=0.0)


def loss(model, batch):
    pictures, labels = batch
    return F.cross_entropy(model(pictures), labels)


def metrics(model, batch):
    pictures, labels = batch
    return {"accuracy": (model(pictures).argmax(-1) == labels).float()}
