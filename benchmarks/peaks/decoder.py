"""The decoder of Stanford's CS 336, as its students measured it: everything written out.

Pre-norm blocks with RMSNorm in fp32, rotary positions, SwiGLU, attention with a mask of its own, no
biases, no dropout, an untied head; a loss from log-softmax and gather, and AdamW as a loop over the
parameters. What counts here is the order of the operations, which decides the peak.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Decoder", "LoopAdamW", "Shape", "attend", "token_loss"]


@dataclass(frozen=True, kw_only=True)
class Shape:
    width: int
    layers: int
    heads: int
    hidden: int
    vocabulary: int
    context: int


class Product(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("...i,oi->...o", x, self.weight)


class Table(nn.Module):
    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, width))

    def forward(self, ids: Tensor) -> Tensor:
        return self.weight[ids, :]


class RootMeanSquare(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        given = x.dtype
        x = x.to(torch.float32)
        scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)
        x = x * scale
        return (self.weight * x).to(given)


class Rotary(nn.Module):
    def __init__(self, context: int, size: int) -> None:
        super().__init__()
        self.register_buffer("waves", torch.empty(2, context, size // 2), persistent=False)

    def forward(self, x: Tensor, places: Tensor) -> Tensor:
        pairs = x.unflatten(-1, (-1, 2))
        even, odd = pairs[..., 0], pairs[..., 1]
        cosine, sine = self.waves[:, places, :]
        even_turned = cosine * even - sine * odd
        odd_turned = sine * even + cosine * odd
        return torch.stack((even_turned, odd_turned), dim=-1).flatten(-2)


def stable_softmax(x: Tensor) -> Tensor:
    shifted = x - torch.max(x, dim=-1, keepdim=True)[0]  # a name keeps it until the return
    powers = torch.exp(shifted)
    return powers / torch.sum(powers, dim=-1, keepdim=True)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    scores = torch.einsum("...qd,...kd->...qk", query, key) / math.sqrt(key.shape[-1])
    if mask is not None:
        scores = torch.where(mask, scores, float("-inf"))
    weights = stable_softmax(scores)
    return torch.einsum("...qk,...kd->...qd", weights, value)


class SelfAttention(nn.Module):
    def __init__(self, shape: Shape, rotary: Rotary) -> None:
        super().__init__()
        self.heads = shape.heads
        self.query, self.key, self.value, self.out = (
            Product(shape.width, shape.width) for _ in range(4)
        )
        self.rotary = rotary

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (
            p(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for p in (self.query, self.key, self.value)
        )
        length = x.shape[1]
        places = torch.arange(length)[None, None]
        query = self.rotary(query, places)  # what it was made of goes before the key is turned
        key = self.rotary(key, places)
        order = torch.arange(length)
        mask = order[None, None, :, None] >= order[None, None, None, :]
        mixed = attend(query, key, value, mask)
        mixed = mixed.transpose(1, 2).flatten(2).contiguous()
        return self.out(mixed)


def swish(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


class Gated(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate, self.down, self.up = (
            Product(width, hidden), Product(hidden, width), Product(width, hidden),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.down(swish(self.gate(x)) * self.up(x))


class Block(nn.Module):
    def __init__(self, shape: Shape, rotary: Rotary) -> None:
        super().__init__()
        self.attention = SelfAttention(shape, rotary)
        self.feed = Gated(shape.width, shape.hidden)
        self.norms = nn.ModuleList([RootMeanSquare(shape.width) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        x_attention = self.attention(self.norms[0](x))
        after = x + x_attention
        x_feed = self.feed(self.norms[1](after))
        return after + x_feed


class Decoder(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.table = Table(shape.vocabulary, shape.width)
        rotary = Rotary(shape.context, shape.width // shape.heads)
        self.blocks = nn.ModuleList([Block(shape, rotary) for _ in range(shape.layers)])
        self.norm = RootMeanSquare(shape.width)
        self.head = Product(shape.width, shape.vocabulary)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def log_share(x: Tensor) -> Tensor:
    highest = torch.max(x, dim=-1, keepdim=True)[0]
    x = x - highest
    return x - torch.log(torch.sum(torch.exp(x), dim=-1, keepdim=True))


def token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    costs = -log_share(logits)
    return torch.mean(torch.gather(costs, -1, targets.unsqueeze(-1)))


class LoopAdamW(torch.optim.Optimizer):
    def __init__(self, params: Any, lr: float = 1e-3) -> None:
        super().__init__(params, {"lr": lr, "betas": (0.9, 0.999), "eps": 1e-8, "decay": 0.01})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        first = state.get("first", torch.zeros_like(gradient))
        second = state.get("second", torch.zeros_like(gradient))
        b1, b2 = group["betas"]
        first = b1 * first + ((1 - b1) * gradient)
        second = b2 * second + ((1 - b2) * torch.square(gradient))
        parameter.data -= group["lr"] * group["decay"] * parameter.data
        parameter.data -= group["lr"] * first / (torch.sqrt(second) + group["eps"])
        state["first"], state["second"] = first, second
