"""A small GPT that learns to say what it read some tokens before."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Subset, TensorDataset

HIGHER_IS_BETTER = {"accuracy": True}
PAD = 0


@dataclass
class Options:
    fault: Literal[
        "none",
        "massive",
        "massive_pair",
        "products",
        "logits",
        "padding",
        "padding_softly",
        "wide_table",
    ] = "none"
    positions: Literal["learnt", "rotary"] = "learnt"
    first_position: int = 0
    """Where a text begins in the document that it was cut from."""
    dropout: float = 0.0
    vocabulary: int = 24
    context: int = 12
    width: int = 32
    heads: int = 2
    depth: int = 4
    batch_size: int = 8
    steps: int = 30
    lr: float = 5e-3


class RMSNorm(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return x * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6).to(x) * self.weight


class Rotary(nn.Module):
    """Cosine and sine of position times frequency, for all pairs of features (Su et al. 2021)."""

    def __init__(self, size, base=64.0):
        super().__init__()
        frequencies = base ** -(torch.arange(0, size, 2).float() / size)
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(self, positions):
        angles = positions.to(self.frequencies.dtype)[:, None] @ self.frequencies[None, :]
        angles = torch.cat([angles, angles], dim=-1).float()
        return angles.cos(), angles.sin()


def rotated(x, cos, sin):
    a, b = x.chunk(2, dim=-1)
    return (x * cos + torch.cat([-b, a], dim=-1) * sin).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, options):
        super().__init__()
        width = options.width
        self.heads = options.heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.fault = options.fault

    def forward(self, x, is_real, rotation):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if rotation is not None:
            q, k = rotated(q, *rotation), rotated(k, *rotation)
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        length = x.shape[1]
        allowed = torch.ones(length, length, dtype=torch.bool).tril() & is_real[:, None, None, :]
        if self.fault == "padding":
            scores = scores + (~allowed).to(scores.dtype) * -1e9
        elif self.fault == "padding_softly":
            scores = scores + (~allowed).to(scores.dtype) * -1e4
        else:
            itself = torch.eye(length, dtype=torch.bool)
            scores = scores.masked_fill(~(allowed | itself), -torch.inf)
        x = scores.softmax(dim=-1) @ v
        return self.proj(x.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, options):
        super().__init__()
        self.norm1 = RMSNorm(options.width)
        self.attn = Attention(options)
        self.norm2 = RMSNorm(options.width)
        self.mlp = MLP(options.width)
        self.dropout = nn.Dropout(options.dropout)

    def forward(self, x, is_real, rotation):
        x = x + self.dropout(self.attn(self.norm1(x), is_real, rotation))
        return x + self.dropout(self.mlp(self.norm2(x)))


class GPT(nn.Module):
    def __init__(self, options):
        super().__init__()
        width = options.width
        self.first_position = options.first_position
        self.embed = nn.Embedding(options.vocabulary, width)
        if options.positions == "rotary":
            self.rotary = Rotary(width // options.heads)
        else:
            self.positions = nn.Embedding(options.context, width)
        self.blocks = nn.ModuleList(Block(options) for _ in range(options.depth))
        self.norm = RMSNorm(width)
        self.head = nn.Linear(width, options.vocabulary, bias=False)
        self.head_multiplier = 1.0

    def forward(self, tokens):
        x = self.embed(tokens)
        places = torch.arange(tokens.shape[1], device=tokens.device)
        rotation = None
        if hasattr(self, "rotary"):
            rotation = self.rotary(self.first_position + places)
        else:
            x = x + self.positions(places)
        for block in self.blocks:
            x = block(x, tokens != PAD, rotation)
        return self.head(self.norm(x)) * self.head_multiplier


@torch.no_grad()
def model(options):
    net = GPT(options)
    nn.init.normal_(net.embed.weight, std=16.0 if options.fault == "wide_table" else 0.3)
    if options.fault in ("massive", "massive_pair"):
        net.blocks[3].mlp.fc2.weight *= 4e5
    if options.fault == "massive_pair":
        net.blocks[1].attn.proj.weight *= 6e5
    if options.fault == "products":  # Q and K are large; the scale that comes after is small
        net.blocks[1].attn.qkv.weight[: 2 * options.width] *= 400
    if options.fault == "logits":  # a small multiplier after large weights
        net.head.weight *= 1e5
        net.head_multiplier = 1e-5
    return net


def data(options):
    draw = torch.Generator().manual_seed(7)
    size = (320, options.context + 1)
    tokens = torch.randint(1, min(options.vocabulary, 12), size, generator=draw)
    tokens = tokens[:, :3].repeat(1, options.context // 3 + 1)[:, : options.context + 1]
    if options.fault.startswith("padding"):  # on the left, as for generation
        lengths = torch.randint(0, 5, (320, 1), generator=draw)
        tokens[torch.arange(options.context + 1) < lengths] = PAD
    samples = TensorDataset(tokens)
    return Subset(samples, range(256)), Subset(samples, range(256, 320))


def optimizer(model, options):
    return torch.optim.AdamW(model.parameters(), lr=options.lr)


def loss(model, batch):
    (tokens,) = batch
    logits = model(tokens[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten(), ignore_index=PAD)


def metrics(model, batch):
    (tokens,) = batch
    hit = model(tokens[:, :-1]).argmax(-1) == tokens[:, 1:]
    return {"accuracy": hit.float().mean(dim=1)}
