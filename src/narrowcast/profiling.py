"""The ledger of one steady training step of a recipe, and where autocast begins to pay.

The third step is measured: the first makes the optimizer's state, the second is the first that
looks like all others. The step is the engine's own, so gradients are there from backward until the
update and nowhere else.

For autocast policies the same step is measured in fp32 too, and forward and backward at other batch
sizes until the break-even is known (``break_even``).
"""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.optim import Optimizer
from torch.utils._pytree import tree_map_only

from narrowcast.data import BatchStream, MapDataset, batch_len, evaluation_batches, to_device
from narrowcast.engine.engine import Engine
from narrowcast.errors import PrecisionError, RecipeError
from narrowcast.memory.break_even import Bracket, Sides, break_even_of, search
from narrowcast.memory.measure import MemoryLedger
from narrowcast.memory.storages import tensors_in
from narrowcast.policy import Policy, policy_named
from narrowcast.precision.cast import backward_context, forward_context, numeric_settings
from narrowcast.recipes.load import Recipe, option_values
from narrowcast.records.memory import BreakEven, MemoryRecord

__all__ = ["measure_recipe"]

_WARM_UP_STEPS = 2
# Dynamic loss scaling may have to come down from 2**16 before the first step is applied.
_MOST_STEPS = 30
# With real tensors on a CPU, a search that needs more than this is not worth its time.
_MOST_REAL_BYTES = 2**30


def measure_recipe(
    recipe: Recipe,
    policy: Policy,
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
    with torch.random.fork_rng(devices=devices), numeric_settings(policy):
        torch.manual_seed(seed)
        bench = _Bench.of(recipe, policy, device, seed)
        ledger = _steady_step(bench, warm_up=_WARM_UP_STEPS)
        record = replace(
            ledger.record(recipe=recipe.name, precision=policy.name, batch_size=bench.size),
            options=option_values(recipe),
        )
        record = replace(record, notes=(*_notes(policy, device), *record.notes))
        if cross_check:
            record = _cross_checked(record, bench)
        if break_even and policy.autocasts:
            record = replace(record, break_even=_break_even(bench, record, ledger))
    return record


@dataclass(frozen=True, kw_only=True)
class _Bench:
    """A recipe set up to take steps on one fixed batch."""

    recipe: Recipe
    policy: Policy
    device: torch.device
    model: nn.Module
    optimizer: Optimizer
    engine: Engine
    data: MapDataset
    batch: Any

    @classmethod
    def of(cls, recipe: Recipe, policy: Policy, device: torch.device, seed: int) -> _Bench:
        data, _ = recipe.load_data()
        _, batch = next(BatchStream(data, recipe.batch_size, seed=seed, collate=recipe.collate))
        model = recipe.build_model()
        optimizer = recipe.build_optimizer(model)
        engine = Engine(model, optimizer, policy, device=device)
        return cls(
            recipe=recipe,
            policy=policy,
            device=device,
            model=model,
            optimizer=optimizer,
            engine=engine,
            data=data,
            batch=to_device(batch, device),
        )

    @property
    def size(self) -> int:
        return batch_len(self.batch)

    def in_fp32(self) -> _Bench:
        """Return the same model and optimizer under the fp32 policy."""
        policy = replace(policy_named("fp32"), keep_fp32=self.policy.keep_fp32)
        engine = Engine(self.model, self.optimizer, policy, device=self.device)
        return replace(self, policy=policy, engine=engine)

    def step(self) -> bool:
        """Take one training step; returns whether it was applied."""
        self.model.train()
        with self.engine.forward():
            loss = self.recipe.compute_loss(self.model, self.batch)
        self.engine.backward(loss)
        return self.engine.step().applied


def _batch_of(recipe: Recipe, data: MapDataset, size: int) -> Any:
    """Collate the first `size` samples, over and over again where there are fewer."""
    _, batch = next(evaluation_batches(_Repeated(data, size), size, recipe.collate))
    return batch


@dataclass(frozen=True)
class _Repeated:
    """The first `length` samples of an endless repetition of a dataset."""

    data: MapDataset
    length: int

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int, /) -> Any:
        return self.data[index % len(self.data)]


def _steady_step(bench: _Bench, *, warm_up: int) -> MemoryLedger:
    """Measure the first applied step after `warm_up` applied ones."""
    applied = 0
    for _ in range(_MOST_STEPS):
        if applied < warm_up:
            applied += bench.step()
            continue
        ledger = MemoryLedger(bench.model, bench.optimizer, device=bench.device)
        with ledger:
            ledger.inputs(bench.batch)
            done = bench.step()
        if done:
            return ledger
    raise PrecisionError(
        f"no steady step to measure: of {_MOST_STEPS} steps of {bench.recipe.name} in "
        f"{bench.policy.name}, {applied} were applied",
        hint="train it first: `narrowcast train` names what overflows",
    )


def _notes(policy: Policy, device: torch.device) -> list[str]:
    notes = []
    if policy.autocasts:
        notes.append(
            "the line 'parameters' holds the fp32 master weights; autocast's copies of them are "
            "the line 'autocast_casts'"
        )
    if policy.autocasts and policy.autocast_rules == "cuda" and device.type == "cpu":
        notes.append("autocast followed CUDA's cast lists, rehearsed on this CPU")
    return notes


