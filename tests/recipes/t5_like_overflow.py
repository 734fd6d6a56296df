"""A small copy of T5's encoder, whose second feed-forward layers give more than fp16 can hold.

In real T5 checkpoints the outputs of ``wo`` reach 6e4 and more, so `transformers` keeps these
layers in fp32 by hand (``_keep_in_fp32_modules = ["wo"]``).
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Subset, TensorDataset

HIGHER_IS_BETTER = {"accuracy": True}
PAD, VOCABULARY = 0, 16


@dataclass
class Options:
    large: Literal["all", "last", "none"] = "all"
    """Blocks whose wo is as large as in a trained T5."""
    empty_texts: bool = False
    """Whether some texts have no token at all."""
    width: int = 32
    heads: int = 2
    depth: int = 3
    context: int = 12
    batch_size: int = 8
    steps: int = 30
    lr: float = 3e-3


class T5LayerNorm(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        variance = x.to(torch.float32).pow(2).mean(-1, keepdim=True)
        return self.weight * (x * torch.rsqrt(variance + 1e-6))


class SelfAttention(nn.Module):
    def __init__(self, options):
        super().__init__()
        width = options.width
        self.heads = options.heads
        self.q = nn.Linear(width, width, bias=False)
        self.k = nn.Linear(width, width, bias=False)
        self.v = nn.Linear(width, width, bias=False)
        self.o = nn.Linear(width, width, bias=False)

    def forward(self, x, position_bias):
        q, k, v = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer in (self.q, self.k, self.v)
        )
        scores = torch.matmul(q, k.transpose(3, 2))
        scores += position_bias
        weights = F.softmax(scores.float(), dim=-1).type_as(scores)
        return self.o(torch.matmul(weights, v).transpose(1, 2).flatten(2))


class DenseReluDense(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.wi = nn.Linear(width, 2 * width, bias=False)
        self.wo = nn.Linear(2 * width, width, bias=False)

    def forward(self, x):
        return self.wo(F.relu(self.wi(x)))


class LayerSelfAttention(nn.Module):
    def __init__(self, options):
        super().__init__()
        self.SelfAttention = SelfAttention(options)
        self.layer_norm = T5LayerNorm(options.width)

    def forward(self, x, position_bias):
        return x + self.SelfAttention(self.layer_norm(x), position_bias)


class LayerFF(nn.Module):
    def __init__(self, options):
        super().__init__()
        self.DenseReluDense = DenseReluDense(options.width)
        self.layer_norm = T5LayerNorm(options.width)

    def forward(self, x, position_bias):
        return x + self.DenseReluDense(self.layer_norm(x))


class Block(nn.Module):
    def __init__(self, options):
        super().__init__()
        self.layer = nn.ModuleList([LayerSelfAttention(options), LayerFF(options)])

    def forward(self, x, position_bias):
        for layer in self.layer:
            x = layer(x, position_bias)
        return x


class Encoder(nn.Module):
    def __init__(self, options):
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCABULARY, options.width)
        self.relative_attention_bias = nn.Embedding(2 * options.context - 1, options.heads)
        self.block = nn.ModuleList(Block(options) for _ in range(options.depth))
        self.final_layer_norm = T5LayerNorm(options.width)

    def forward(self, tokens):
        x = self.embed_tokens(tokens)
        places = torch.arange(tokens.shape[1], device=tokens.device)
        apart = places[None, :] - places[:, None] + tokens.shape[1] - 1
        position_bias = self.relative_attention_bias(apart).permute(2, 0, 1)
        mask = (tokens == PAD)[:, None, None, :].to(x.dtype) * torch.finfo(x.dtype).min
        for block in self.block:
            x = block(x, position_bias + mask)
        return self.final_layer_norm(x)


class Tagger(nn.Module):
    def __init__(self, options):
        super().__init__()
        self.encoder = Encoder(options)
        self.classifier = nn.Linear(options.width, 4)

    def forward(self, tokens):
        return self.classifier(self.encoder(tokens))


@torch.no_grad()
def model(options):
    net = Tagger(options)
    blocks = list(net.encoder.block)
    for block in {"all": blocks, "last": blocks[-1:], "none": []}[options.large]:
        block.layer[1].DenseReluDense.wo.weight *= 3e5
    return net


def data(options):
    """Every token is to be tagged with what the token before it was, modulo four."""
    draw = torch.Generator().manual_seed(7)
    tokens = torch.randint(1, VOCABULARY, (320, options.context), generator=draw)
    if options.empty_texts:
        tokens[::5] = PAD
    samples = TensorDataset(tokens, tokens.roll(1, dims=1) % 4)
    return Subset(samples, range(256)), Subset(samples, range(256, 320))


def loss(model, batch):
    tokens, tags = batch
    return F.cross_entropy(model(tokens).flatten(0, 1), tags.flatten())


def metrics(model, batch):
    tokens, tags = batch
    return {"accuracy": (model(tokens).argmax(-1) == tags).float().mean(dim=1)}
