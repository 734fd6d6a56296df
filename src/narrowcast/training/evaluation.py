"""Metrics over a whole evaluation set, in fp32 and in the precision of the training, kept apart.

The two answer different questions: fp32 from the stored weights says what was learnt, the other
what a user of the same precision will get. An evaluation draws its random numbers from a stream of
its own and never changes what the training does next.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from narrowcast.data import evaluation_batches, to_device
from narrowcast.engine.engine import Engine
from narrowcast.engine.stores import planned_optimizer
from narrowcast.errors import CheckpointError, RecipeError
from narrowcast.parallel.peers import ALONE, Peers
from narrowcast.plan import OWN, Plan
from narrowcast.precision.device import environment
from narrowcast.randomness import isolated, seed_everything
from narrowcast.recipes.load import Recipe, option_values
from narrowcast.records.codec import from_json
from narrowcast.records.evaluation import EvaluationRecord
from narrowcast.records.run import Evaluation
from narrowcast.training.assembly import batch_digest, unasked
from narrowcast.training.checkpoint import (
    buffers_in,
    fingerprint,
    is_checkpoint,
    load,
    load_weights,
)
from narrowcast.training.determinism import deterministic as only_deterministic
from narrowcast.training.model_state import adopt_buffers, load_model_state

__all__ = ["evaluate_model", "evaluate_weights", "nonfinite_notes", "restored_notes"]


# What torch calls the value of get_extra_state() in a state dict.
_EXTRA_STATE = torch.nn.modules.module._EXTRA_STATE_KEY_SUFFIX


Call = Callable[[Callable[[nn.Module, Any], Any], nn.Module, Any], Any]
"""Calls a function of model and batch."""


def _directly(function: Callable[[nn.Module, Any], Any], model: nn.Module, batch: Any) -> Any:
    return function(model, batch)


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
    peers: Peers = ALONE,
    call: Call = _directly,
) -> tuple[Evaluation, ...]:
    """Evaluate in fp32 and, where that is something else, in the policy's precision.

    Metric "loss" always exists: the recipe's loss, averaged over samples. The samples are hashed on
    the way (see ``Evaluation.data_hash``). Returns nothing if asked to stop on the way. Several
    ranks share the batches, and each adds all of them up, in their order; `call` is how a function
    of the model is called where its weights are shared too. Raises DataError for an empty dataset.
    """
    precisions: tuple[Literal["fp32", "training"], ...] = ("fp32", "training")
    if engine.policy.compute == "fp32":
        precisions = ("fp32",)
    found: list[Evaluation] = []
    samples = hashlib.sha256()
    share = (peers.rank, peers.size)
    for precision in precisions:
        own: list[_Batch] = []
        with isolated(seed, "evaluation"), engine.evaluating(precision) as label:
            turns = evaluation_batches(dataset, recipe.batch_size, recipe.collate, share)
            for ids, batch in turns:
                if should_stop():
                    return ()
                # The second pass sees the same samples.
                digest = "" if found else batch_digest(batch)
                on_device = to_device(batch, engine.device)
                values = _measure(recipe, engine.model, on_device, len(ids), call)
                own.append(_Batch(len(ids), values, digest))
            _keep_company(recipe, engine, dataset, taken=len(own), peers=peers, call=call)
        sums = _Sums()
        for each in _in_order(peers.gather(own)):
            samples.update(each.digest.encode())
            sums = sums.plus(each.values, each.examples)
        found.append(
            Evaluation(
                step=step,
                precision=label,
                metrics=sums.means(),
                examples=sums.examples,
                data_hash=samples.hexdigest(),
            )
        )
    return tuple(found)


class _Batch(NamedTuple):
    """What one batch gave: sums over its samples, and their hash."""

    examples: int
    values: dict[str, float]
    digest: str


def _in_order(of_ranks: list[list[_Batch]]) -> Iterator[_Batch]:
    """Yield the batches that ranks took in turn, in the order of the dataset."""
    for turn in itertools.zip_longest(*of_ranks):
        yield from (batch for batch in turn if batch is not None)


def evaluate_weights(
    recipe: Recipe,
    plan: Plan,
    weights: Path,
    *,
    device: torch.device,
    seed: int = 0,
    step: int = 0,
    deterministic: bool = True,
) -> EvaluationRecord:
    """Evaluate exported weights, or those of a checkpoint, as a run of this seed does.

    `step` is what the evaluations are labelled with: the steps that the weights were trained for.
    A checkpoint's weights are the masters in its optimizer's stores, where there are some.
    `deterministic` allows only kernels that repeat their bits.
    Raises CheckpointError if the file is damaged, a pickle, or of another model.
    """
    with isolated(seed, "model"), only_deterministic() if deterministic else nullcontext():
        loaded, buffers = _in_full(recipe, weights)
        engine = _engine(recipe, plan, device)
        try:
            warnings = _load(engine, loaded, buffers)
        except CheckpointError as error:
            raise CheckpointError(
                f"{weights} does not fit {recipe.name} with these options: {error.message}",
                hint="give the recipe and the --set options that the weights were trained with",
            ) from None
        seed_everything(seed, "data")
        _, data = recipe.load_data()
        evaluations = evaluate_model(recipe, engine, data, step=step, seed=seed)
    return EvaluationRecord(
        recipe=recipe.name,
        options=option_values(recipe),
        precision=plan.name,
        weights=str(weights),
        weights_hash=fingerprint(loaded),
        evaluations=evaluations,
        warnings=(*unasked(engine), *warnings, *restored_notes(engine)),
        environment=environment(device),
    )


def nonfinite_notes(evaluations: Sequence[Evaluation], step: int) -> Iterator[str]:
    """Say which metrics of this step are no numbers: the steps were taken, and came to nothing."""
    for evaluation in evaluations:
        bad = [n for n, value in evaluation.metrics.items() if not math.isfinite(value)]
        if evaluation.step == step and bad:
            figures = ", ".join(f"{name} = {evaluation.metrics[name]}" for name in bad)
            yield f"the final evaluation in {evaluation.precision} gave {figures}"


def restored_notes(engine: Engine) -> tuple[str, ...]:
    """Say which of the model's own writes its evaluations in fp32 have undone."""
    if not engine.restored:
        return ()
    text = (
        f"the model's forward pass writes {', '.join(engine.restored)} in evaluation mode: "
        "evaluated in fp32 it writes into temporary tensors, and the stored values stay"
    )
    return (text,)


