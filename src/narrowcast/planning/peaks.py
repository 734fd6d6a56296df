"""The peak of any plan from a few traced steps.

Forward and backward do not know what the optimizer holds: weights' remainders and moments lie there
from the step's beginning to its end. So one trace of a computation, with the recipe's own optimizer,
tells the peak with any stores:

    peak = max(forward and backward without states  +  bytes of these stores,
               the optimizer's step)

What the step itself needs beside them is at most fourteen ranges of its tensors (``optim.step``).
Where that bound stays below the other phases, the sum is the prediction of the plan itself, to the
byte; where it does not, and for GPUs, whose allocator rounds, the plan is traced.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

from torch import nn

from narrowcast.engine.stores import planned_optimizer
from narrowcast.errors import RecipeError
from narrowcast.optim.narrow import NarrowOptimizer
from narrowcast.optim.states import fitted, state_store
from narrowcast.optim.step import CHUNK
from narrowcast.optim.weights import weight_store
from narrowcast.plan import OWN, Plan
from narrowcast.planning.axes import short
from narrowcast.prediction.predict import predict_memory
from narrowcast.prediction.trace import Stage
from narrowcast.recipes.load import Recipe
from narrowcast.records.memory import MemoryRecord

__all__ = ["Need", "Peaks", "model_without_contents", "with_data_at_hand"]

# optim.step.CHUNK: a step has at most fourteen fp32 ranges of this many elements alive.
_STEP_BYTES = 14 * 4 * CHUNK


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


class Peaks:
    """Predicts for one recipe and device; every trace is made once."""

    def __init__(self, recipe: Recipe, target: str, *, say: Callable[[str], None]) -> None:
        self._recipe = recipe
        self._target = target
        self._say = say
        self._records: dict[Plan, MemoryRecord] = {}
        self._phases: dict[Plan, _Phases] = {}
        self._held: dict[tuple[object, ...], int] = {}
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
        composes = self._target == "cpu" and plan.gradients == "keep" and plan.weights != OWN
        if composes and not self._is_traced(plan):
            held, phases = self._bytes_held(plan), self._phases_of(plan)
            if phases.stepping + _STEP_BYTES <= phases.computing:
                return Need(phases.computing + held, traced=False)
        return Need(_required(self._record(plan)), traced=True)

    def guess(self, plan: Plan, parts: tuple[int, ...]) -> int:
        """Return about what a plan takes, from traces of the whole batch and of its least part.

        Between the two, what grows with the batch is taken to grow evenly. `parts` are the numbers
        of micro-batches that there are, ascending.
        """
        if self._is_traced(plan):
            return _required(self._record(plan))
        held = self._bytes_held(plan)
        whole = self._phases_of(replace(plan, micro_batches=1))
        computing = whole.releasing if plan.gradients == "release" else whole.computing
        if plan.micro_batches > 1:
            least = self._phases_of(replace(plan, micro_batches=parts[-1])).computing
            share = (1 / plan.micro_batches - 1 / parts[-1]) / (1 - 1 / parts[-1])
            computing = round(least + share * (computing - least))
        return max(computing, whole.stepping if plan.gradients == "keep" else 0) + held

    def _phases_of(self, plan: Plan) -> _Phases:
        """Trace what a plan computes with the recipe's own optimizer."""
        bare = _anonymous(replace(plan, weights=OWN, states=OWN, gradients="keep"))
        if bare not in self._phases:
            self._phases[bare] = _phases_in(self._record(bare), self._largest_gradient(plan))
        return self._phases[bare]

    def _is_traced(self, plan: Plan) -> bool:
        return _anonymous(plan) in self._records

    def _record(self, plan: Plan) -> MemoryRecord:
        key = _anonymous(plan)
        if key not in self._records:
            self._say(f"traced {len(self._records)} steps, now {short(plan)}")
            self._records[key] = predict_memory(
                self._recipe, key, device=self._target, break_even=False
            )
        return self._records[key]

    def _bytes_held(self, plan: Plan) -> int:
        """Return the bytes of remainders and moments, from the stores themselves."""
        if plan.weights == OWN:
            plain = replace(plan, activations=(), loss="whole", micro_batches=1)
            return _held_in(self._record(plain).timeline[0].categories)
        key = (plan.policy.param, plan.policy.keep_fp32, plan.weights, plan.states)
        if key not in self._held:
            self._held[key] = self._held_by_stores(plan)
        return self._held[key]

    def _held_by_stores(self, plan: Plan) -> int:
        stage = Stage()
        model = model_without_contents(self._recipe, stage)
        with stage:
            optimizer = planned_optimizer(self._recipe.build_optimizer(model), model, plan)
        assert isinstance(optimizer, NarrowOptimizer)
        return sum(_held_by(optimizer, group) for group in optimizer.param_groups)

    def _largest_gradient(self, plan: Plan) -> int:
        if not self._largest:
            model = model_without_contents(self._recipe, Stage())
            self._largest = max(p.numel() for p in model.parameters())
        return self._largest * (2 if plan.policy.param != "fp32" else 4)


def _held_by(optimizer: NarrowOptimizer, group: dict[str, Any]) -> int:
    weights, states = weight_store(group["weights"]), state_store(group["states"])
    moments = optimizer.rule.moments(group)
    total = 0
    for parameter in group["params"]:
        count = parameter.numel()
        total += weights.nbytes(count) - count * weights.dtype.itemsize
        total += sum(fitted(states, count).nbytes(count, moment) for moment in moments)
    return total


def _held_in(categories: dict[str, int]) -> int:
    return categories.get("optimizer_state", 0) + categories.get("master_weights", 0)


def _phases_in(record: MemoryRecord, largest_gradient: int) -> _Phases:
    computing = releasing = stepping = 0
    for point in record.timeline:
        rest = point.bytes - _held_in(point.categories)
        if point.phase == "optimizer":
            stepping = max(stepping, rest)
        else:
            computing = max(computing, rest)
            gradients = point.categories.get("gradients", 0)
            releasing = max(releasing, rest - max(gradients - largest_gradient, 0))
    return _Phases(computing, releasing, stepping)


def _required(record: MemoryRecord) -> int:
    if record.reserved_bytes is None:
        return record.total_peak_bytes
    return record.reserved_bytes + (record.margin_bytes or 0)


def _anonymous(plan: Plan) -> Plan:
    """Return the plan without its name, which changes no byte."""
    return replace(plan, name="", policy=replace(plan.policy, name=""))


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
