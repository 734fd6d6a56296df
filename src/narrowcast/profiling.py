"""The ledger of one steady training step of a recipe, and where autocast begins to pay.

The third step is measured: the first makes the optimizer's state, the second looks like all others.
The step is the engine's own, so gradients are there from backward until the update.

For autocast policies it is measured in fp32 too, and forward and backward at other batch sizes
until the break-even is known. ``prediction`` takes the same steps on fake tensors.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.optim import Optimizer
from torch.utils._pytree import tree_map_only

from narrowcast.data import (
    BatchStream,
    MapDataset,
    Repeated,
    batch_len,
    evaluation_batches,
    split_batch,
    to_device,
)
from narrowcast.engine.engine import Engine
from narrowcast.engine.stores import planned_optimizer
from narrowcast.errors import PrecisionError, RecipeError
from narrowcast.memory.break_even import Bracket, Sides, break_even_of, search
from narrowcast.memory.measure import MemoryLedger
from narrowcast.memory.storages import tensors_in
from narrowcast.parallel.peers import ALONE, Peers
from narrowcast.plan import Plan
from narrowcast.policy import Policy, policy_named
from narrowcast.precision.cast import backward_context, forward_context, numeric_settings
from narrowcast.recipes.load import Recipe, option_values
from narrowcast.records.memory import BreakEven, MemoryRecord
from narrowcast.user_code import user_code

__all__ = [
    "Bench",
    "Measurements",
    "as_plan",
    "break_even_search",
    "first_batch",
    "measure_recipe",
    "notes_on",
    "sides_of",
]

_WARM_UP_STEPS = 2
_MOST_STEPS = 30  # dynamic loss scaling may have to come down from 2**16 before one is applied
# With real tensors on a CPU, a search that needs more than this is not worth its time.
_MOST_REAL_BYTES = 2**30


def measure_recipe(
    recipe: Recipe,
    plan: Plan | Policy,
    device: torch.device,
    *,
    seed: int = 0,
    break_even: bool = True,
    cross_check: bool = False,
) -> MemoryRecord:
    """Return the ledger of the recipe's third training step, on a model of its own.

    `break_even` adds, for autocast policies, the comparison with fp32; `cross_check` repeats the
    step under torch's MemTracker and records its peak. The global random state is left as it was.
    Raises PrecisionError if no step of the first thirty is applied.
    """
    devices = [device] if device.type == "cuda" else []
    plan = as_plan(plan)
    with torch.random.fork_rng(devices=devices), numeric_settings(plan.policy):
        torch.manual_seed(seed)
        data, batch = first_batch(recipe, recipe.batch_size, seed)
        bench = Bench.of(recipe, plan, device, data=data, batch=batch)
        ledger = bench.steady_step(warm_up=_WARM_UP_STEPS)
        record = ledger.record(recipe=recipe.name, precision=plan.name, batch_size=bench.size)
        notes = (*notes_on(bench, device), *record.notes)
        record = replace(record, options=option_values(recipe), notes=notes)
        if cross_check:
            record = _cross_checked(record, bench, seen=ledger.peak_seen_bytes)
        if break_even and plan.policy.autocasts and plan.policy.linears == "compute":
            record = replace(record, break_even=_break_even(bench, record, ledger))
    return record


def as_plan(asked: Plan | Policy) -> Plan:
    """Return a plan as it is, and a policy as the plan that adds nothing to it."""
    return asked if isinstance(asked, Plan) else Plan(name=asked.name, policy=asked)


@dataclass(frozen=True, kw_only=True)
class Bench:
    """A training set up to take steps on one fixed batch."""

    name: str
    plan: Plan
    model: nn.Module
    optimizer: Optimizer
    engine: Engine
    loss: Callable[[nn.Module, Any], Tensor]
    batch: Any
    path: Path | None = None
    batch_of: Callable[[int], Any]
    """Returns a batch of another size, on the CPU."""
    stepping: AbstractContextManager[Any]
    """What optimizers step under."""
    peers: Peers = ALONE
    """The ranks that share each batch, of which this one takes its part."""
    buckets: Callable[[], list[Tensor]] = list
    """Returns what gradients lie in that no parameter shows between two steps."""

    @classmethod
    def of(
        cls,
        recipe: Recipe,
        plan: Plan,
        device: torch.device,
        *,
        data: MapDataset,
        batch: Any,
        model: nn.Module | None = None,
        stepping: AbstractContextManager[Any] | None = None,
        peers: Peers = ALONE,
    ) -> Bench:
        """Put a recipe's training together on a device, with a batch of its data."""
        model = (recipe.build_model() if model is None else model).to(device)
        optimizer = planned_optimizer(recipe.build_optimizer(model), model, plan)
        return cls(
            name=recipe.name,
            path=recipe.path,
            plan=plan,
            model=model,
            optimizer=optimizer,
            engine=Engine(model, optimizer, plan, device=device, peers=peers),
            loss=recipe.compute_loss,
            batch=to_device(batch, device),
            batch_of=lambda size: _batch_of(recipe, data, size),
            stepping=nullcontext() if stepping is None else stepping,
            peers=peers,
        )

    @property
    def device(self) -> torch.device:
        return self.engine.device

    @property
    def policy(self) -> Policy:
        return self.engine.policy

    @property
    def size(self) -> int:
        return batch_len(self.batch)

    def in_fp32(self) -> Bench:
        """Return the same model and optimizer under the fp32 policy."""
        policy = replace(policy_named("fp32"), keep_fp32=self.policy.keep_fp32)
        plan = replace(self.plan, name=policy.name, policy=policy)
        engine = Engine(self.model, self.optimizer, plan, device=self.device)
        return replace(self, plan=plan, engine=engine)

    def step(self) -> bool:
        """Take one training step; returns whether it was applied."""
        self.model.train()
        applied = False
        for part in split_batch(self.batch, self.plan.micro_batches):
            with self.engine.forward():
                loss = self.loss(self.model, part)
            reads = self.plan.gradients == "release" or self.peers.kind  # numbers, in backward
            around = self.stepping if reads else nullcontext()
            with around, user_code(self.path, "the backward pass"):
                self.engine.backward(loss)
            with self.stepping, user_code(self.path, "the step of the optimizer"):
                applied = self.engine.step().applied
        return applied

    def steady_step(self, *, warm_up: int) -> MemoryLedger:
        """Measure the first applied step after `warm_up` applied ones."""
        applied = 0
        for _ in range(_MOST_STEPS):
            if applied < warm_up:
                applied += self.step()
                continue
            ledger = MemoryLedger(self.model, self.optimizer, device=self.device)
            ledger.gradients(self.buckets())
            with ledger:
                ledger.inputs(self.batch)
                done = self.step()
            if done:
                return ledger
        raise PrecisionError(
            f"no steady step to measure: of {_MOST_STEPS} steps of {self.name} in "
            f"{self.plan.name}, {applied} were applied",
            hint="train it first: `narrowcast train` names what overflows",
        )


