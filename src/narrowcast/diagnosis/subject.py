"""What is diagnosed: a training that can be begun anew in any precision, always in the same way.

A diagnosis takes the same steps several times (as asked, in fp32, under each remedy), so a recipe
and a plain PyTorch loop both become a `Subject`, which makes as many trainings as are wanted and
never touches the objects that it was made of.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_map_only  # torch's only walker of nests

from narrowcast.data import split_batch, to_device
from narrowcast.engine.engine import Engine
from narrowcast.engine.parts import AskedScale
from narrowcast.engine.stores import planned_optimizer
from narrowcast.errors import NarrowcastError, UsageError
from narrowcast.plan import Plan
from narrowcast.prediction.predict import predict_memory, predict_step_memory
from narrowcast.randomness import isolated, seed_everything
from narrowcast.recipes.load import Recipe, load_again, option_values
from narrowcast.records.memory import MemoryRecord
from narrowcast.records.run import OptionValue
from narrowcast.training.assembly import TrainOptions, assemble
from narrowcast.training.step import StepTaken, Watching, take_step, unwatched
from narrowcast.user_code import user_code

__all__ = [
    "ComputeLoss",
    "Parts",
    "Rig",
    "Subject",
    "Training",
    "subject_of_parts",
    "subject_of_recipe",
]

ComputeLoss = Callable[[nn.Module, Any], Tensor]
Pair = tuple[nn.Module, Optimizer]


@dataclass(frozen=True, kw_only=True)
class Rig:
    """An engine on a model of its own, and the optimizer that it steps."""

    engine: Engine
    optimizer: Optimizer


class Training:
    """A training under way: an engine, and the micro-batches that it has still to take."""

    def __init__(
        self, rig: Rig, compute_loss: ComputeLoss, batches: Iterator[Any], path: Path | None
    ) -> None:
        self.engine = rig.engine
        self.optimizer = rig.optimizer
        self.compute_loss = compute_loss
        self.path = path
        self._batches = batches
        self._waiting: list[Any] = []

    def next_part(self) -> Any:
        """Return the next micro-batch, on the device."""
        if not self._waiting:
            batch = next(self._batches)
            self._waiting = split_batch(batch, self.engine.plan.micro_batches)[::-1]
        return to_device(self._waiting.pop(), self.engine.device)

    def step(self, watching: Watching = unwatched) -> StepTaken:
        """Take one optimizer step; `watching` as in `take_step`."""
        return take_step(
            self.engine, self.compute_loss, self.next_part, path=self.path, watching=watching
        )

    def pass_over(self) -> float:
        """Compute the mean loss of a step's micro-batches, and change no weight."""
        losses = []
        for _ in range(self.engine.plan.micro_batches):
            part = self.next_part()
            with self.engine.forward():
                losses.append(self.compute_loss(self.engine.model, part).detach())
        return sum(value.item() for value in losses) / len(losses)


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A training to diagnose; whatever it makes is new, and the same every time."""

    name: str
    path: Path | None = None
    options: dict[str, OptionValue] = field(default_factory=dict)
    seed: int
    device: torch.device
    steps: int
    """How long the training is meant to be."""
    compute_loss: ComputeLoss
    scale: AskedScale = None
    """What replaces the policy's own loss scaling."""
    typed: str = ""
    """How the command line calls the training; '' for one that it cannot."""
    fresh: Callable[[], Pair]
    """Makes a model as it was before its first step, and its optimizer."""
    begin: Callable[[Plan], Training]
    """Makes a training before its first step, and leaves the random states seeded for it."""
    predict: Callable[[Plan], MemoryRecord]
    """Predicts the memory of a step on a CPU."""
    under_seed: Callable[[int], Subject]
    """Makes the same subject under another seed."""

    def scale_under(self, plan: Plan) -> AskedScale:
        """Return the loss scaling that was asked for, where the plan scales at all."""
        return self.scale if plan.policy.scaling != "none" else None

    def peak(self, plan: Plan) -> int | None:
        """Return the predicted peak of a step in bytes; None where it cannot be predicted.

        That is on a GPU, which would have to be named, and for models that read their tensors.
        """
        if self.device.type != "cpu":
            return None
        try:
            return self.predict(plan).total_peak_bytes
        except NarrowcastError:
            return None

    def rig(self, plan: Plan) -> Rig:
        """Make an engine on a fresh model, as it was before its first step."""
        with isolated(self.seed, "model"):
            model, optimizer = self.fresh()
            model.to(self.device).train()
            optimizer = planned_optimizer(optimizer, model, plan)
            scale = self.scale_under(plan)
            engine = Engine(model, optimizer, plan, device=self.device, scale=scale)
            return Rig(engine=engine, optimizer=optimizer)


