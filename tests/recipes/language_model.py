"""A user's language model: a GRU on characters, samples of unequal length and its own collate."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

HIGHER_IS_BETTER = {"perplexity": False}
TEXT = Path(__file__).parents[2] / "src/narrowcast/recipes/data/SOURCES.md"


@dataclass
class Options:
    width: int = 64
    batch_size: int = 8
    steps: int = 60
    lr: float = 5e-3


class Reader(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.embedding = nn.Embedding(129, width, padding_idx=128)
        self.recurrent = nn.GRU(width, width, batch_first=True)
        self.head = nn.Linear(width, 129)

    def forward(self, tokens):
        return self.head(self.recurrent(self.embedding(tokens))[0])


def model(options):
    return Reader(options.width)


def data(options):
    lines = [line for line in TEXT.read_text().splitlines() if len(line) > 2]
    samples = [torch.tensor([min(ord(c), 127) for c in line]) for line in lines]
    return samples[8:], samples[:8]


def collate(samples):
    """A dict, as tokenizers give: ids padded with 128, and the mask of what is real."""
    tokens = pad_sequence(samples, batch_first=True, padding_value=128)
    return {"tokens": tokens, "mask": tokens != 128}


def loss(model, batch):
    logits = model(batch["tokens"][:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), batch["tokens"][:, 1:].flatten(), ignore_index=128)


def metrics(model, batch):
    return {"perplexity": loss(model, batch).exp()}
