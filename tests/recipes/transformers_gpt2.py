"""A user's recipe of a model from `transformers`: a tiny GPT-2 from a configuration, on bytes."""

from dataclasses import dataclass
from pathlib import Path

import torch
import torchvision_on_cpu  # noqa: F401 -- before transformers, which imports torchvision
from torch.utils.data import TensorDataset

from transformers import GPT2Config, GPT2LMHeadModel  # isort: skip

HIGHER_IS_BETTER = {"perplexity": False}
TEXT = Path(__file__).parents[2] / "src/narrowcast/recipes/data/SOURCES.md"


@dataclass
class Options:
    context: int = 32
    batch_size: int = 8
    steps: int = 40
    lr: float = 2e-3


def model(options):
    config = GPT2Config(
        vocab_size=256,
        n_positions=options.context,
        n_embd=64,
        n_layer=2,
        n_head=2,
        attn_pdrop=0.0,  # with dropout a CPU has no fused attention kernel below fp32
        bos_token_id=None,
        eos_token_id=None,
        use_cache=False,
    )
    return GPT2LMHeadModel(config)


def data(options):
    text = torch.frombuffer(bytearray(TEXT.read_bytes()), dtype=torch.uint8)
    windows = text.unfold(0, options.context, options.context).long()
    return TensorDataset(windows[10:]), TensorDataset(windows[:10])


def loss(model, batch):
    (tokens,) = batch
    return model(input_ids=tokens, labels=tokens).loss


def metrics(model, batch):
    return {"perplexity": loss(model, batch).exp()}
