"""The peak of any plan from a few traced steps.

Forward and backward do not know what the optimizer holds: remainders and moments lie there from the
step's beginning to its end. So one trace of a computation, with the recipe's own optimizer, tells
the peak with any stores:

    peak = max(forward and backward without states  +  bytes of these stores,
               the optimizer's step)

A batch in many parts is traced as two parts of that size, since all but the first are alike; of the
inputs the whole batch is counted. Under DDP the last one, in which gradients meet, is not like
those before it, and three parts are traced. Sparse gradients grow with every part: there all are.

What the step itself needs beside them is at most fourteen ranges of its tensors (``optim.step``).
Where that bound does not stay below the other phases, the step of these stores is traced, once.
For GPUs, whose allocator rounds, for ranks, whose gradients meet in buffers, and where gradients
are released in the midst of backward, each plan is traced for itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from types import ModuleType
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from narrowcast.data import batch_len, split_batch
from narrowcast.engine.stores import planned_optimizer
from narrowcast.errors import NarrowcastError, RecipeError
from narrowcast.memory.storages import tensors_in
from narrowcast.optim.narrow import NarrowOptimizer
from narrowcast.optim.states import fitted, state_store
from narrowcast.optim.step import CHUNK
from narrowcast.optim.weights import weight_store
from narrowcast.parallel.shards import rows_of
from narrowcast.plan import OWN, Plan
from narrowcast.planning.axes import anonymous, short
from narrowcast.prediction.predict import predict_memory
from narrowcast.prediction.targets import target_named
from narrowcast.prediction.trace import Stage
from narrowcast.recipes.load import Recipe
from narrowcast.records.memory import MemoryRecord

__all__ = ["Need", "Peaks", "model_without_contents", "with_data_at_hand"]

# optim.step.CHUNK: a step has at most fourteen fp32 ranges of this many elements alive, and there
# is the table of as many that noise is made from (rounding).
_STEP_BYTES = (14 + 1) * 4 * CHUNK
_CLOSE = 1.05
"""A bound within this of what is sure is taken as it is: too much, never too little."""


@dataclass(frozen=True)
class Need:
    """What a plan takes, and whether that is a prediction of the very plan."""

    bytes: int
    traced: bool


@dataclass(frozen=True)
class _Phases:
    """Peaks without what the optimizer holds: of forward and backward, and of its own step."""

    computing: int
    releasing: int
    """Of forward and backward with no gradient alive but the largest one."""
    stepping: int
    beside: int
    """What is needed beyond the bytes of tensors: a GPU's reserve for them, and the margin."""


