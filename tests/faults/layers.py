"""Regression through one unusual layer: what people write themselves when torch has no module."""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Subset, TensorDataset

HIGHER_IS_BETTER = {"error": False}
COLUMNS = 8


@dataclass
class Options:
    fault: Literal[
        "moments",
        "units",
        "clipped_units",
        "logit",
        "counts",
        "online_softmax",
        "mixture",
        "spoilt_weight",
    ] = "moments"
    largest: int = 1000
    """Largest count."""
    width: int = 32
    batch_size: int = 16
    steps: int = 40
    lr: float = 3e-3


class Moments(nn.Module):
    """Standardises by the mean of squares minus the square of the mean."""

    def __init__(self, width):
        super().__init__()
        self.shift = nn.Linear(width, width)

    def forward(self, x):
        x = self.shift(x) + 40
        mean, squares = x.mean(-1, keepdim=True), x.square().mean(-1, keepdim=True)
        return (x - mean) / torch.sqrt(squares - mean.square() + 1e-3)


class Units(nn.Module):
    """Goes from kilometres to millimetres, and back."""

    def __init__(self, width):
        super().__init__()
        self.length = nn.Linear(width, width)

    def forward(self, x):
        return self.limited(self.length(x) * 1e6) * 1e-6

    def limited(self, x):
        return x


class ClippedUnits(Units):
    """Takes outliers off in between."""

    def limited(self, x):
        return x.clamp(-5e6, 5e6)


class Logit(nn.Module):
    """A probability, and its log odds."""

    def __init__(self, width):
        super().__init__()
        self.gate = nn.Linear(width, width)

    def forward(self, x):
        p = torch.sigmoid(8 * self.gate(x)).clamp(1e-6, 1 - 1e-6)
        return (p / (1 - p)).log() / 8


class OnlineSoftmax(nn.Module):
    """A softmax in pieces: the largest number so far begins at minus infinity."""

    def __init__(self, width):
        super().__init__()
        self.scores, self.values = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x):
        largest = torch.full_like(x[:, :1], -torch.inf)
        total, weighted = torch.zeros_like(largest), torch.zeros_like(largest)
        pieces = zip(self.scores(x).split(8, dim=-1), self.values(x).split(8, dim=-1), strict=True)
        for scores, values in pieces:
            new = torch.maximum(largest, scores.amax(dim=-1, keepdim=True)).detach()
            kept, weights = torch.exp(largest - new), torch.exp(scores - new)
            total = kept * total + weights.sum(dim=-1, keepdim=True)
            weighted = kept * weighted + (weights * values).sum(dim=-1, keepdim=True)
            largest = new
        return x + weighted / total


class Mixture(nn.Module):
    """Log probabilities of which some are minus infinity: components that are switched off."""

    def __init__(self, width):
        super().__init__()
        self.scores = nn.Linear(width, width)
        self.register_buffer("prior", torch.ones(width))
        self.prior[::3] = 0

    def forward(self, x):
        joint = self.scores(x).log_softmax(dim=-1) + self.prior.log()
        return x + torch.logsumexp(joint, dim=-1, keepdim=True)


class Counts(nn.Module):
    """Whole numbers, as a share of the largest."""

    def __init__(self, width, largest):
        super().__init__()
        self.project = nn.Linear(width, width)
        self.out = nn.Linear(1, width)
        self.largest = largest

    def forward(self, x):
        bins = (x.detach().float()[:, :1].sigmoid() * self.largest).round()
        last = bins @ torch.ones(1, 1)
        return self.project(x) + self.out(last / self.largest)


LAYERS = {
    "moments": Moments,
    "units": Units,
    "clipped_units": ClippedUnits,
    "logit": Logit,
    "online_softmax": OnlineSoftmax,
    "mixture": Mixture,
}


class Model(nn.Module):
    def __init__(self, options):
        super().__init__()
        width = options.width
        self.fault = options.fault
        self.stem = nn.Sequential(nn.Linear(COLUMNS, width), nn.SiLU(), nn.Linear(width, width))
        self.norm = nn.LayerNorm(width)
        if options.fault == "counts":
            self.layer = Counts(width, options.largest)
        else:
            self.layer = LAYERS.get(options.fault, lambda width: nn.Linear(width, width))(width)
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 1))

    def forward(self, x):
        return self.head(self.layer(self.norm(self.stem(x)))).squeeze(-1)


@torch.no_grad()
def model(options):
    net = Model(options)
    if options.fault == "spoilt_weight":  # as a damaged checkpoint holds
        net.layer.weight[3, 4] = torch.nan
    return net


def data(options):
    draw = torch.Generator().manual_seed(7)
    x = torch.randn(800, COLUMNS, generator=draw)
    y = (x[:, 0] + x[:, 1] * x[:, 2]).tanh() + 0.5 * x[:, 3]
    samples = TensorDataset(x, y)
    return Subset(samples, range(736)), Subset(samples, range(736, 800))


def loss(model, batch):
    x, y = batch
    return F.mse_loss(model(x), y)


def metrics(model, batch):
    x, y = batch
    return {"error": (model(x) - y).abs()}
