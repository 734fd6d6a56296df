"""A small residual network that tells stripes from checks."""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Subset, TensorDataset

HIGHER_IS_BETTER = {"accuracy": True}
SIDE = 8


@dataclass
class Options:
    fault: Literal["none", "grown", "response", "dead", "pruned"] = "none"
    width: int = 8
    batch_size: int = 8
    steps: int = 12
    lr: float = 5e-3


class Response(nn.Module):
    """Lets channels compete by their energy over the picture (Woo et al. 2023)."""

    def __init__(self, channels):
        super().__init__()
        self.gain = nn.Parameter(torch.full((1, channels, 1, 1), 0.5))

    def forward(self, x):
        energy = x.pow(2).sum(dim=(2, 3), keepdim=True).sqrt()
        return x + self.gain * x * energy / (energy.mean(dim=1, keepdim=True) + 1e-4)


class Spread(nn.Module):
    """Mean and standard deviation of every channel (Snyder et al. 2018)."""

    def forward(self, x):
        x = x.flatten(2)
        middle = x.mean(dim=-1)
        variance = (x - middle[..., None]).pow(2).mean(dim=-1)
        return middle + torch.sqrt(variance + 1e-8)


class BasicBlock(nn.Module):
    def __init__(self, channels, outputs, stride, *, competes):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Conv2d(channels, outputs, 1, stride, bias=False)
        self.response = Response(outputs) if competes else nn.Identity()

    def forward(self, x):
        inner = F.relu(self.bn1(self.conv1(x)))
        inner = self.bn2(self.response(self.conv2(inner)))
        return F.relu(inner + self.shortcut(x))


class ResNet(nn.Module):
    def __init__(self, options):
        super().__init__()
        w, competes = options.width, options.fault == "response"
        self.conv1 = nn.Conv2d(1, w, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(w)
        self.layer1 = nn.Sequential(BasicBlock(w, w, 1, competes=False))
        self.layer2 = nn.Sequential(
            BasicBlock(w, 2 * w, 2, competes=False),
            BasicBlock(2 * w, 2 * w, 1, competes=competes),
        )
        is_pruned = options.fault == "pruned"
        self.neck = nn.Conv2d(2 * w, 2 * w, 1, bias=False) if is_pruned else nn.Identity()
        spreads = options.fault in ("dead", "pruned")
        self.pool = Spread() if spreads else nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(2 * w, 2)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        return self.fc(self.pool(self.neck(self.layer2(self.layer1(x)))).flatten(1))


@torch.no_grad()
def model(options):
    net = ResNet(options)
    if options.fault == "grown":  # weights before a batch norm may grow, and nobody sees it
        net.layer2[0].conv2.weight *= 4e5
    if options.fault == "response":
        net.layer2[1].conv2.weight *= 400
    if options.fault == "dead":  # some channels never come above zero
        net.layer2[1].bn2.bias[:3] -= 20
    if options.fault == "pruned":  # some filters were taken out
        net.neck.weight[:3] = 0
    return net


def data(options):
    draw = torch.Generator().manual_seed(7)
    pictures = 0.7 * torch.randn(192, 1, SIDE, SIDE, generator=draw)
    labels = torch.randint(0, 2, (192,), generator=draw)
    rows = torch.arange(SIDE)[:, None].expand(SIDE, SIDE)
    stripes, checks = rows % 2 * 2.0 - 1, (rows + rows.T) % 2 * 2.0 - 1
    pictures += torch.where(labels[:, None, None, None] == 1, checks, stripes)
    samples = TensorDataset(pictures, labels)
    return Subset(samples, range(160)), Subset(samples, range(160, 192))


def loss(model, batch):
    pictures, labels = batch
    return F.cross_entropy(model(pictures), labels)


def metrics(model, batch):
    pictures, labels = batch
    return {"accuracy": (model(pictures).argmax(-1) == labels).float()}
