"""The models that a GPU is measured with, as one recipe: sizes that people know, made-up data.

    narrowcast predict benchmarks/gpu_workloads.py --set model=resnet50 --device h200

Memory and speed do not depend on the values, so that tokens and images are random; what training
does to a loss is measured with `austen` on real text. `tiny` is the same code in a size for a CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from gpu_parts.resnet import ResNet
from gpu_parts.transformers import T5, Bert, Gpt, Shape
from peaks.cnns import ConvNeXt
from peaks.vit import VisionTransformer
from torch import Tensor, nn
from torch.utils.data import TensorDataset

HIGHER_IS_BETTER = {"loss": False}

TINY = Shape(layers=2, width=32, heads=2, hidden=64, positions=16, vocabulary=64)
TOKENS: dict[str, tuple[type[nn.Module], Shape]] = {
    # The vocabularies of GPT-2 are padded to a multiple of 64, as its reimplementations do.
    "gpt2-124m": (Gpt, Shape(layers=12, width=768, heads=12, hidden=3072, positions=1024,
                             vocabulary=50304)),
    "gpt2-350m": (Gpt, Shape(layers=24, width=1024, heads=16, hidden=4096, positions=1024,
                             vocabulary=50304)),
    "bert-base": (Bert, Shape(layers=12, width=768, heads=12, hidden=3072, positions=512,
                              vocabulary=30522, dropout=0.1)),
    "t5-small": (T5, Shape(layers=6, width=512, heads=8, hidden=2048, positions=512,
                           vocabulary=32128, dropout=0.1)),
}  # fmt: skip
CLASSES = 1000


@dataclass
class Options:
    model: Literal[
        "gpt2-124m", "gpt2-350m", "bert-base", "t5-small",
        "vit-b16", "resnet50", "convnext-t", "mlp",
    ] = "mlp"  # fmt: skip
    """which model"""
    batch_size: int = 8
    """samples a step"""
    tiny: bool = False
    """the same code with a few thousand parameters"""
    channels_last: bool = False
    """images and convolutions in the layout that tensor cores read"""
    lr: float = 1e-4
    """learning rate of AdamW"""
    steps: int = 10
    """optimizer steps"""


def model(options: Options) -> nn.Module:
    built = _text_model(options) if options.model in TOKENS else _image_models(options)()
    return built.to(memory_format=torch.channels_last) if options.channels_last else built


def data(options: Options) -> tuple[TensorDataset, TensorDataset]:
    random = torch.Generator().manual_seed(0)
    train = TensorDataset(*_samples(options, random))
    return train, train


def loss(model: nn.Module, batch: list[Tensor]) -> Tensor:
    task = getattr(model, "task", "classes")
    if task == "classes":
        inputs, labels = batch
        if inputs.dim() == 4 and inputs.shape[-1] == 3:
            inputs = inputs.permute(0, 3, 1, 2)  # channels last, without a copy
        return F.cross_entropy(model(inputs), labels)
    targets = batch[-1] if task == "every token" else batch[-1][:, 1:]
    if task == "translation":
        logits = model(batch[0], batch[1][:, :-1])
    else:
        logits = model(batch[0][:, : targets.shape[1]])
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def metrics(model: nn.Module, batch: list[Tensor]) -> dict[str, Tensor]:
    return {"loss": loss(model, batch)}


def optimizer(model: nn.Module, options: Options) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=options.lr, fused=True)


def _text_model(options: Options) -> nn.Module:
    kind, shape = TOKENS[options.model]
    return kind(TINY if options.tiny else shape)  # type: ignore[call-arg]


def _image_models(options: Options) -> Callable[[], nn.Module]:
    tiny = options.tiny
    makers: dict[str, Callable[[], nn.Module]] = {
        "vit-b16": lambda: _filled(
            VisionTransformer(10, size=32, patch=16, width=32, layers=2, heads=2, hidden=64)
            if tiny
            else VisionTransformer(CLASSES, width=768, layers=12, heads=12, hidden=3072)
        ),
        "resnet50": lambda: ResNet((1, 1), 8, 10) if tiny else ResNet((3, 4, 6, 3), 64, CLASSES),
        "convnext-t": lambda: _filled(
            ConvNeXt((8, 16), (1, 1), drop=0.0, classes=10)
            if tiny
            else ConvNeXt((96, 192, 384, 768), (3, 3, 9, 3), drop=0.0, classes=CLASSES)
        ),
        "mlp": lambda: _mlp(*((32, 64, 10) if tiny else (1024, 4096, CLASSES))),
    }
    return makers[options.model]


def _filled(model: nn.Module) -> nn.Module:
    """Give values to the parameters that these models leave as they find them in memory."""
    for name, parameter in model.named_parameters():
        if name.rsplit(".", 1)[-1] in ("start", "places", "scale"):
            nn.init.normal_(parameter, std=0.02)
    return model


def _mlp(inputs: int, width: int, classes: int) -> nn.Module:
    return nn.Sequential(
        nn.Linear(inputs, width), nn.GELU(),
        nn.Linear(width, width), nn.GELU(),
        nn.Linear(width, width), nn.GELU(),
        nn.Linear(width, classes),
    )  # fmt: skip


def _samples(options: Options, random: torch.Generator) -> list[Tensor]:
    count = options.batch_size
    if options.model in TOKENS:
        shape = TINY if options.tiny else TOKENS[options.model][1]
        length = shape.positions + (options.model != "bert-base")
        sequences = 2 if options.model == "t5-small" else 1
        size = (count, length)
        drawn = [torch.randint(shape.vocabulary, size, generator=random) for _ in range(sequences)]
        if sequences == 2:
            drawn[0] = drawn[0][:, :-1]  # what is read needs no token to guess
        return drawn
    labels = torch.randint(10 if options.tiny else CLASSES, (count,), generator=random)
    if options.model == "mlp":
        width = 32 if options.tiny else 1024
        return [torch.randn(count, width, generator=random), labels]
    side = 32 if options.tiny else 224
    size = (count, side, side, 3) if options.channels_last else (count, 3, side, side)
    return [torch.randn(size, generator=random), labels]
