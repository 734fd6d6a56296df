"""From a recipe, a plan and options to everything that a training loop turns.

The order is fixed and every part is seeded for itself: data, then the model in fp32, then its
hash, and only then the policy's cast. Two runs of one seed in two precisions therefore start from
the same fp32 weights, and the hashes in their records prove it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from narrowcast import __version__
from narrowcast.activations.rules import load_rounding_state, rounding_state
from narrowcast.compiling import backend_named
from narrowcast.data import BatchStream, evaluation_batches, to_device
from narrowcast.engine.engine import Engine
from narrowcast.engine.ranks import share
from narrowcast.engine.stores import planned_optimizer
from narrowcast.errors import ParallelError, UsageError
from narrowcast.parallel.peers import ALONE, Peers
from narrowcast.parallel.replicas import LossFunction, Replicas
from narrowcast.parallel.shards import Shards
from narrowcast.plan import Plan
from narrowcast.policy import POLICIES
from narrowcast.precision.cast import numeric_settings, weights_became
from narrowcast.precision.speed import thread_count
from narrowcast.randomness import isolated, seed_everything
from narrowcast.recipes.load import Recipe, option_values
from narrowcast.records.codec import to_json
from narrowcast.training import checkpoint
from narrowcast.training.perturbation import perturb
from narrowcast.training.sharded import own_part, write_shards
from narrowcast.watch.watch import EVERY

__all__ = [
    "Assembly",
    "TrainOptions",
    "assemble",
    "batch_digest",
    "data_digest",
    "identity_of",
    "round_apart",
    "steps_of",
    "stream_of",
    "unasked",
]


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """What a training is asked, beside recipe and precision."""

    steps: int | None = None
    """Optimizer steps, applied and skipped; None: what the recipe says."""
    seed: int = 0
    accumulate: int = 1
    """Micro-batches a step."""
    clip_norm: float | None = None
    evaluate_every: int | None = None
    """Steps between evaluations; None: only after the last one."""
    checkpoint_every: int | None = None
    """Steps between checkpoints; None: a tenth of the steps."""
    perturb: bool = False
    """Start a few units in the last place away: the control run of a comparison."""
    measure: bool = True
    """Measure what the device does badly, executed dtypes and memory, before and on early steps."""
    deterministic: bool = True
    """Allow deterministic kernels only, without which a resumed run cannot be exact."""
    watch: int = EVERY
    """Steps between looks at the values that cross module borders; 0: nothing is watched."""
    compile: str = ""
    """Backend of torch.compile for the model's calls; '': none."""
    shadow: bool = False
    """Hold the loss of these steps against what fp32 gives on the same weights and batch."""

    def __post_init__(self) -> None:
        backend_named(self.compile)
        for name in ("steps", "accumulate", "evaluate_every", "checkpoint_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name} is {value}", hint="it must be 1 or more")
        if self.watch < 0:
            raise UsageError(f"watch is {self.watch}", hint="it is a number of steps, 0 for never")
        if self.shadow and not self.watch:
            raise UsageError(
                "a shadow in fp32 was asked for, and the watch is off",
                hint="leave --watch at 100, or give the number of steps between two shadows",
            )
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise UsageError(f"clip_norm is {self.clip_norm}", hint="it must be greater than 0")


@dataclass(frozen=True, kw_only=True)
class Assembly:
    """The parts of one training, ready for its first step."""

    recipe: Recipe
    engine: Engine
    optimizer: Optimizer
    stream: BatchStream
    evaluation_data: Any
    replicas: Replicas | Shards | None
    """The model on several ranks."""
    peers: Peers
    initial_weights_hash: str
    """Of all weights and buffers, in fp32, before the policy's cast and after a perturbation."""
    perturbation: str

    @property
    def notes(self) -> tuple[str, ...]:
        """Say what is other than asked: of the engine, and of a batch that has fewer samples."""
        notes = unasked(self.engine)
        asked, served = self.recipe.batch_size, self.stream.batch_size
        if served == asked:
            return notes
        why = "which is all that data() gives"
        return (*notes, f"a batch holds {served:,} samples, {why}, though {asked:,} were asked for")

    @property
    def compute_loss(self) -> LossFunction:
        """The recipe's loss; on several ranks with gradients that meet."""
        return (self.replicas or self.recipe).compute_loss

    def own_part(self, state: dict[str, Any], directory: Path) -> dict[str, Any]:
        """Return what of a saved state this process goes on with; all of it, if nothing is cut."""
        if not isinstance(self.replicas, Shards):
            return state
        path = checkpoint.path_of(directory, state["step"])
        return own_part(state, path, self.engine, self.replicas)

    def share_out(self, state: dict[str, Any], directory: Path) -> dict[str, Any]:
        """Return what one file is to hold of a state; ranks write their parts of it beside it."""
        if not isinstance(self.replicas, Shards):
            return state
        path = checkpoint.path_of(directory, state["step"])
        return write_shards(state, path, self.engine, self.replicas)

    def measure(
        self, function: Callable[[nn.Module, Any], Any], model: nn.Module, batch: Any
    ) -> Any:
        """Call a function of the model without gradients; on shards on all ranks at once."""
        if isinstance(self.replicas, Shards):
            return self.replicas.measure(function, model, batch)
        return function(model, batch)


def unasked(engine: Engine) -> tuple[str, ...]:
    """Return an engine's notes but for fp32 weights that are kept as the precision says."""
    as_asked = weights_became("fp32", engine.policy.param)
    return tuple(note for note in engine.notes if not note.startswith(as_asked))


def steps_of(recipe: Recipe, options: TrainOptions) -> int:
    """Return the planned steps: as asked, or as the recipe says."""
    return options.steps or recipe.steps


