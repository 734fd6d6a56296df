"""A user's image classifier: an own network, and an own dataset class read sample by sample."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

HIGHER_IS_BETTER = {"accuracy": True}
FILE = Path(__file__).parents[2] / "src/narrowcast/recipes/data/fashion.npz"


@dataclass
class Options:
    channels: int = 8
    batch_size: int = 32
    steps: int = 60
    lr: float = 3e-3


class Clothes:
    """Map-style and nothing more: no Dataset base class, numpy arrays, Python integers."""

    def __init__(self, images, labels):
        self.images, self.labels = images, labels

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index][None].astype(np.float32) / 255, int(self.labels[index])


class Network(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.first = nn.Conv2d(1, channels, 5, stride=2)
        self.second = nn.Conv2d(channels, 2 * channels, 3, stride=2)
        self.norm = nn.BatchNorm2d(2 * channels)
        self.dropout = nn.Dropout(0.1)
        self.head = nn.Linear(2 * channels, 10)

    def forward(self, x):
        x = F.relu(self.first(x))
        x = F.relu(self.norm(self.second(x)))
        return self.head(self.dropout(x.mean(dim=(2, 3))))


def model(options):
    return Network(options.channels)


def data(options):
    arrays = np.load(FILE)
    train = Clothes(arrays["train_images"][:2000], arrays["train_labels"][:2000])
    return train, Clothes(arrays["test_images"][:300], arrays["test_labels"][:300])


def loss(model, batch):
    images, labels = batch
    return F.cross_entropy(model(images), labels)


def metrics(model, batch):
    images, labels = batch
    return {"accuracy": (model(images).argmax(1) == labels).float()}


def optimizer(model, options):
    return torch.optim.SGD(model.parameters(), lr=10 * options.lr, momentum=0.9)


def scheduler(optimizer, options, steps):
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
