"""The peak of a training step before it is run: the ledger of `narrowcast memory` without memory.

    record = predict_memory("austen", "bf16", options=["size=gpt2"], batch_size=8)

The record has the categories, modules and timeline of a measured one, and says that it was
predicted and what was assumed. On a CPU it is equal to the measured one to the byte, but for the
exceptions in docs/predict.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_map_only

from narrowcast.data import MapDataset, batch_len, to_device
from narrowcast.engine.engine import Engine
from narrowcast.engine.stores import planned_optimizer
from narrowcast.errors import RecipeError, UsageError
from narrowcast.parallel.peers import Peers
from narrowcast.plan import Plan
from narrowcast.policy import Policy
from narrowcast.prediction.advice import advise
from narrowcast.prediction.sharding import (
    assumed_of_ranks,
    imagined_ranks,
    notes_on_ranks,
    sent_by,
    shared,
)
from narrowcast.prediction.targets import Target, target_named
from narrowcast.prediction.trace import Explained, Stage, explaining
from narrowcast.profiling import Bench, as_plan, first_batch, notes_on
from narrowcast.recipes.load import Recipe, load_recipe, option_values
from narrowcast.records.memory import MemoryRecord
from narrowcast.user_code import user_code

__all__ = ["predict_memory", "predict_step_memory"]

_CPU = torch.device("cpu")
Builder = Callable[[Plan, Stage], Bench]


def predict_memory(
    recipe: Recipe | str | Path,
    precision: Plan | Policy | str = "auto",
    *,
    device: str = "cpu",
    batch_size: int | None = None,
    world: int | None = None,
    parallel: str | None = None,
    options: Sequence[str] = (),
    seed: int = 0,
    break_even: bool = True,
) -> MemoryRecord:
    """Return the ledger that `narrowcast memory` would measure of a recipe's third step.

    `options` are ``name=value`` for a recipe that is given by name or path. `device` is ``cpu`` or
    a GPU by name (``prediction.gpus``), which need not be there. `break_even` compares with fp32.
    With `parallel` (``parallel.KINDS``) it is the ledger of one of `world` ranks that share the
    batch, of the one that holds most, and nothing is compared with fp32.
    Raises RecipeError for a recipe that reads values of its tensors, with the line that does;
    UnknownName, UsageError and UnsupportedPrecision for what cannot be asked.
    """
    target = target_named(device)
    plan, _ = target.plan(precision if isinstance(precision, str) else as_plan(precision))
    if not isinstance(recipe, Recipe):
        recipe = load_recipe(recipe, options)
    elif options:
        raise UsageError(
            f"options {list(options)} for a recipe that is loaded already",
            hint="load it with them, or pass its name or path",
        )
    recipe, size = _with_batch_size(recipe, batch_size)
    ranks = imagined_ranks(parallel, world)
    with torch.random.fork_rng(devices=[]), ranks as peers:
        torch.manual_seed(seed)
        data, batch = first_batch(recipe, size, seed, share=(peers.rank, peers.size))
        size_notes = _notes_on_size(batch_len(batch) * peers.size, size)
        notes = [*size_notes, *notes_on_ranks(peers, break_even=break_even)]

        def build(plan: Plan, stage: Stage) -> Bench:
            model, how = _model_of(recipe.build_model, stage, "model(options)")
            notes.extend(note for note in how if note not in notes)
            return _bench(recipe, plan, stage, peers, model=model, data=data, batch=batch)

        with explaining(recipe.name, recipe.path):
            alone = not peers.kind
            record = _predict(build, plan, target, break_even=break_even and alone)
    return replace(record, options=option_values(recipe), notes=(*notes, *record.notes))


def predict_step_memory(
    model: nn.Module | Callable[[], nn.Module],
    optimizer: Optimizer | Callable[[nn.Module], Optimizer],
    loss: Callable[[nn.Module, Any], Tensor],
    batch: Any,
    precision: Plan | Policy | str = "fp32",
    *,
    device: str = "cpu",
    name: str = "step",
    break_even: bool = True,
) -> MemoryRecord:
    """Return the ledger of a training step of any model, loss function and example batch.

    `loss` is called as ``loss(model, batch)``. A function that makes the model costs no memory for
    its weights, and one that makes the optimizer of it must come with it; a model and an optimizer
    that exist are copied without their contents and stay as they are. The optimizer's step is taken
    in the engine's order, as ``narrowcast.Engine`` would.
    """
    target = target_named(device)
    plan, _ = target.plan(precision if isinstance(precision, str) else as_plan(precision))
    if isinstance(optimizer, Optimizer) and not isinstance(model, nn.Module):
        raise UsageError(
            "the model is made by a function and the optimizer exists already: it holds the "
            "parameters of another model",
            hint="pass a function of the model that makes the optimizer",
        )

    notes: list[str] = []

    def build(plan: Plan, stage: Stage) -> Bench:
        fake, its, how = _parts_of(model, optimizer, stage, name)
        notes.extend(note for note in how if note not in notes)
        return _plain_bench(fake, its, loss=loss, batch=batch, plan=plan, stage=stage, name=name)

    with torch.random.fork_rng(devices=[]), explaining(name):
        record = _predict(build, plan, target, break_even=break_even)
    return replace(record, notes=(*notes, *record.notes))


def _predict(build: Builder, plan: Plan, target: Target, *, break_even: bool) -> MemoryRecord:
    """Trace the step on the target's stage and put the record together."""
    stage = target.stage()
    bench = build(target.traced(plan), stage)
    found, ledger = target.trace(bench, stage)
    record = replace(
        found,
        recipe=bench.name,
        precision=plan.name,
        batch_size=bench.size * bench.peers.size,
        parallel=bench.peers.kind,
        ranks=bench.peers.size,
        sent_bytes=sent_by(bench),
        device=target.name,
        predicted=True,
        assumptions=(
            *_assumptions(plan.policy),
            *assumed_of_ranks(bench.peers, target.device),
            *found.assumptions,
        ),
        notes=(*notes_on(bench, target.device), *found.notes),
    )
    is_narrow = plan.policy.compute in ("fp16", "bf16") and plan.policy.linears == "compute"
    if break_even and is_narrow:
        record = advise(record, bench, ledger, stage=stage, build=build)
    return record


