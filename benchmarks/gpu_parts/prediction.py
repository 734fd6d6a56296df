"""Predicted against measured peaks: eight models, three batches, five precisions.

Predictions are made by processes that see no GPU, while the GPU takes the steps. Measured are a
training of its own for each row, from an empty device: requested and allocated over the third step,
reserved over all three, which is what a prediction speaks of. Nothing watches the measured steps.
"""

from __future__ import annotations

import copy
import multiprocessing
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from gpu_parts.device import Peaks, empty, gpu_at_hand
from gpu_parts.sheet import Ask, Sheet
from gpu_parts.training import RECIPE
from narrowcast.plan import plan_named
from narrowcast.precision.cast import numeric_settings
from narrowcast.prediction.predict import predict_memory
from narrowcast.profiling import Bench, first_batch
from narrowcast.recipes.load import Recipe, load_recipe

__all__ = ["WORKLOADS", "run"]

PRECISIONS = ("bf16", "lean", "fp32", "bf16-split", "fp16")
BATCHES: dict[str, tuple[int, int, int]] = {
    "gpt2-124m": (8, 4, 16),
    "bert-base": (16, 8, 32),
    "vit-b16": (64, 32, 128),
    "resnet50": (64, 32, 128),
    "t5-small": (16, 8, 32),
    "convnext-t": (64, 32, 128),
    "gpt2-350m": (4, 2, 8),
    "mlp": (1024, 256, 4096),
}
_COUNTERS = ("requested", "allocated", "reserved")
_MOST_WORKERS = 8
WORKLOADS = 3 * len(BATCHES)


def rows() -> Iterator[dict[str, Any]]:
    """Yield the 24 workloads, each in one precision, then all others in the rest.

    Of the first 24 every model meets three precisions, and every precision four or five of the
    models; what time is left goes to the other precisions at the first batch.
    """
    first = []
    for place, (model, batches) in enumerate(BATCHES.items()):
        for number, batch in enumerate(batches):
            precision = PRECISIONS[(place + 2 * number) % len(PRECISIONS)]
            first.append({"model": model, "batch": batch, "precision": precision})
    # One batch of each model before the second of any: a cut leaves no model out.
    yield from (first[k] for number in range(3) for k in range(number, len(first), 3))
    for model, batches in BATCHES.items():
        for precision in PRECISIONS:
            row = {"model": model, "batch": batches[0], "precision": precision}
            if row not in first:
                yield row


def run(ask: Ask) -> None:
    sheet = Sheet("prediction", ask, workloads=WORKLOADS, question="predicted and measured peaks")
    gpu = gpu_at_hand()
    sheet.write(predicted_for=gpu)
    most = len(BATCHES) if ask.rehearse else None
    every = list(enumerate(rows()))[:most]
    todo = [(number, key) for number, key in every if sheet.find(**key) is None]
    workers = max(1, min(_MOST_WORKERS, (os.cpu_count() or 1) - 2))
    spawning = multiprocessing.get_context("spawn")
    # Leaving the block ends the workers, whatever they are at.
    with spawning.Pool(workers, initializer=_one_thread) as pool:
        asked = [pool.apply_async(predicted, (key, gpu, ask.rehearse)) for _, key in todo]
        models: dict[str, nn.Module] = {}
        for (number, key), future in zip(todo, asked, strict=True):
            with sheet.trying(**key) as found:
                found["among_24"] = number < WORKLOADS
                if ask.clock.is_over():
                    found["not_run"] = "out of time"
                    continue
                found["measured"] = measured(key, ask, models)
                found["predicted"] = future.get(max(ask.clock.left_s, 1.0))
                found |= _errors(found["predicted"], found["measured"])


def _one_thread() -> None:
    torch.set_num_threads(1)


def _recipe(key: dict[str, Any], *, tiny: bool) -> Recipe:
    size = 2 if tiny else key["batch"]
    options = [f"model={key['model']}", f"batch_size={size}", f"tiny={str(tiny).lower()}"]
    return load_recipe(RECIPE, options)


def predicted(key: dict[str, Any], gpu: str, tiny: bool) -> dict[str, int]:
    """Predict a row's peaks without a GPU; called in another process, by position."""
    record = predict_memory(_recipe(key, tiny=tiny), key["precision"], device=gpu, break_even=False)
    return {f"{name}_bytes": getattr(record, f"{name}_bytes") for name in _COUNTERS}


def measured(key: dict[str, Any], ask: Ask, models: dict[str, nn.Module]) -> dict[str, int]:
    """Take three steps and return the allocator's peaks; `models` keeps what was built once."""
    recipe, device = _recipe(key, tiny=ask.rehearse), ask.device
    plan = plan_named(key["precision"])
    torch.manual_seed(0)
    data, batch = first_batch(recipe, recipe.batch_size, 0)
    if key["model"] not in models:
        with device:
            models[key["model"]] = recipe.build_model()
        models[key["model"]].cpu()
    model = copy.deepcopy(models[key["model"]])
    with numeric_settings(plan.policy):
        peaks = Peaks(device)
        bench = Bench.of(recipe, plan, device, data=data, batch=batch, model=model)
        applied = 0
        for _ in range(30):
            if applied == 2:
                peaks.steady()
            applied += bench.step()
            if applied == 3:
                break
        found = peaks.read()
    del bench, model
    empty(device)
    return found


def _errors(predicted: dict[str, int], measured: dict[str, int]) -> dict[str, float]:
    """Return by how many percent each counter was predicted too high."""
    return {
        f"{name}_error_percent": 100 * (predicted[key] / measured[key] - 1)
        for name in _COUNTERS
        if (key := f"{name}_bytes") in measured
    }