def assemble(
    recipe: Recipe,
    plan: Plan,
    options: TrainOptions,
    device: torch.device,
    peers: Peers = ALONE,
) -> Assembly:
    """Build every part, and leave the random states seeded for training.

    With `peers` all ranks have the same weights, and each its share of every batch and a random
    stream of its own. Raises DataError for empty data, RecipeError for what the recipe does wrong,
    ParallelError if it builds other weights on another rank.
    """
    if options.shadow and peers.cuts:
        raise UsageError(
            f"a shadow in fp32 needs whole weights, and of {peers.kind} a rank has a part of each",
            hint="leave out --shadow, or use --parallel ddp",
        )
    seed_everything(options.seed, "data")
    training_data, evaluation_data = recipe.load_data()
    seed_everything(options.seed, "model")
    model = recipe.build_model()
    perturbation = _perturbed(recipe, model, training_data, options) if options.perturb else ""
    fingerprint = checkpoint.fingerprint(model.state_dict())
    _require_same_start(fingerprint, peers)
    model.to(device)
    optimizer = planned_optimizer(recipe.build_optimizer(model), model, plan)
    engine = Engine(
        model,
        optimizer,
        plan,
        scheduler=recipe.build_scheduler(optimizer, steps_of(recipe, options)),
        accumulate=options.accumulate,
        clip_norm=options.clip_norm,
        device=device,
        peers=peers,
        compile=options.compile,
    )
    stream = BatchStream(
        training_data,
        recipe.batch_size,
        seed=options.seed,
        collate=recipe.collate,
        share=(peers.rank, peers.size),
    )
    round_apart(model, peers.rank)
    seed_everything(options.seed, stream_of(peers.rank))
    return Assembly(
        recipe=recipe,
        engine=engine,
        optimizer=optimizer,
        stream=stream,
        evaluation_data=evaluation_data,
        replicas=share(engine, recipe.compute_loss, peers),
        peers=peers,
        initial_weights_hash=fingerprint,
        perturbation=perturbation,
    )


def _perturbed(recipe: Recipe, model: nn.Module, data: Any, options: TrainOptions) -> str:
    """Move the weights by a few units in the last place; returns how."""
    _, batch = next(BatchStream(data, recipe.batch_size, seed=options.seed, collate=recipe.collate))
    with numeric_settings(POLICIES["fp32"]):
        on_cpu = to_device(batch, "cpu")
        return perturb(model, recipe.compute_loss, on_cpu, seed=options.seed)


def stream_of(rank: int) -> str:
    """Name the random stream that a rank trains on; rank 0's is that of a single process."""
    return f"training on rank {rank}" if rank else "training"


def round_apart(model: nn.Module, rank: int) -> None:
    """Let lossy levers round on this rank otherwise than on rank 0, whose state the model has.

    Equal roundings on all ranks would not average out over them.
    """
    state = rounding_state(model)
    if state and rank:
        load_rounding_state(model, {**state, "seed": state["seed"] + (rank << 32)})


def _require_same_start(fingerprint: str, peers: Peers) -> None:
    others = peers.gather(fingerprint)
    differing = [rank for rank, other in enumerate(others) if other != others[0]]
    if differing:
        raise ParallelError(
            f"model(options) made other weights on rank {differing[0]} than on rank 0",
            hint="draw weights from torch's, numpy's or Python's global random states only, which "
            "are seeded alike on every rank",
        )


def data_digest(recipe: Recipe, seed: int) -> str:
    """SHA-256 (hex) of the first training batch and the first evaluation batch at this seed.

    Loads the data, on random streams of its own; batches are hashed by their tensors. Data that
    differ only in later samples are not told apart.
    """
    with isolated(seed, "data"):
        training, evaluation = recipe.load_data()
        size, collate = recipe.batch_size, recipe.collate
        _, first = next(BatchStream(training, size, seed=seed, collate=collate))
        _, second = next(evaluation_batches(evaluation, size, collate))
    return checkpoint.fingerprint(
        {**dict(_tensors("training", first)), **dict(_tensors("evaluation", second))}
    )


def batch_digest(batch: Any) -> str:
    """SHA-256 (hex) of a batch by its tensors."""
    return checkpoint.fingerprint(dict(_tensors("batch", batch)))


def _tensors(name: str, nest: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor of a batch with its place in it; dense copies, which share nothing."""
    if isinstance(nest, Tensor):
        yield name, nest.detach().to_dense().clone(memory_format=torch.contiguous_format)
    elif isinstance(nest, Mapping):
        for key, item in nest.items():
            yield from _tensors(f"{name}.{key}", item)
    elif isinstance(nest, (list, tuple)):
        for index, item in enumerate(nest):
            yield from _tensors(f"{name}.{index}", item)


def identity_of(
    recipe: Recipe, plan: Plan, options: TrainOptions, device: torch.device
) -> dict[str, Any]:
    """Return what must not differ if a run is to go on exactly, by the names that users know.

    How often to evaluate, to save and to watch and whether to measure may differ: they change no
    bit of it.
    """
    free = {"steps", "evaluate_every", "checkpoint_every", "measure", "watch", "shadow"}
    with thread_count(1):  # sums in data() may round by the number of threads
        data = data_digest(recipe, options.seed)
    return {
        "recipe": recipe.name,
        "recipe source": recipe.source_hash,
        "data": data,
        "options": option_values(recipe),
        "steps": steps_of(recipe, options),
        "plan": to_json(plan),
        "device": device.type,
        **{name: value for name, value in asdict(options).items() if name not in free},
        "versions": {"narrowcast": __version__, "torch": torch.__version__},
    }
