"""A small mixture of experts with the router of DeepSeek-V3, whose bias balances the load.

The bias takes part in the choice of experts only, and moves by a fixed small amount a step; only
its differences matter, so nothing keeps it small. `transformers` keeps it in fp32 by hand
(``_keep_in_fp32_modules_strict = ["e_score_correction_bias"]``).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Subset, TensorDataset

HIGHER_IS_BETTER = {"error": False}
CLUSTERS = 8


@dataclass
class Options:
    bias: float = 60.0
    """Where the routers' biases stand, as in a training that has long been under way."""
    penalty: bool = False
    """Whether large router logits cost something (Zoph et al. 2022, the z-loss)."""
    sharpness: float = 4.0
    """How large the router's weights are."""
    experts: int = 8
    width: int = 16
    depth: int = 2
    batch_size: int = 16
    steps: int = 60
    lr: float = 1e-2


class Router(nn.Module):
    def __init__(self, options):
        super().__init__()
        weight = torch.randn(options.experts, options.width)
        self.weight = nn.Parameter(options.sharpness * weight / options.width**0.5)
        self.register_buffer(
            "e_score_correction_bias", torch.full((options.experts,), options.bias)
        )
        self.penalty = None
        self.is_penalised = options.penalty

    def forward(self, x):
        logits = F.linear(x, self.weight)
        if self.is_penalised:
            self.penalty = torch.logsumexp(logits, dim=-1).square().mean()
        scores = logits.sigmoid()
        chosen = (scores + self.e_score_correction_bias).argmax(dim=-1)
        if self.training:
            self.balance(chosen)
        return chosen, scores.gather(-1, chosen[:, None])

    @torch.no_grad()
    def balance(self, chosen):
        load = torch.bincount(chosen, minlength=len(self.weight)).float()
        self.e_score_correction_bias += 0.02 * torch.sign(load.mean() - load)


class Experts(nn.Module):
    def __init__(self, options):
        super().__init__()
        self.gate = Router(options)
        self.experts = nn.ModuleList(
            nn.Linear(options.width, options.width) for _ in range(options.experts)
        )

    def forward(self, x):
        chosen, share = self.gate(x)
        y = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            mine = (chosen == index).nonzero().squeeze(-1)
            y = y.index_add(0, mine, (expert(x[mine]) * share[mine]).to(y.dtype))
        return y


class Block(nn.Module):
    def __init__(self, options):
        super().__init__()
        self.norm = nn.LayerNorm(options.width)
        self.mlp = Experts(options)

    def forward(self, x):
        return x + self.mlp(self.norm(x))


class Model(nn.Module):
    def __init__(self, options):
        super().__init__()
        self.stem = nn.Linear(options.width, options.width)
        self.layers = nn.ModuleList(Block(options) for _ in range(options.depth))
        self.head = nn.Linear(options.width, 1)

    def forward(self, x):
        x = self.stem(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x).squeeze(-1)


def model(options):
    return Model(options)


def data(options):
    """Points around eight centres, and of every centre another linear function."""
    draw = torch.Generator().manual_seed(7)
    centres = 3 * torch.randn(CLUSTERS, options.width, generator=draw)
    slopes = torch.randn(CLUSTERS, options.width, generator=draw)
    cluster = torch.randint(0, CLUSTERS, (1024,), generator=draw)
    away = torch.randn(1024, options.width, generator=draw)
    samples = TensorDataset(centres[cluster] + away, (slopes[cluster] * away).sum(-1) / 4)
    return Subset(samples, range(960)), Subset(samples, range(960, 1024))


def loss(model, batch):
    x, y = batch
    total = F.mse_loss(model(x), y)
    for layer in model.layers:
        if layer.mlp.gate.penalty is not None:
            total = total + 1e-7 * layer.mlp.gate.penalty
    return total


def metrics(model, batch):
    x, y = batch
    return {"error": (model(x) - y).abs()}