def _assumptions(policy: Policy) -> tuple[str, ...]:
    traced = "two steps were traced on tensors with sizes and no contents; nothing was run"
    if policy.scaling == "dynamic":
        return traced, "the loss scale has settled, so that every step is applied"
    return (traced,)


def _with_batch_size(recipe: Recipe, size: int | None) -> tuple[Recipe, int]:
    """Return the recipe for another batch size, where it has such an option, and the size."""
    if size is None:
        return recipe, recipe.batch_size
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise UsageError(f"the batch size is {size!r}", hint="a whole number, at least 1")
    if "batch_size" in {f.name for f in fields(recipe.options)}:
        with user_code(recipe.path, "Options"):
            recipe = replace(recipe, options=replace(recipe.options, batch_size=size))
    return recipe, size


def _notes_on_size(served: int, asked: int) -> list[str]:
    if served == asked:
        return []
    return [
        f"the batch holds {served} samples, as a training's would, though {asked} were asked for"
    ]


def _model_of(
    build: Callable[[], nn.Module], stage: Stage, called: str
) -> tuple[nn.Module, list[str]]:
    """Build the model without contents, or where that cannot be, for real and then without.

    `build` turns what the user's function raises into a RecipeError; `called` names that function.
    """
    try:
        with stage:
            model = build()
        built: list[str] = []
    except RecipeError as error:
        if error.__cause__ is None:
            raise
        model = _really_built(build)
        why = type(error.__cause__).__name__
        built = [f"the model was built in real memory: {called} needs values ({why})"]
    tensors = [*model.parameters(), *model.buffers()]
    if not all(isinstance(tensor, FakeTensor) for tensor in tensors):
        model = stage.copy(model)
    return model, built


def _really_built(build: Callable[[], nn.Module]) -> nn.Module:
    try:
        return build()
    except RecipeError as error:  # with values or without: no matter of a trace
        raise Explained(error.message, hint=error.hint) from error.__cause__


def _bench(
    recipe: Recipe,
    plan: Plan,
    stage: Stage,
    peers: Peers,
    *,
    model: nn.Module,
    data: MapDataset,
    batch: Any,
) -> Bench:
    with stage:
        bench = Bench.of(
            recipe,
            plan,
            _CPU,
            data=data,
            batch=stage.fake(batch),
            model=model,
            stepping=stage.stepping,
            peers=peers,
        )
        return shared(bench, peers)


def _parts_of(
    model: nn.Module | Callable[[], nn.Module],
    optimizer: Optimizer | Callable[[nn.Module], Optimizer],
    stage: Stage,
    name: str,
) -> tuple[nn.Module, Optimizer, list[str]]:
    """Return a model and its optimizer without contents, and what is to be said of the way."""
    if isinstance(optimizer, Optimizer):
        return *stage.copy((model, optimizer)), []
    how: list[str] = []
    if isinstance(model, nn.Module):
        fake = stage.copy(model)
    else:
        make = model

        def build() -> nn.Module:
            with user_code(None, "building the model"):
                return make()

        fake, how = _model_of(build, stage, "the function that makes it")
    making = f"{name}: making the optimizer"
    with explaining(making), stage, user_code(None, making):
        return fake, optimizer(fake), how


def _plain_bench(
    model: nn.Module,
    optimizer: Optimizer,
    *,
    loss: Callable[[nn.Module, Any], Tensor],
    batch: Any,
    plan: Plan,
    stage: Stage,
    name: str,
) -> Bench:
    def computed(model: nn.Module, batch: Any) -> Tensor:
        with user_code(None, "loss(model, batch)"):
            return loss(model, batch)

    with stage:
        fake = to_device(stage.fake(batch), _CPU)
        optimizer = planned_optimizer(optimizer, model.to(_CPU), plan)
        return Bench(
            name=name,
            plan=plan,
            model=model,
            optimizer=optimizer,
            engine=Engine(model, optimizer, plan, device=_CPU),
            loss=computed,
            batch=fake,
            batch_of=lambda size: _resized(fake, size),
            stepping=stage.stepping,
        )


def _resized(batch: Any, size: int) -> Any:
    """Return a fake batch of another size: every tensor whose first dimension is the batch."""
    samples = batch_len(batch)

    def resize(tensor: Tensor) -> Tensor:
        if tensor.dim() == 0 or tensor.shape[0] != samples:
            return tensor
        return tensor.new_empty((size, *tensor.shape[1:]))

    return tree_map_only(Tensor, resize, batch)
