"""A language model to start from: it learns to predict the next byte of any text file.

    narrowcast train THIS_FILE --precision bf16 --set text=my_notes.txt
    narrowcast compare THIS_FILE --precisions fp32,bf16 --seeds 3

Without `text` it reads the source of Python's own standard library.
"""

from __future__ import annotations

import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

HIGHER_IS_BETTER = {"next_byte_accuracy": True}


@dataclass
class Options:
    text: str = ""
    """a text file; empty: Python's standard library"""
    width: int = 96
    """size of the hidden state"""
    context: int = 64
    """bytes that are read before the next one is asked for"""
    batch_size: int = 16
    """windows of text a step"""
    steps: int = 150
    """optimizer steps"""
    lr: float = 3e-3
    """learning rate of AdamW"""


class Model(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, width)
        self.layers = nn.GRU(width, width, num_layers=2, batch_first=True)
        self.head = nn.Linear(width, 256)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden, _ = self.layers(self.embedding(tokens))
        logits: Tensor = self.head(hidden)
        return logits


def model(options: Options) -> nn.Module:
    return Model(options.width)


def data(options: Options) -> tuple[TensorDataset, TensorDataset]:
    """Windows of context + 1 bytes; the last tenth of the text is held out."""
    library = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    files = [Path(options.text)] if options.text else library
    text = bytearray(b"".join(file.read_bytes() for file in files))
    size = options.context + 1
    windows = torch.frombuffer(text, dtype=torch.uint8).unfold(0, size, size)
    held_out = max(1, len(windows) // 10)
    return TensorDataset(windows[:-held_out]), TensorDataset(windows[-held_out:][:500])


def loss(model: nn.Module, batch: list[Tensor]) -> Tensor:
    tokens = batch[0].long()
    logits = model(tokens[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def metrics(model: nn.Module, batch: list[Tensor]) -> dict[str, Tensor]:
    """Return one number a sample; the mean over all samples is reported."""
    tokens = batch[0].long()
    hits = model(tokens[:, :-1]).argmax(dim=-1) == tokens[:, 1:]
    return {"next_byte_accuracy": hits.float().mean(dim=1)}
