"""Deepanshu-k17/xmem-llm-adaptation: GPT-2s of transformers on a T4, one step, counters at stages.

Several runs share a notebook's process, so that later ones find the workspaces of the first.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from narrowcast.prediction.gpus import gpu_named
from peaks.process import Process

__all__ = ["predictions"]

_TINY = {"n_layer": 2, "n_head": 2, "n_embd": 2, "tie_word_embeddings": False}
_SMALL = {"n_layer": 6}
_BASE = {"use_cache": False}
"""``use_cache=False`` and tiny's untied head are what the file's notes infer from the numbers."""

# First row, model, and (batch, length, optimizer) of each run of a notebook.
_SESSIONS = (
    (1, _TINY, ((1, 32, "AdamW"),)),
    (17, _TINY, ((1, 16, "AdamW"), (1, 32, "AdamW"), (1, 64, "AdamW"), (1, 128, "AdamW"),
                 (1, 64, "SGD"), (1, 64, "AdamW"))),
    (113, _SMALL, ((1, 32, "AdamW"), (1, 64, "AdamW"), (1, 128, "AdamW"))),
    (161, _SMALL, ((1, 64, "AdamW"), (2, 64, "AdamW"), (4, 64, "AdamW"))),
    (209, _SMALL, ((1, 64, "SGD"), (1, 64, "AdamW"))),
    (241, _BASE, ((1, 32, "SGD"), (1, 64, "SGD"), (1, 128, "SGD"), (1, 32, "AdamW"),
                  (1, 64, "AdamW"), (1, 128, "AdamW"))),
)  # fmt: skip


def predictions() -> Iterator[tuple[int, int]]:
    """Yield (row, bytes), 16 rows a run; nothing without transformers."""
    for first, shape, runs in _SESSIONS:
        process = Process(gpu_named("t4"))
        row = first
        for run in runs:
            for value in _run(process, shape, *run):
                yield row, value
                row += 1


def _run(
    process: Process, shape: dict[str, object], batch: int, length: int, optimizer: str
) -> list[int]:
    _let_torchvision_load()
    from transformers import GPT2Config, GPT2LMHeadModel

    values: list[int] = []

    def note(*, peaks: bool) -> None:
        now, highest = process.counters(), process.peaks()
        values.extend((now.allocated_bytes, now.reserved_bytes))
        if peaks:
            values.extend((highest.allocated_bytes, highest.reserved_bytes))

    with process.run():
        process.reset_peaks()
        config = GPT2Config(**shape)
        model = process.to_gpu(lambda: GPT2LMHeadModel(config)).train()
        # 2 MiB beside the parameters, as the notes have it.
        extra = [torch.empty(2**20, dtype=torch.uint8) for _ in range(2 * (shape is _TINY))]
        note(peaks=False)
        steps = getattr(torch.optim, optimizer)(model.parameters(), lr=5e-5)
        ids = torch.randint(0, config.vocab_size, (batch, length))
        mask = torch.ones((batch, length), dtype=torch.long)  # of ones: transformers drops it
        outputs = model(input_ids=ids, labels=ids)
        loss = outputs.loss
        note(peaks=True)
        loss.backward()
        note(peaks=True)
        steps.step()
        note(peaks=False)
        steps.zero_grad(set_to_none=True)
        note(peaks=False)
        highest = process.peaks()
        values += [highest.allocated_bytes, highest.reserved_bytes]
        del model, steps, ids, mask, outputs, loss, extra
    process.empty_cache()
    return values


def _let_torchvision_load() -> None:
    """Let transformers import a torchvision that is built for CUDA beside a torch that is not."""
    path = str(Path(__file__).parents[2] / "tests" / "recipes")
    if path not in sys.path:
        sys.path.append(path)
    import torchvision_on_cpu  # noqa: F401
