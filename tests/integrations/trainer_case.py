"""A tiny causal language model, data and Trainers; nothing is downloaded."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from recipes import torchvision_on_cpu  # noqa: F401 -- before transformers, which imports torchvision

with warnings.catch_warnings(action="ignore"):
    pytest.importorskip("transformers")
    from accelerate.state import AcceleratorState  # noqa: F401 -- for the tests
    from transformers import (
        GPT2Config,
        GPT2LMHeadModel,
        Trainer,
        TrainerCallback,  # noqa: F401 -- for the tests
        TrainingArguments,
    )

STEPS = 6
WORDS = {"fp16": {"fp16": True}, "bf16": {"bf16": True}}
"""What TrainingArguments say beside a precision."""


def model(*, dropout: float = 0.0, classes: int = 97) -> Any:
    torch.manual_seed(3)
    config = GPT2Config(
        vocab_size=classes, n_positions=16, n_embd=32, n_layer=2, n_head=2, resid_pdrop=dropout,
        embd_pdrop=dropout, attn_pdrop=0.0, bos_token_id=None, eos_token_id=None, use_cache=False,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


class Sentences(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Forty-eight random sequences of sixteen tokens."""

    def __init__(self) -> None:
        self._ids = torch.randint(0, 97, (48, 16), generator=torch.Generator().manual_seed(1))

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self._ids[index], "labels": self._ids[index]}


def trainer(folder: Path, precision: str = "fp32", *, net: Any = None, **options: Any) -> Trainer:
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 8,
        "max_steps": STEPS,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 5,
        **WORDS.get(precision, {}),
    }
    arguments = TrainingArguments(**(settings | options))
    return Trainer(net if net is not None else model(), args=arguments, train_dataset=Sentences())
