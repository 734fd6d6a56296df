"""From what a user asks to an honest comparison: the protocol of a recipe, and its real trainings.

The protocol is settled here, from the recipe and the request; ``study`` carries it out and
``verdicts`` judges.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from narrowcast.comparison.protocol import derive_seeds, parse_margin, protocol_hash
from narrowcast.comparison.study import Assignment, ComparisonObserver, Trainer, carry_out
from narrowcast.data import evaluation_batches
from narrowcast.errors import RecipeError, UnknownName, UsageError
from narrowcast.plan import PLANS, Plan
from narrowcast.precision.device import environment, require
from narrowcast.precision.float8 import what_it_saves
from narrowcast.randomness import isolated
from narrowcast.recipes.load import Recipe, load_again, option_values
from narrowcast.records.codec import to_json
from narrowcast.records.comparison import ComparisonRecord, Protocol
from narrowcast.records.run import OptionValue, RunRecord
from narrowcast.training.assembly import TrainOptions, data_digest
from narrowcast.training.checkpoint import checkpoints_in
from narrowcast.training.events import Event
from narrowcast.training.run_directory import RunDirectory
from narrowcast.training.train import train

__all__ = ["PlannedComparison", "compare", "default_directory", "plan_comparison"]

REFERENCE = PLANS["fp32"]
# One-sided; the interval that is shown is the two-sided one of 90 %.
CONFIDENCE = 0.95
# A crash loses at most this many steps of the run under way, or a tenth of it.
_STEPS_WORTH_SAVING = 200
_PERTURBATION = "fp32 with weights moved by as few units in the last place as change the first loss"


@dataclass(frozen=True, kw_only=True)
class PlannedComparison:
    """A protocol, and what it takes to carry it out."""

    protocol: Protocol
    recipe: Recipe
    arms: dict[str, Plan]
    device: torch.device
    notes: tuple[str, ...] = field(default=())
    """What was decided for the user, to be printed and recorded."""


def plan_comparison(
    recipe: Recipe,
    plans: Sequence[Plan],
    *,
    seeds: int,
    device: torch.device,
    margin: str | None = None,
    metric: str | None = None,
    steps: int | None = None,
    deterministic: bool = True,
) -> PlannedComparison:
    """Settle everything that the protocol fixes; no step is trained.

    fp32 is the reference, and is added where it was not named. `metric` is by default the first
    that the recipe's ``metrics`` returns; `margin` is '0.01' or '1%'. `deterministic` allows only
    kernels that repeat their bits.

    Raises UsageError for a request that makes no sense, UnknownName for a metric that the recipe
    lacks, UnsupportedPrecision for what the device cannot do, RecipeError and DataError for what
    the recipe does wrong on its first batch.
    """
    arms, notes = _arms(plans)
    for arm in arms:
        require(arm.policy, device)
    notes += tuple(said for said in {what_it_saves(arm.policy): None for arm in arms} if said)
    if steps is not None and steps < 1:
        raise UsageError(f"{steps} steps make no training", hint="take 1 step or more")
    amount, kind = parse_margin(margin)
    chosen = _metric(recipe, metric)
    drawn = derive_seeds(recipe.name, seeds)
    protocol = Protocol(
        recipe=recipe.name,
        options=option_values(recipe),
        metric=chosen,
        direction=recipe.metric_direction(chosen),
        margin=amount,
        margin_text=margin or "",
        margin_kind=kind,
        steps=steps or recipe.steps,
        seeds=drawn,
        reference=REFERENCE.name,
        arms=tuple(arm.name for arm in arms),
        control=_PERTURBATION,
        evaluation_precision=REFERENCE.name,
        confidence=CONFIDENCE,
        device=str(device),
        plans={arm.name: to_json(arm) for arm in arms},
        training=_training(recipe, drawn[0], deterministic=deterministic),
        recipe_digest=recipe.source_hash,
    )
    return PlannedComparison(
        protocol=protocol,
        recipe=recipe,
        arms={arm.name: arm for arm in arms},
        device=device,
        notes=notes,
    )


def _training(recipe: Recipe, seed: int, *, deterministic: bool) -> dict[str, OptionValue]:
    return {
        "batch_size": recipe.batch_size,
        "optimizer": recipe.optimizer_choice[0],
        "data": _data(recipe, seed),
        "deterministic": deterministic,
    }


def default_directory(planned: PlannedComparison, root: Path = Path("runs")) -> Path:
    """Return the directory of this protocol: the same request finds its own runs again."""
    return root / f"compare-{planned.recipe.name}-{protocol_hash(planned.protocol)[:8]}"


def compare(
    planned: PlannedComparison,
    directory: Path,
    *,
    observe: ComparisonObserver = lambda _: None,
    command: str = "",
) -> ComparisonRecord:
    """Carry it out with real trainings; raises what ``study.carry_out`` raises."""
    return carry_out(
        planned.protocol,
        planned.arms,
        directory,
        train=_trainer(planned),
        environment=environment(planned.device),
        observe=observe,
        warnings=planned.notes,
        command=command,
    )


def _arms(plans: Sequence[Plan]) -> tuple[tuple[Plan, ...], tuple[str, ...]]:
    """Put the reference first; refuse a precision that is named twice, or none beside fp32."""
    names = [plan.name for plan in plans]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UsageError(
            f"{', '.join(twice)} is named twice among the precisions {', '.join(names)}",
            hint="name each precision once (16-mixed is fp16, bf16-mixed is bf16, 32-true is fp32)",
        )
    candidates = tuple(plan for plan in plans if plan.name != REFERENCE.name)
    if not candidates:
        raise UsageError(
            "there is nothing to compare fp32 with",
            hint="name at least one precision beside it, as in --precisions fp32,bf16",
        )
    added = f"{REFERENCE.name} was added: every precision is judged against it"
    return (REFERENCE, *candidates), () if REFERENCE.name in names else (added,)


def _metric(recipe: Recipe, asked: str | None) -> str:
    """Return the metric that decides, after seeing which ones the recipe gives on a first batch."""
    with isolated(0, "metric names"), torch.no_grad():
        model = recipe.build_model().eval()
        _, data = recipe.load_data()
        _, batch = next(iter(evaluation_batches(data, recipe.batch_size, recipe.collate)))
        names = list(recipe.compute_metrics(model, batch))
    if asked is None:
        return names[0]
    if asked not in (*names, "loss"):
        raise UnknownName.of("metric", asked, {*names, "loss"})
    return asked


def _data(recipe: Recipe, seed: int) -> str:
    """Return the hash of the data's first batches, after seeing that they can be had twice."""
    first, again = (data_digest(recipe, seed) for _ in range(2))
    if first != again:
        raise RecipeError(
            f"{recipe.path.name}: data(options) gives other data each time it is called",
            hint="draw from torch's, numpy's or Python's global generators, which are seeded, or "
            "from a generator with a fixed seed",
        )
    return first


