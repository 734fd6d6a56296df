"""Metrics over a whole evaluation set, in fp32 and in the precision of the training, kept apart.

The two answer different questions: fp32 from the stored weights says what was learnt, the other
what a user of the same precision will get. An evaluation draws its random numbers from a stream of
its own and never changes what the training does next.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from narrowcast.data import evaluation_batches, to_device
from narrowcast.engine.engine import Engine
from narrowcast.errors import CheckpointError, RecipeError
from narrowcast.policy import Policy
from narrowcast.precision.device import environment
from narrowcast.recipes.load import Recipe, option_values
from narrowcast.records.evaluation import EvaluationRecord
from narrowcast.records.run import Evaluation
from narrowcast.training.checkpoint import fingerprint, load_weights
from narrowcast.training.determinism import deterministic
from narrowcast.training.randomness import isolated, seed_everything

__all__ = ["evaluate_model", "evaluate_weights"]


@dataclass(frozen=True, kw_only=True)
class _Sums:
    """Sums over samples, in fp64 on the CPU."""

    totals: dict[str, float] = field(default_factory=dict)
    examples: int = 0

    def plus(self, values: dict[str, float], examples: int) -> _Sums:
        if self.examples and set(values) != set(self.totals):
            raise RecipeError(
                f"metrics() returned {sorted(values)} for one batch and {sorted(self.totals)} for "
                "those before it",
                hint="return the same metrics for every batch",
            )
        totals = {name: self.totals.get(name, 0.0) + value for name, value in values.items()}
        return _Sums(totals=totals, examples=self.examples + examples)

    def means(self) -> dict[str, float]:
        return {name: total / self.examples for name, total in self.totals.items()}


def evaluate_model(
    recipe: Recipe,
    engine: Engine,
    dataset: Any,
    *,
    step: int,
    seed: int = 0,
    should_stop: Callable[[], bool] = lambda: False,
) -> tuple[Evaluation, ...]:
    """Evaluate in fp32 and, where that is something else, in the policy's precision.

    Metric "loss" always exists: the recipe's loss, averaged over samples. Returns nothing if asked
    to stop on the way. Raises DataError for an empty dataset.
    """
    precisions: tuple[Literal["fp32", "training"], ...] = ("fp32", "training")
    if engine.policy.compute == "fp32":
        precisions = ("fp32",)
    found = []
    for precision in precisions:
        sums = _Sums()
        with isolated(seed, "evaluation"), engine.evaluating(precision) as label:
            for ids, batch in evaluation_batches(dataset, recipe.batch_size, recipe.collate):
                if should_stop():
                    return ()
                on_device = to_device(batch, engine.device)
                sums = sums.plus(_measure(recipe, engine.model, on_device, len(ids)), len(ids))
        found.append(
            Evaluation(step=step, precision=label, metrics=sums.means(), examples=sums.examples)
        )
    return tuple(found)


def evaluate_weights(
    recipe: Recipe,
    policy: Policy,
    weights: Path,
    *,
    device: torch.device,
    seed: int = 0,
    step: int = 0,
) -> EvaluationRecord:
    """Evaluate exported weights, or those of a checkpoint, as a run of this seed does.

    `step` is what the evaluations are labelled with: the steps that the weights were trained for.
    Raises CheckpointError if the file is damaged, a pickle, or of another model.
    """
    loaded = load_weights(weights)
    with isolated(seed, "model"), deterministic():
        model = recipe.build_model()
        engine = Engine(model, recipe.build_optimizer(model), policy, device=device)
        try:
            model.load_state_dict(loaded)
        except RuntimeError as error:
            raise CheckpointError(
                f"{weights} does not fit {recipe.name} with these options: {error}",
                hint="give the recipe and the --set options that the weights were trained with",
            ) from None
        seed_everything(seed, "data")
        _, data = recipe.load_data()
        evaluations = evaluate_model(recipe, engine, data, step=step, seed=seed)
    return EvaluationRecord(
        recipe=recipe.name,
        options=option_values(recipe),
        precision=policy.name,
        weights=str(weights),
        weights_hash=fingerprint(loaded),
        evaluations=evaluations,
        environment=environment(device),
    )


def _measure(recipe: Recipe, model: nn.Module, batch: Any, examples: int) -> dict[str, float]:
    """Return the sums of one batch's metrics over its samples."""
    metrics = recipe.compute_metrics(model, batch)
    if "loss" not in metrics:
        metrics = {**metrics, "loss": recipe.compute_loss(model, batch)}
    return {name: _sum_over(name, value, examples) for name, value in metrics.items()}


def _sum_over(name: str, value: Tensor, examples: int) -> float:
    if value.dim() == 0:
        return float(value.double()) * examples
    if value.shape == (examples,):
        return float(value.double().sum())
    raise RecipeError(
        f"metric {name!r} has shape {tuple(value.shape)} for a batch of {examples}",
        hint="return one number a sample, or one for the batch",
    )
