"""The plainest training loop there is, in fp32: what every recipe must work with first."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from narrowcast.data import BatchStream, evaluation_batches, to_device
from narrowcast.recipes.load import Recipe


def run(recipe: Recipe, steps: int, *, device: str = "cpu") -> tuple[nn.Module, list[float]]:
    """Train from seed 0; return the model in evaluation mode and the loss of every step."""
    torch.manual_seed(0)
    model = recipe.build_model().to(device)
    optimizer = recipe.build_optimizer(model)
    scheduler = recipe.build_scheduler(optimizer, steps)
    train, _ = recipe.load_data()
    stream = BatchStream(train, recipe.batch_size, seed=0, collate=recipe.collate)
    losses = []
    for _ in range(steps):
        _, batch = next(stream)
        optimizer.zero_grad()
        loss = recipe.compute_loss(model, to_device(batch, device))
        loss.backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        losses.append(loss.item())
    return model.eval(), losses


def evaluated(recipe: Recipe, model: nn.Module, *, device: str = "cpu") -> dict[str, float]:
    """Average every metric over the samples of the evaluation data."""
    _, data = recipe.load_data()
    sums: dict[str, float] = {}
    with torch.no_grad():
        for ids, batch in evaluation_batches(data, recipe.batch_size, recipe.collate):
            for name, value in recipe.compute_metrics(model, to_device(batch, device)).items():
                sums[name] = sums.get(name, 0.0) + _sum(value, len(ids))
    return {name: total / len(data) for name, total in sums.items()}


def _sum(value: Tensor, samples: int) -> float:
    assert value.shape in ((), (samples,))
    return float(value) * samples if value.dim() == 0 else float(value.sum())