def _trainer(planned: PlannedComparison) -> Trainer:
    """Return what trains one assignment for real, going on with a run that was interrupted.

    Each training has the recipe to itself, loaded anew: what one arm leaves in its global variables
    (a step counter, a cache) would be another start for the next.
    """
    first = planned.protocol.seeds[0]
    deterministic = bool(planned.protocol.training["deterministic"])

    def train_one(assignment: Assignment, observe: Callable[[Event], None]) -> RunRecord:
        options = TrainOptions(
            steps=assignment.steps,
            seed=assignment.seed,
            perturb=assignment.perturb,
            checkpoint_every=max(_STEPS_WORTH_SAVING, assignment.steps // 10),
            # Memory and dtypes of a step are the same for every seed.
            measure=assignment.seed == first,
            deterministic=deterministic,
        )
        record = train(
            load_again(planned.recipe),
            assignment.plan,
            options,
            assignment.directory,
            device=planned.device,
            observe=observe,
            resume=_can_go_on(assignment.directory),
        )
        if record.status == "finished":
            # Twenty runs of a large model would fill the disk; the final weights stay.
            shutil.rmtree(RunDirectory(assignment.directory).checkpoints)
        return record

    return train_one


def _can_go_on(directory: Path) -> bool:
    """Whether an earlier call left a checkpoint here; what died before its first one is removed."""
    home = RunDirectory(directory)
    if home.holds_a_run() and checkpoints_in(home.checkpoints):
        return True
    if directory.exists():
        shutil.rmtree(directory)
    return False
