"""A user's recipe of a model from `timm`: a small vision transformer on images of 32 x 32."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torchvision_on_cpu  # noqa: F401 -- before timm, which imports torchvision
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import timm  # isort: skip

HIGHER_IS_BETTER = {"accuracy": True}
FILE = Path(__file__).parents[2] / "src/narrowcast/recipes/data/fashion.npz"


@dataclass
class Options:
    depth: int = 3
    batch_size: int = 16
    steps: int = 20
    lr: float = 5e-4


def model(options):
    return timm.create_model(
        "vit_tiny_patch16_224",
        pretrained=False,
        img_size=32,
        patch_size=8,
        depth=options.depth,
        in_chans=1,
        num_classes=10,
    )


def data(options):
    arrays = np.load(FILE)

    def part(name, count):
        images = torch.from_numpy(arrays[f"{name}_images"][:count]).float() / 255
        labels = torch.from_numpy(arrays[f"{name}_labels"][:count]).long()
        return TensorDataset(F.pad(images, (2, 2, 2, 2)).unsqueeze(1), labels)

    return part("train", 800), part("test", 64)


def loss(model, batch):
    images, labels = batch
    return F.cross_entropy(model(images), labels)


def metrics(model, batch):
    images, labels = batch
    return {"accuracy": (model(images).argmax(1) == labels).float()}