def _engine(recipe: Recipe, plan: Plan, device: torch.device) -> Engine:
    model = recipe.build_model()
    optimizer = planned_optimizer(recipe.build_optimizer(model), model, plan)
    return Engine(model, optimizer, plan, device=device)


def _in_full(recipe: Recipe, path: Path) -> tuple[dict[str, Any], list[str]]:
    """Read weights, and which of them are buffers.

    Those of a checkpoint whose optimizer kept their masters come with the masters.
    """
    if not is_checkpoint(path):
        return dict(load_weights(path)), buffers_in(path)
    state = load(path)
    plan = from_json(Plan, state["record"]["plan"])
    weights: dict[str, Any] = state["model"]
    if plan.weights == OWN:
        return weights, state["persistent"]
    engine = _engine(recipe, plan, torch.device("cpu"))
    load_model_state(engine.model, state, engine.device)
    engine.load_optimizer(state["engine"])
    return engine.weights(), state["persistent"]


def _load(engine: Engine, weights: Mapping[str, Any], buffers: Sequence[str]) -> tuple[str, ...]:
    """Load stored weights, and say what of the model's state they do not settle."""
    adopted = adopt_buffers(engine.model, weights, buffers, engine.device)
    state = engine.model.state_dict()
    kept = {
        name: value
        for name, value in state.items()
        if name.rpartition(".")[2] == _EXTRA_STATE and name not in weights
    }
    engine.load_weights({**weights, **kept})
    return tuple(_load_notes(adopted, kept))


def _load_notes(adopted: Sequence[str], kept: Mapping[str, Any]) -> Iterator[str]:
    if adopted:
        yield f"buffers that a forward pass made or resized are from the file: {', '.join(adopted)}"
    if kept:
        yield (
            f"{', '.join(kept)} is as built: exported weights hold tensors alone, and what "
            "get_extra_state() returned is in the checkpoints only"
        )


def _keep_company(
    recipe: Recipe, engine: Engine, dataset: Any, *, taken: int, peers: Peers, call: Call
) -> None:
    """Compute once more, for nothing, where others have a batch and this rank's are used up.

    Without its part of the weights they could not.
    """
    turns = -(-len(dataset) // (recipe.batch_size * peers.size))
    if not peers.cuts or taken == turns:
        return
    ids, batch = next(evaluation_batches(dataset, recipe.batch_size, recipe.collate))
    _measure(recipe, engine.model, to_device(batch, engine.device), len(ids), call)


def _measure(
    recipe: Recipe, model: nn.Module, batch: Any, examples: int, call: Call
) -> dict[str, float]:
    """Return the sums of one batch's metrics over its samples."""
    metrics = call(recipe.compute_metrics, model, batch)
    if "loss" not in metrics:
        metrics = {**metrics, "loss": call(recipe.compute_loss, model, batch)}
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