def first_batch(
    recipe: Recipe, size: int, seed: int, *, share: tuple[int, int] = (0, 1)
) -> tuple[MapDataset, Any]:
    """Return a recipe's training data, and the batch that a training of this seed begins with.

    Of `share` = (rank, ranks) the rank's part; raises UsageError where they do not divide it.
    """
    data, _ = recipe.load_data()
    _, batch = next(BatchStream(data, size, seed=seed, collate=recipe.collate, share=share))
    return data, batch


def _batch_of(recipe: Recipe, data: MapDataset, size: int) -> Any:
    """Collate the first `size` samples, over and over again where there are fewer."""
    _, batch = next(evaluation_batches(Repeated(data, size), size, recipe.collate))
    return batch


def notes_on(bench: Bench, device: torch.device) -> list[str]:
    """Say what a plan came to on a model that has stepped, and how to read its lines."""
    policy, levers = bench.policy, bench.engine.levers
    notes = [*bench.engine.notes, *levers.notes, *levers.without_effect()]
    if policy.autocasts:
        notes.append(
            "the line 'parameters' holds the fp32 master weights; autocast's copies of them are "
            "the line 'autocast_casts'"
        )
    if policy.autocasts and policy.autocast_rules == "cuda" and device.type == "cpu":
        notes.append("autocast followed CUDA's cast lists, rehearsed on this CPU")
    return notes


def _cross_checked(record: MemoryRecord, bench: Bench, *, seen: int) -> MemoryRecord:
    """Repeat the step under torch's tracker; `seen` is what the ledger saw as such trackers do."""
    # Imported here because it pulls in all of torch.distributed, for this option alone.
    from torch.distributed._tools.mem_tracker import MemTracker

    tracker = MemTracker()
    tracker.track_external(bench.model, bench.optimizer, *tensors_in(bench.batch))
    try:
        with warnings.catch_warnings(action="ignore"), tracker:  # of its own hooks, as they fail
            bench.step()
    except (RecipeError, RuntimeError, AssertionError, KeyError) as error:
        # It follows no model called twice, among others; in a recipe's code it raises a cause.
        cause = error.__cause__ or error
        failed = f"torch's MemTracker could not follow this step: {type(cause).__name__}: {cause}"
        return replace(record, notes=(*record.notes, failed))
    peaks = tracker.get_tracker_snapshot("peak")
    total = sum(peak["Total"] for device, peak in peaks.items() if device.type == record.device)
    difference = record.total_peak_bytes - total
    word = "fewer" if difference > 0 else "more"
    verdict = f"{abs(difference):,} {word} than the ledger" if difference else "equal"
    if difference and total == seen:
        verdict += " (under a mode, autograd does not sum gradients in place)"
    note = f"torch's MemTracker counts {total:,} bytes on a repeat of this step: {verdict}"
    return replace(record, memtracker_peak_bytes=total, notes=(*record.notes, note))