def subject_of_recipe(recipe: Recipe, *, seed: int, device: torch.device) -> Subject:
    """Make a subject of a recipe: each training loads it anew, with its globals as at the start."""
    newest = recipe
    given = recipe.overrides.items()

    def begin(plan: Plan) -> Training:
        nonlocal newest
        newest = own = load_again(recipe)
        parts = assemble(own, plan, TrainOptions(seed=seed, measure=False), device)
        parts.engine.model.train()
        batches = (batch for _, batch in parts.stream)
        rig = Rig(engine=parts.engine, optimizer=parts.optimizer)
        return Training(rig, own.compute_loss, batches, own.path)

    def compute_loss(model: nn.Module, batch: Any) -> Tensor:
        return newest.compute_loss(model, batch)

    def fresh() -> Pair:
        # Of the newest: what model(options) needs of data(options) is in that one's globals.
        model = newest.build_model().to(device)
        return model, newest.build_optimizer(model)

    return Subject(
        name=recipe.name,
        path=recipe.path,
        options=option_values(recipe),
        seed=seed,
        device=device,
        steps=recipe.steps,
        typed=" ".join([str(recipe.path), *(f"--set {n}={v}" for n, v in given)]),
        predict=lambda plan: predict_memory(recipe, plan, seed=seed, break_even=False),
        under_seed=lambda other: subject_of_recipe(recipe, seed=other, device=device),
        compute_loss=compute_loss,
        fresh=fresh,
        begin=begin,
    )


def subject_of_parts(
    parts: Parts,
    batches: Iterable[Any],
    *,
    steps: int,
    planned: int,
    seed: int,
    device: torch.device,
    scale: AskedScale = None,
    name: str = "training",
) -> Subject:
    """Make a subject of parts and at most `steps` batches, which are gone round if that is few.

    Raises UsageError where there is no batch.
    """
    held = list(itertools.islice(batches, steps))
    if not held:
        raise UsageError("there is no batch to train on", hint="pass at least one batch")

    def begin(plan: Plan) -> Training:
        rig = subject.rig(plan)
        seed_everything(seed, "training")
        return Training(rig, parts.compute_loss, map(_copied, itertools.cycle(held)), None)

    def predict(plan: Plan) -> MemoryRecord:
        model, optimizer, loss = parts.model, parts.optimizer, parts.loss
        return predict_step_memory(model, optimizer, loss, held[0], plan, break_even=False)

    def under_seed(other: int) -> Subject:
        return subject_of_parts(
            parts,
            held,
            steps=steps,
            planned=planned,
            seed=other,
            device=device,
            scale=scale,
            name=name,
        )

    subject = Subject(
        name=name,
        seed=seed,
        device=device,
        steps=planned,
        compute_loss=parts.compute_loss,
        scale=scale,
        fresh=parts.fresh,
        begin=begin,
        predict=predict,
        under_seed=under_seed,
    )
    return subject


def _copied(batch: Any) -> Any:
    """Copy a batch's tensors: what a loss writes into them is neither the caller's nor shared."""
    return tree_map_only(
        Tensor, lambda t: t.detach().clone().requires_grad_(t.requires_grad), batch
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class Parts:
    """A model, its optimizer and a loss as a plain training has them.

    What exists is copied, and stays as it is. Raises UsageError for an optimizer that exists beside
    a function that makes the model.
    """

    model: nn.Module | Callable[[], nn.Module]
    optimizer: Optimizer | Callable[[nn.Module], Optimizer]
    loss: ComputeLoss

    def __post_init__(self) -> None:
        if isinstance(self.optimizer, Optimizer) and not isinstance(self.model, nn.Module):
            raise UsageError(
                "the model is made by a function and the optimizer exists already: it holds the "
                "parameters of another model",
                hint="pass a function of the model that makes the optimizer",
            )

    def fresh(self) -> Pair:
        """Return a model and an optimizer of its parameters."""
        model, optimizer = self.model, self.optimizer
        with user_code(None, "building the model and the optimizer"):
            if isinstance(model, nn.Module) and isinstance(optimizer, Optimizer):
                return copy.deepcopy((model, optimizer))  # in one copy, as they share the weights
            own = copy.deepcopy(model) if isinstance(model, nn.Module) else model()
            assert not isinstance(optimizer, Optimizer), "refused above"
            return own, optimizer(own)

    def compute_loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Return the loss; what it raises is the user's own."""
        with user_code(None, "loss(model, batch)"):
            return self.loss(model, batch)
