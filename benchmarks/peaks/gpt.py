"""The GPT of "Build a Large Language Model From Scratch", as its chapter on speed changes it.

124 M parameters and an untied head; written out in small operations first, then with more and more
of torch's own modules. What counts here is the order of the operations, which decides the peak.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["Gpt", "GptShape", "batch_loss", "generate"]


@dataclass(frozen=True, kw_only=True)
class GptShape:
    vocabulary: int = 50257
    context: int = 1024
    width: int = 768
    heads: int = 12
    layers: int = 12
    dropout: float = 0.1
    fused_modules: bool = False
    """nn.LayerNorm and nn.GELU instead of their formulas."""
    fused_attention: bool = False
    """scaled_dot_product_attention instead of its formula."""


class Norm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale, self.shift = (nn.Parameter(torch.empty(width)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(dim=-1, keepdim=True)
        variance = x.var(dim=-1, keepdim=True, unbiased=False)
        normal = (x - mean) / torch.sqrt(variance + 1e-5)
        return self.scale * normal + self.shift


class TanhGelu(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        slope = torch.sqrt(torch.tensor(0.6366))
        return 0.5 * x * (1 + torch.tanh(slope * (x + 0.044715 * torch.pow(x, 3))))


class PlainAttention(nn.Module):
    def __init__(self, shape: GptShape) -> None:
        super().__init__()
        self.heads = shape.heads
        self.query, self.key, self.value = (
            nn.Linear(shape.width, shape.width, bias=False) for _ in range(3)
        )
        self.out = nn.Linear(shape.width, shape.width)
        self.dropout = nn.Dropout(shape.dropout)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        keys, queries, values = self.key(x), self.query(x), self.value(x)
        parts = (batch, length, self.heads, width // self.heads)
        keys = keys.view(parts)
        values = values.view(parts)
        queries = queries.view(parts)
        keys, queries, values = (t.transpose(1, 2) for t in (keys, queries, values))
        scores = queries @ keys.transpose(2, 3)
        mask = torch.triu(torch.ones(length, length, dtype=torch.bool), diagonal=1)
        scores.masked_fill_(mask, float("-inf"))
        weights = torch.softmax(scores / keys.shape[-1] ** 0.5, dim=-1)
        weights = self.dropout(weights)
        mixed = (weights @ values).transpose(1, 2)
        mixed = mixed.reshape(batch, length, width)
        return self.out(mixed)


class FusedAttention(nn.Module):
    def __init__(self, shape: GptShape) -> None:
        super().__init__()
        self.heads, self.dropout = shape.heads, shape.dropout
        self.qkv = nn.Linear(shape.width, 3 * shape.width, bias=False)
        self.out = nn.Linear(shape.width, shape.width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(x)
        qkv = qkv.view(batch, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        queries, keys, values = qkv
        mixed = F.scaled_dot_product_attention(
            queries, keys, values, dropout_p=self.dropout if self.training else 0.0, is_causal=True
        )
        mixed = mixed.transpose(1, 2).contiguous().view(batch, length, width)
        return self.out(mixed)


class GptBlock(nn.Module):
    def __init__(self, shape: GptShape) -> None:
        super().__init__()
        attention: Callable[[GptShape], nn.Module] = (
            FusedAttention if shape.fused_attention else PlainAttention
        )
        norm: Callable[[int], nn.Module] = nn.LayerNorm if shape.fused_modules else Norm
        self.attention = attention(shape)
        self.feed = nn.Sequential(
            nn.Linear(shape.width, 4 * shape.width),
            nn.GELU(approximate="tanh") if shape.fused_modules else TanhGelu(),
            nn.Linear(4 * shape.width, shape.width),
        )
        self.norm1, self.norm2 = norm(shape.width), norm(shape.width)
        self.dropout = nn.Dropout(shape.dropout)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        x = self.norm1(x)
        x = self.attention(x)
        x = self.dropout(x)
        x = x + shortcut
        shortcut = x
        x = self.norm2(x)
        x = self.feed(x)
        x = self.dropout(x)
        return x + shortcut


class Gpt(nn.Module):
    def __init__(self, shape: GptShape) -> None:
        super().__init__()
        self.tokens = nn.Embedding(shape.vocabulary, shape.width)
        self.places = nn.Embedding(shape.context, shape.width)
        self.dropout = nn.Dropout(shape.dropout)
        self.blocks = nn.Sequential(*(GptBlock(shape) for _ in range(shape.layers)))
        self.norm = nn.LayerNorm(shape.width) if shape.fused_modules else Norm(shape.width)
        self.head = nn.Linear(shape.width, shape.vocabulary, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        tokens = self.tokens(ids)
        places = self.places(torch.arange(ids.shape[1]))
        x = tokens + places
        x = self.dropout(x)
        x = self.blocks(x)
        x = self.norm(x)
        return self.head(x)


def batch_loss(model: nn.Module, batch: int, length: int, vocabulary: int) -> Tensor:
    """Move a batch to the device, which the loop's function keeps, and return the loss."""
    ids, targets = (torch.randint(0, vocabulary, (batch, length)) for _ in range(2))
    logits = model(ids)
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


@torch.no_grad()
def generate(model: nn.Module, prompt: int, count: int, vocabulary: int) -> None:
    ids = torch.randint(0, vocabulary, (1, prompt))
    for _ in range(count):
        last = model(ids)[:, -1, :]
        ids = torch.cat((ids, torch.argmax(last, dim=-1, keepdim=True)), dim=1)