def _break_even(bench: Bench, record: MemoryRecord, ledger: MemoryLedger) -> BreakEven:
    """Search with sizes alone where that is possible, and measure at the answer."""
    fp32 = bench.in_fp32()
    fp32_ledger = fp32.steady_step(warm_up=1)
    size = record.batch_size
    real = Measurements(bench, fp32.policy, known={size: sides_of(ledger, fp32_ledger)})
    fake = _without_contents(real)
    bracket = break_even_search(fake, size)
    if fake is not real and not real.agrees_with(bracket):
        fake = real
        bracket = break_even_search(real, size)
    return break_even_of(
        record, fp32_ledger.record(), bracket, fake.known | real.known, measured=set(real.known)
    )


def break_even_search(measurements: Measurements, size: int) -> Bracket:
    """Find between which batch sizes autocast begins to hold no more than fp32."""
    # Batch norm refuses a batch of one, and nobody trains with it who has the choice.
    return search(measurements.excess, size, least=min(2, size))


def sides_of(autocast: MemoryLedger, fp32: MemoryLedger) -> Sides:
    """Compare two steps; the optimizer's state, the same in both, is left out.

    When backward makes its first operation, autocast's cache is empty and no saved tensor has been
    let go: that is what is held for backward.
    """
    peaks = [ledger.peak_lines("forward", "backward") for ledger in (autocast, fp32)]
    for lines in peaks:
        lines.pop("optimizer_state")
    return Sides(
        autocast=peaks[0],
        fp32=peaks[1],
        autocast_held=autocast.first_lines("backward"),
        fp32_held=fp32.first_lines("backward"),
    )


class Measurements:
    """Forward and backward at any batch size, under autocast and in fp32: `known` holds them all.

    With real tensors only as far as memory is sure to suffice. With fake ones, which have sizes
    and no contents, a batch of thousands costs neither memory nor time but for the batch itself:
    `surroundings` is what they live in, `fake` makes them, and `watching` enters a ledger.
    """

    def __init__(
        self,
        bench: Bench,
        fp32: Policy,
        *,
        known: dict[int, Sides] | None = None,
        surroundings: AbstractContextManager[Any] | None = None,
        fake: Callable[[Any], Any] | None = None,
        watching: Callable[[MemoryLedger], AbstractContextManager[Any]] = lambda ledger: ledger,
    ) -> None:
        self.known = {} if known is None else known
        self.bench = bench
        self.fp32 = fp32
        self._surroundings = nullcontext() if surroundings is None else surroundings
        self._fake = fake
        self._watching = watching

    def excess(self, size: int) -> int | None:
        """Return by how much autocast's peak is above fp32's; None if the batch is too large."""
        if size not in self.known:
            if self._is_too_large(size):
                return None
            autocast = self._ledger(self.bench.policy, size)
            self.known[size] = sides_of(autocast, self._ledger(self.fp32, size))
        return self.known[size].excess

    def agrees_with(self, bracket: Bracket) -> bool:
        """Measure both ends; one that is too large to measure is taken for granted."""
        more = None if bracket.more_at is None else self.excess(bracket.more_at)
        less = None if bracket.less_at is None else self.excess(bracket.less_at)
        return (more is None or more > 0) and (less is None or less <= 0)

    def _ledger(self, policy: Policy, size: int) -> MemoryLedger:
        bench, kind = self.bench, self.bench.device.type
        batch = to_device(bench.batch_of(size), bench.device)
        if self._fake is not None:
            batch = self._fake(batch)
        bench.model.train()
        ledger = MemoryLedger(bench.model, device=bench.device)
        with self._surroundings, self._watching(ledger):
            ledger.inputs(batch)
            with forward_context(policy, kind):
                loss = bench.loss(bench.model, batch)
            with backward_context(policy, kind):
                torch.autograd.backward(loss)
        for parameter in bench.model.parameters():
            parameter.grad = None
        return ledger

    def _is_too_large(self, size: int) -> bool:
        """Whether memory might not suffice: for all, or with fake tensors for the batch alone."""
        if size <= self.bench.size:
            return False
        if self._fake is not None:
            batch = sum(tensor.nbytes for tensor in tensors_in(self.bench.batch))
            return batch * size / self.bench.size > _MOST_REAL_BYTES
        largest = max(self.known)
        peak = sum(self.known[largest].fp32.values())
        free = _MOST_REAL_BYTES
        if self.bench.device.type == "cuda":
            free = torch.cuda.mem_get_info(self.bench.device)[0] // 2
        return peak * size / largest > free


def _without_contents(real: Measurements) -> Measurements:
    """Return the same on fake tensors, or `real` for a GPU or a recipe that reads values.

    They show what operations return, not what a kernel really allocates for it (mse_loss on a CPU
    returns a scalar in the storage of its elementwise result), so that what they find is measured
    with real ones.
    """
    if real.bench.device.type != "cpu":
        return real
    mode = FakeTensorMode()
    try:
        with FakeCopyMode(mode):
            model = copy.deepcopy(real.bench.model)
        fake = Measurements(
            replace(real.bench, model=model),
            real.fp32,
            surroundings=mode,
            fake=lambda batch: tree_map_only(Tensor, mode.from_tensor, batch),
        )
        fake.excess(real.bench.size)
    except Exception:  # noqa: BLE001 -- whatever fake tensors cannot follow, real ones can
        return real
    return fake