class Peaks:
    """Predicts for one recipe, device and way to share; every trace is made once."""

    def __init__(
        self,
        recipe: Recipe,
        target: str,
        batch: Any,
        *,
        say: Callable[[str], None],
        world: int = 1,
        parallel: str = "",
    ) -> None:
        """`batch` is what a process has of each batch: where `world` ranks share, its part."""
        self.share = batch_len(batch)
        """How many samples of a step one process computes."""
        self.batch_size = self.share * world
        self._world = world
        self._parallel = parallel
        self._shown = 3 if parallel == "ddp" else 2
        """As how many parts a batch in more of them is traced."""
        self._batch_bytes = sum(tensor.nbytes for tensor in tensors_in(batch))
        self._batch = batch
        self._recipe = recipe
        self._target = target
        self._say = say
        self._records: dict[Plan, MemoryRecord] = {}
        self._failures: dict[Plan, NarrowcastError] = {}
        self._phases: dict[Plan, _Phases] = {}
        self._held: dict[tuple[object, ...], int] = {}
        self._steps: dict[tuple[object, ...], int] = {}
        self._losses: dict[int, int] = {}
        self._largest = 0

    @property
    def traced(self) -> int:
        """How many steps have been predicted."""
        return len(self._records)

    def margin(self) -> int:
        """Return what predictions for this device leave free; the most that one of them stated."""
        return max((record.margin_bytes or 0 for record in self._records.values()), default=0)

    def need(self, plan: Plan) -> Need:
        """Return the predicted peak of a plan; for a GPU what is reserved, and the margin."""
        is_traced = self._target != "cpu" or self._parallel
        if is_traced or plan.gradients == "release" or plan.weights == OWN:
            return Need(self._required(plan), traced=True)
        held, phases = self.bytes_held(plan), self._phases_of(plan)
        least = max(phases.computing, phases.stepping) + held
        most = max(phases.computing, phases.stepping + _STEP_BYTES) + held
        if most <= _CLOSE * least:
            return Need(most, traced=False)
        return Need(max(phases.computing + held, self._stepping(plan)), traced=False)

    def guess(self, plan: Plan, parts: tuple[int, ...]) -> int:
        """Return about what a plan takes, from traces of the whole batch and of its least part.

        Between the two, what grows with the batch is taken to grow evenly. `parts` are the numbers
        of micro-batches that there are, ascending.
        """
        if self._is_traced(plan):
            return self._required(plan)
        held = self.bytes_held(plan)
        whole = self._phases_of(replace(plan, micro_batches=1))
        if plan.gradients == "release":
            return whole.releasing + held + whole.beside
        computing, stepping = whole.computing, whole.stepping
        if plan.micro_batches > 1:
            least = self._phases_of(replace(plan, micro_batches=parts[-1]))
            share = (1 / plan.micro_batches - 1 / parts[-1]) / (1 - 1 / parts[-1])
            computing = round(least.computing + share * (computing - least.computing))
            stepping = least.stepping
        is_close = stepping + _STEP_BYTES > _CLOSE * computing
        if self._target == "cpu" and plan.weights != OWN and is_close:
            stepping = max(stepping, self._alike(plan))
        return max(computing, stepping) + held + whole.beside

    def _required(self, plan: Plan) -> int:
        return _required_by(self._record(plan)) + self._left_out(plan)

    def _phases_of(self, plan: Plan) -> _Phases:
        """Trace what a plan computes with the recipe's own optimizer."""
        bare = anonymous(replace(plan, weights=OWN, states=OWN, gradients="keep"))
        if bare not in self._phases:
            self._phases[bare] = _phases_in(
                self._record(bare),
                largest_gradient=self._largest_gradient(plan),
                unseen=self._left_out(bare),
            )
        return self._phases[bare]

    def _is_traced(self, plan: Plan) -> bool:
        return self._traced_as(plan) in self._records

    def _traced_as(self, plan: Plan) -> Plan:
        """Return the plan as a trace follows it: tf32 holds what fp32 does."""
        return anonymous(target_named(self._target).traced(plan))

    def _record(self, plan: Plan) -> MemoryRecord:
        key = self._traced_as(plan)
        if key not in self._records:
            if key in self._failures:
                raise self._failures[key]
            self._say(f"traced {len(self._records)} steps, now {short(plan)}")
            try:
                self._records[key] = self._traced(key)
            except NarrowcastError as error:
                self._failures[key] = error
                raise
        return self._records[key]

    def _traced(self, plan: Plan) -> MemoryRecord:
        shown, size = plan, None
        if plan.micro_batches > self._shown and not self._sparse:
            shown = replace(plan, micro_batches=self._shown)
            size = self._shown * (self.share // plan.micro_batches) * self._world
        return predict_memory(
            self._recipe,
            shown,
            device=self._target,
            batch_size=size,
            world=self._world if self._parallel else None,
            parallel=self._parallel or None,
            break_even=False,
        )

    def sent_bytes(self, plan: Plan, parts: tuple[int, ...]) -> int:
        """Return what a rank sends a step: activations, loss and stores change nothing of it.

        Weights are gathered for each part of a batch, and gradients meet with the last; where there
        are several, sums are sent in place of gradients. `parts` are as in `guess`.
        """
        plain = replace(
            plan, weights=OWN, states=OWN, gradients="keep", activations=(), loss="whole"
        )
        most = parts[-1] if plan.micro_batches > 1 else 1
        sent = dict(self._record(replace(plain, micro_batches=most)).sent_bytes)
        gathered = sent.pop("all_gather", 0) * plan.micro_batches // min(most, self._shown)
        return gathered + sum(sent.values())

    def _left_out(self, plan: Plan) -> int:
        """Return the bytes of the parts that a trace left out: inputs, and one loss each."""
        parts = plan.micro_batches
        return self._inputs_left_out(parts) + self._losses_left_out(parts)

    def _inputs_left_out(self, parts: int) -> int:
        if self._sparse:
            return 0
        return round(self._batch_bytes * (1 - min(self._shown / parts, 1)))

    def _losses_left_out(self, parts: int) -> int:
        if parts <= self._shown or self._sparse:
            return 0
        if parts not in self._losses:
            self._losses[parts] = self._loss_bytes(parts)
        return self._losses[parts] * (parts - self._shown)

    def _loss_bytes(self, parts: int) -> int:
        """Return what the loss of a part holds until the step: more than a number on a CPU.

        There mse_loss returns its sum in the storage of its elementwise result.
        """
        stage = target_named(self._target).stage()
        model = model_without_contents(self._recipe, stage).train()
        with stage, stage.above():
            part = stage.fake(split_batch(self._batch, parts)[0])
            return self._recipe.compute_loss(model, part).untyped_storage().nbytes()

    def _stepping(self, plan: Plan) -> int:
        """Return the peak of the update of these stores: the same whatever was computed before."""
        key = self._stores(plan)
        if key not in self._steps:
            parts = 1 if plan.micro_batches == 1 else self._fewest
            plain = replace(plan, activations=(), loss="whole", micro_batches=parts)
            unseen = self._inputs_left_out(parts)
            found = _phases_in(self._record(plain), largest_gradient=0, unseen=unseen)
            self._steps[key] = found.stepping
        losses = self._losses_left_out(plan.micro_batches)
        return self._steps[key] + self.bytes_held(plan) + losses

    @cached_property
    def _fewest(self) -> int:
        """Into how few parts a batch can be cut, if it is cut."""
        return next(n for n in range(2, self.share + 1) if self.share % n == 0)

    def _alike(self, plan: Plan) -> int:
        """Return what an update needs beside what it holds, with other weights if that is known.

        What is read, rounded and written is above all the states.
        """
        *family, _ = self._stores(plan)
        for (*known, _), peak in self._steps.items():
            if known == family:
                return peak
        return self._stepping(plan) - self.bytes_held(plan)

    @staticmethod
    def _stores(plan: Plan) -> tuple[object, ...]:
        # Where gradients are summed, bf16 ones have an fp32 sum beside them.
        summed = plan.micro_batches > 1
        return plan.policy.param, plan.policy.keep_fp32, summed, plan.states, plan.weights

    def bytes_held(self, plan: Plan) -> int:
        """Return the bytes of remainders and moments, from the stores themselves."""
        if plan.weights == OWN:
            plain = replace(plan, activations=(), loss="whole", micro_batches=1)
            return _held_in(self._record(plain).timeline[0].categories)
        key = self._stores(plan)
        if key not in self._held:
            self._held[key] = self._held_by_stores(plan)
        return self._held[key]

    def optimizer(self, plan: Plan) -> Optimizer:
        """Return the optimizer that the plan steps with, of tensors without contents."""
        stage = Stage()
        model = model_without_contents(self._recipe, stage)
        with stage:
            return planned_optimizer(self._recipe.build_optimizer(model), model, plan)

    def _held_by_stores(self, plan: Plan) -> int:
        optimizer = self.optimizer(plan)
        assert isinstance(optimizer, NarrowOptimizer)
        return sum(_held_by(optimizer, group, self._own) for group in optimizer.param_groups)

    def _own(self, parameter: Tensor) -> int:
        """Return how many elements of a parameter this process holds, of ranks the first one."""
        if self._parallel != "fsdp2" or parameter.numel() == 0 or parameter.dim() == 0:
            return parameter.numel()
        _, rows = rows_of(parameter.shape[0], 0, self._world)
        return rows * (parameter.numel() // parameter.shape[0])

    @cached_property
    def elements(self) -> int:
        """How many numbers of the weights this process updates."""
        model = model_without_contents(self._recipe, Stage())
        return sum(map(self._own, model.parameters()))

    @cached_property
    def _sparse(self) -> bool:
        """Whether embeddings say that their gradients are sparse."""
        model = model_without_contents(self._recipe, Stage())
        return any(
            isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.sparse
            for module in model.modules()
        )

    def _largest_gradient(self, plan: Plan) -> int:
        if not self._largest:
            model = model_without_contents(self._recipe, Stage())
            self._largest = max(p.numel() for p in model.parameters())
        return self._largest * (2 if plan.policy.param != "fp32" else 4)


def _held_by(
    optimizer: NarrowOptimizer, group: dict[str, Any], own: Callable[[Tensor], int]
) -> int:
    weights, states = weight_store(group["weights"]), state_store(group["states"])
    moments = optimizer.rule.moments(group)
    total = 0
    for parameter in group["params"]:
        count, held = parameter.numel(), own(parameter)  # the whole decides the store
        total += weights.nbytes(held) - held * weights.dtype.itemsize
        total += sum(fitted(states, count).nbytes(held, moment) for moment in moments)
    return total


def _held_in(categories: dict[str, int]) -> int:
    return categories.get("optimizer_state", 0) + categories.get("master_weights", 0)


def _phases_in(record: MemoryRecord, *, largest_gradient: int, unseen: int) -> _Phases:
    computing = releasing = stepping = 0
    for point in record.timeline:
        rest = point.bytes - _held_in(point.categories) + unseen
        if point.phase == "optimizer":
            stepping = max(stepping, rest)
        else:
            computing = max(computing, rest)
            gradients = point.categories.get("gradients", 0)
            releasing = max(releasing, rest - max(gradients - largest_gradient, 0))
    beside = _required_by(record) - record.total_peak_bytes
    return _Phases(computing, releasing, stepping, beside)


def _required_by(record: MemoryRecord) -> int:
    """Return a record's peak; on a GPU what its allocator reserves, and the margin."""
    peak = record.total_peak_bytes if record.reserved_bytes is None else record.reserved_bytes
    return peak + (record.margin_bytes or 0)


def model_without_contents(recipe: Recipe, stage: Stage) -> nn.Module:
    """Build the recipe's model of fake tensors, in real memory first if it looks at values."""
    try:
        with stage:
            return recipe.build_model()
    except RecipeError:
        copied: nn.Module = stage.copy(recipe.build_model())
        return copied


def with_data_at_hand(recipe: Recipe) -> Recipe:
    """Return the recipe with its data loaded once: every trace begins with the same first batch."""
    loaded: list[Any] = []
    module = ModuleType(recipe.module.__name__)
    module.__dict__.update(recipe.module.__dict__)

    def data(options: Any) -> Any:
        if not loaded:
            loaded.append(recipe.module.data(options))
        return loaded[0]

    module.__dict__["data"] = data
    return replace(recipe, module=module)
