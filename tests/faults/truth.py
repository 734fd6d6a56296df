"""What a case really does: plain trainings through the engine, in which the diagnosis has no part.

A case is only as good as the fault in it. `Training` takes a recipe's steps in a precision, with
some modules in fp32, and keeps what a symptom is told by; `shows` and `is_well` tell it.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import torch

from faults.catalogue import Case
from narrowcast.data import evaluation_batches, to_device
from narrowcast.errors import PrecisionError
from narrowcast.plan import plan_named
from narrowcast.precision.cast import numeric_settings
from narrowcast.recipes.load import load_recipe
from narrowcast.training.assembly import Assembly, TrainOptions, assemble

CPU = torch.device("cpu")
# Steps at the end whose gradients are looked at: more than one, for batches differ.
_LAST = 4


@dataclass(frozen=True, kw_only=True)
class Training:
    """One training, by what a person could see of it."""

    losses: tuple[float, ...]
    applied: tuple[bool, ...]
    scales: tuple[float, ...]
    gave_up: bool
    loss_before: float
    """On the evaluation data, before the first step."""
    loss_after: float
    moved: dict[str, float]
    """Of each floating-point tensor of the model: the share of its elements that changed."""
    alive: dict[str, float]
    """Of each parameter: the share of its gradient that was not zero in the last steps."""
    alive_above: float
    """The same over all parameters of one more step, at a loss scale of 65,536 or NaN for NaN."""

    @property
    def breaks(self) -> bool:
        """Whether a loss was no number, the engine gave up, or the last steps were all skipped."""
        return (
            self.gave_up
            or not all(math.isfinite(x) for x in (*self.losses, self.loss_after))
            or not any(self.applied[-3:])
        )

    @property
    def skipped(self) -> list[int]:
        return [step for step, applied in enumerate(self.applied) if not applied]


@cache
def training(case: Case, precision: str, keep: tuple[str, ...] = ()) -> Training:
    """Train a case's recipe for its steps; seed 0, as the diagnosis does."""
    plan = plan_named(precision)
    plan = plan.with_policy(plan.policy.keeping_fp32(*keep))
    recipe = load_recipe(case.path, case.options)
    parts = assemble(recipe, plan, TrainOptions(steps=case.steps), CPU)
    model, engine = parts.engine.model, parts.engine
    with numeric_settings(plan.policy):
        before = _state(model)
        loss_before = _evaluation(parts)
        losses, applied, scales, gradients, gave_up = [], [], [], [], False
        for _ in range(case.steps):
            losses.append(_forward_backward(parts))
            gradients.append(_alive(model))
            try:
                report = engine.step()
            except PrecisionError:
                gave_up = True
                break
            applied.append(report.applied)
            scales.append(report.loss_scale)
        after = _state(model)
        loss_after = _evaluation(parts)
        last = gradients[-_LAST:]
        return Training(
            losses=tuple(losses),
            applied=tuple(applied),
            scales=tuple(scales),
            gave_up=gave_up,
            loss_before=loss_before,
            loss_after=loss_after,
            moved={n: (after[n] != before[n]).double().mean().item() for n in before},
            alive={n: statistics.fmean(g.get(n, 0.0) for g in last) for n in last[-1]},
            alive_above=_alive_at(parts, 65536.0),
        )


def _state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: t.detach().clone() for name, t in named if t.is_floating_point() and t.numel()}


def _evaluation(parts: Assembly) -> float:
    """Return the mean loss over the evaluation data, in the training's own precision."""
    model = parts.engine.model.eval()
    with torch.no_grad(), parts.engine.forward():
        values = [
            parts.recipe.compute_loss(model, to_device(batch, CPU)).item()
            for _, batch in evaluation_batches(parts.evaluation_data, 64, parts.recipe.collate)
        ]
    model.train()
    return statistics.fmean(values)


def _forward_backward(parts: Assembly) -> float:
    batch = to_device(next(parts.stream)[1], CPU)
    with parts.engine.forward():
        loss = parts.recipe.compute_loss(parts.engine.model, batch)
    parts.engine.backward(loss)
    return loss.item()


def _alive(model: torch.nn.Module) -> dict[str, float]:
    return {
        name: (p.grad != 0).double().mean().item()
        for name, p in model.named_parameters()
        if p.grad is not None
    }


def _alive_at(parts: Assembly, scale: float) -> float:
    """Return the share of all gradients that is not zero at a scale; NaN if one is not finite."""
    model = parts.engine.model
    batch = to_device(next(parts.stream)[1], CPU)
    with parts.engine.forward():
        loss = parts.recipe.compute_loss(model, batch)
    learnt = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(loss, learnt, torch.full_like(loss, scale), allow_unused=True)
    flat = torch.cat([g.flatten().float() for g in gradients if g is not None])
    return (flat != 0).double().mean().item() if flat.isfinite().all() else math.nan


def progress(found: Training, reference: Training) -> float:
    """Return how far the loss came down, 1 being as far as in the reference."""
    fallen = reference.loss_before - reference.loss_after
    return (found.loss_before - found.loss_after) / fallen if fallen else math.nan


def _of(modules: tuple[str, ...], shares: dict[str, float]) -> float:
    """Return the mean share of the tensors of some modules, or of all where none is named."""
    inside = [v for n, v in shares.items() if not modules or n.rpartition(".")[0] in modules]
    return statistics.fmean(inside)


def _motion(case: Case, found: Training, reference: Training) -> float:
    """Return how much of what moves in the reference moves, 1 being all of it."""
    if case.still:
        return min(found.moved[name] / reference.moved[name] for name in case.still)
    return _of(case.modules, found.moved) / _of(case.modules, reference.moved)


def _liveliness(case: Case, found: Training, reference: Training) -> float:
    """Return how many of the gradients that the reference has there are."""
    return _of(case.modules, found.alive) / _of(case.modules, reference.alive)


def shows(case: Case, found: Training, reference: Training) -> bool:
    """Whether a training has the symptom that the case is said to have."""
    if case.symptom == "breaks":
        return found.breaks
    if case.symptom == "learns less":
        return found.breaks or progress(found, reference) < 0.7
    if case.symptom == "stands still":
        return _motion(case, found, reference) < 0.25
    if case.symptom == "gradients vanish":
        return _liveliness(case, found, reference) < 0.25
    if case.symptom == "skips for ever":
        rows = 1 + sum(b > a + 1 for a, b in pairwise(found.skipped))
        is_late = max(found.skipped, default=0) >= 0.75 * case.steps
        return rows >= 4 and is_late and progress(found, reference) > 0.5
    assert case.symptom == "scale stays low"
    now = _of((), found.alive)
    return now < 0.5 * _of((), reference.alive) and found.alive_above > 0.9


def is_well(case: Case, found: Training, reference: Training) -> bool:
    """Whether a training goes as the reference does, but for rounding and some skips."""
    if found.breaks or len(found.skipped) > case.steps / 2:
        return False
    if case.symptom == "stands still":
        return _motion(case, found, reference) > 0.75
    if case.symptom == "gradients vanish":
        return _liveliness(case, found, reference) > 0.75
    return progress(found, reference) > 0.75