def _cross_checked(record: MemoryRecord, bench: _Bench) -> MemoryRecord:
    """Repeat the step under torch's own tracker and record what it counts."""
    # Imported here because it pulls in all of torch.distributed, for this option alone.
    from torch.distributed._tools.mem_tracker import MemTracker

    tracker = MemTracker()
    tracker.track_external(bench.model, bench.optimizer, *tensors_in(bench.batch))
    try:
        with tracker:
            bench.step()
    except (RecipeError, RuntimeError, AssertionError, KeyError) as error:
        # It follows no model that is called twice in a step, among others; what it raises inside
        # the recipe's own code arrives as the cause of a RecipeError.
        cause = error.__cause__ or error
        failed = f"torch's MemTracker could not follow this step: {type(cause).__name__}: {cause}"
        return replace(record, notes=(*record.notes, failed))
    peaks = tracker.get_tracker_snapshot("peak")
    total = sum(peak["Total"] for device, peak in peaks.items() if device.type == record.device)
    difference = record.total_peak_bytes - total
    word = "fewer" if difference > 0 else "more"
    verdict = f"{abs(difference):,} {word} than the ledger" if difference else "equal"
    note = f"torch's MemTracker counts {total:,} bytes on a repeat of this step: {verdict}"
    return replace(record, memtracker_peak_bytes=total, notes=(*record.notes, note))


def _break_even(bench: _Bench, record: MemoryRecord, ledger: MemoryLedger) -> BreakEven:
    """Search with sizes alone where that is possible, and measure at the answer."""
    fp32 = bench.in_fp32()
    fp32_ledger = _steady_step(fp32, warm_up=1)
    size = record.batch_size
    real = _Measurements(bench, fp32.policy, {size: _sides(ledger, fp32_ledger)})
    fake = real.with_fake_tensors()
    # Batch norm refuses a batch of one, and nobody trains with it who has the choice.
    least = min(2, size)
    bracket = search(fake.excess, size, least=least)
    if fake is not real and not real.agrees_with(bracket):
        fake = real
        bracket = search(real.excess, size, least=least)
    return break_even_of(
        record, fp32_ledger.record(), bracket, fake.known | real.known, measured=set(real.known)
    )


def _sides(autocast: MemoryLedger, fp32: MemoryLedger) -> Sides:
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


class _Measurements:
    """Forward and backward at any batch size, under autocast and in fp32: `known` holds them all.

    With real tensors only as far as memory is sure to suffice. With fake ones, which have sizes
    and no contents, a batch of thousands costs neither memory nor time; they see what operations
    return, not what a kernel really allocates for it (mse_loss on a CPU returns a scalar in the
    storage of its elementwise result), so that what they find is measured with real ones.
    """

    def __init__(self, bench: _Bench, fp32: Policy, known: dict[int, Sides]) -> None:
        self.known = known
        self._bench = bench
        self._fp32 = fp32
        self._model = bench.model
        self._fake: FakeTensorMode | None = None

    def with_fake_tensors(self) -> _Measurements:
        """Return the same on fake tensors, or this one for a GPU or a recipe that reads values."""
        if self._bench.device.type != "cpu":
            return self
        fake = _Measurements(self._bench, self._fp32, {})
        fake._fake = FakeTensorMode()
        try:
            with FakeCopyMode(fake._fake):
                fake._model = copy.deepcopy(self._bench.model)
            fake.excess(self._bench.size)
        except Exception:  # noqa: BLE001 -- whatever fake tensors cannot follow, real ones can
            return self
        return fake

    def excess(self, size: int) -> int | None:
        """Return by how much autocast's peak is above fp32's; None if the batch is too large."""
        if size not in self.known:
            if self._fake is None and self._is_too_large(size):
                return None
            autocast = self._ledger(self._bench.policy, size)
            self.known[size] = _sides(autocast, self._ledger(self._fp32, size))
        return self.known[size].excess

    def agrees_with(self, bracket: Bracket) -> bool:
        """Measure both ends; one that is too large to measure is taken for granted."""
        more = None if bracket.more_at is None else self.excess(bracket.more_at)
        less = None if bracket.less_at is None else self.excess(bracket.less_at)
        return (more is None or more > 0) and (less is None or less <= 0)

    def _ledger(self, policy: Policy, size: int) -> MemoryLedger:
        bench, kind = self._bench, self._bench.device.type
        batch = to_device(_batch_of(bench.recipe, bench.data, size), bench.device)
        surroundings: AbstractContextManager[Any] = nullcontext()
        if self._fake is not None:
            batch = tree_map_only(Tensor, self._fake.from_tensor, batch)
            surroundings = self._fake
        self._model.train()
        ledger = MemoryLedger(self._model, device=bench.device)
        with surroundings, ledger:
            ledger.inputs(batch)
            with forward_context(policy, kind):
                loss = bench.recipe.compute_loss(self._model, batch)
            with backward_context(policy, kind):
                torch.autograd.backward(loss)
        for parameter in self._model.parameters():
            parameter.grad = None
        return ledger

    def _is_too_large(self, size: int) -> bool:
        largest = max(self.known)
        peak = sum(self.known[largest].fp32.values())
        free = _MOST_REAL_BYTES
        if self._bench.device.type == "cuda":
            free = torch.cuda.mem_get_info(self._bench.device)[0] // 2
        return peak * size / largest > free
