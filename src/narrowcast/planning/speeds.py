"""How long a step takes on the device at hand: short measurements, and estimates between them.

Measuring every plan would take longer than training. A step is forward and backward, which know
nothing of stores, and the optimizer's step, which knows nothing of activations; so a few steps of
plans that differ from the first one in a single choice, and a few updates with each pair of stores,
rank all the others:

    seconds(plan) = seconds(policy) * ratio(activations) * ratio(loss) * ratio(micro-batches)
                    + seconds(update of these stores)

That is an estimate. The choice is made among finalists whose whole steps are taken in turn, so that
a slow minute of the machine meets all of them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch.optim import Optimizer

from narrowcast.data import MapDataset
from narrowcast.engine.stores import planned_optimizer
from narrowcast.memory.measure import MemoryLedger
from narrowcast.plan import OWN, Plan
from narrowcast.planning.axes import NORMS, anonymous, short
from narrowcast.precision.cast import numeric_settings
from narrowcast.precision.speed import thread_count
from narrowcast.profiling import Bench
from narrowcast.recipes.load import Recipe

__all__ = ["Measured", "Speeds", "StepTimes", "in_turn", "peak_of", "summary"]

Key = TypeVar("Key")

_MOST = 9
"""Steps of a short measurement, beside one to warm up; a single one where that is a slow one."""
_PATIENCE_S = 0.4
_ROUNDS, _MOST_ROUNDS = 2, 15
"""In how many rounds finalists take turns."""
_FINAL_S = 1.5
"""Of a finalist's steps altogether, from which on no further round is taken."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Whole steps of one plan."""

    seconds: float
    spread: float
    """Half the distance between the quartiles, as a share of the median."""
    steps: int
    peak_bytes: int


class StepTimes:
    """Steps of a recipe on a device, timed."""

    def __init__(
        self,
        recipe: Recipe,
        device: torch.device,
        data: MapDataset,
        batch: Any,
        *,
        say: Callable[[str], None],
        threads: int | None = None,
    ) -> None:
        """`threads` are torch's while steps are taken; None: as many as there are."""
        self._recipe = recipe
        self._device = device
        self._data = data
        self._batch = batch
        self._say = say
        self._threads = threads

    def of_step(self, plan: Plan) -> float:
        """Return the median of a few whole steps."""
        self._say(f"timing {short(plan)}")
        with self._undisturbed(plan):
            bench = self._bench(plan)
            return statistics.median(_repeated(bench.step, self._device))

    def of_update(self, plan: Plan) -> float:
        """Return the median of a few steps of the plan's optimizer alone, gradients given."""
        self._say(f"timing the update of {plan.weights} weights, {plan.states} states")
        with self._undisturbed(plan):
            optimizer = self._optimizer(plan)
            return statistics.median(_repeated(optimizer.step, self._device))

    def of_finalists(self, plans: Sequence[Plan]) -> dict[Plan, Measured]:
        """Take whole steps of several plans in turn; the first of each under the ledger.

        On a CPU all of them stand ready at once. On a GPU, where they would not fit beside each
        other, each is set up for itself.
        """
        found: dict[Plan, Measured] = {}
        groups = [list(plans)] if self._device.type == "cpu" else [[plan] for plan in plans]
        for group in groups:
            found |= self._in_turn(group)
            if self._device.type == "cuda":
                torch.cuda.empty_cache()
        return found

    def _in_turn(self, plans: list[Plan]) -> dict[Plan, Measured]:
        steps: dict[Plan, Callable[[], float]] = {}
        peaks: dict[Plan, int] = {}
        for plan in plans:
            self._say(f"measuring {short(plan)}")
            with self._undisturbed(plan):
                bench = self._bench(plan)
                peaks[plan] = peak_of(bench.steady_step(warm_up=1))
                steps[plan] = partial(self._seconds_of, plan, bench)
        return {plan: summary(taken, peaks[plan]) for plan, taken in in_turn(steps).items()}

    def _seconds_of(self, plan: Plan, bench: Bench) -> float:
        with self._undisturbed(plan):
            return _seconds(bench.step, self._device)

    def _bench(self, plan: Plan) -> Bench:
        return Bench.of(self._recipe, plan, self._device, data=self._data, batch=self._batch)

    def _optimizer(self, plan: Plan) -> Optimizer:
        model = self._recipe.build_model().to(self._device)
        if plan.weights == OWN and plan.policy.param == "bf16":
            model.to(torch.bfloat16)
        optimizer = planned_optimizer(self._recipe.build_optimizer(model), model, plan)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.randn_like(parameter).mul_(1e-3)
        return optimizer

    @contextmanager
    def _undisturbed(self, plan: Plan) -> Iterator[None]:
        """Leave random states as they were, and compute as the plan's policy wants it."""
        devices = [self._device] if self._device.type == "cuda" else []
        threads = nullcontext() if self._threads is None else thread_count(self._threads)
        with torch.random.fork_rng(devices=devices), numeric_settings(plan.policy), threads:
            torch.manual_seed(0)
            yield


class Speeds:
    """Estimates of the seconds of a step, from measurements that are taken when they are needed."""

    def __init__(self, times: StepTimes, first: Plan) -> None:
        self._times = times
        self._first = anonymous(first)
        """Of all policies, the plan whose levers are measured."""
        self._steps: dict[Plan, float] = {}
        self._updates: dict[tuple[str, str, str], float] = {}

    @property
    def measured(self) -> int:
        """How many plans have taken steps."""
        return len(self._steps)

    def of(self, plan: Plan) -> float:
        """Estimate the seconds of a step; of a plan that was timed, return what was measured."""
        plan = anonymous(plan)
        if plan in self._steps:
            return self._steps[plan]
        seconds = self._computing(self._plain(plan))
        rules = tuple(rule for rule in plan.activations if rule not in NORMS)
        if rules:
            seconds *= self._ratio("activations", (*rules, *self._first.activations))
        for field in ("loss", "micro_batches"):
            if getattr(plan, field) != getattr(self._first, field):
                seconds *= self._ratio(field, getattr(plan, field))
        return seconds + self._update(plan)

    def _plain(self, plan: Plan) -> Plan:
        """Return the plan without levers, but for the norms that its weights always have."""
        norms = tuple(rule for rule in plan.activations if rule in NORMS)
        return replace(self._first, name=plan.name, policy=plan.policy, activations=norms)

    def note(self, plan: Plan, seconds: float) -> None:
        """Replace the estimate of a plan by what whole steps of it took."""
        self._steps[anonymous(plan)] = seconds

    def _ratio(self, field: str, value: object) -> float:
        changed = replace(self._first, **{field: value})  # type: ignore[arg-type]
        return max(self._computing(changed), 1e-9) / self._computing(self._first)

    def _computing(self, plan: Plan) -> float:
        """Return the seconds of forward and backward, with the recipe's own optimizer."""
        if plan not in self._steps:
            self._steps[plan] = self._times.of_step(plan)
        return max(self._steps[plan] - self._update(plan), 0.1 * self._steps[plan])

    def _update(self, plan: Plan) -> float:
        key = (plan.policy.param, plan.weights, plan.states)
        if key not in self._updates:
            self._updates[key] = self._times.of_update(plan)
        return self._updates[key]


def _repeated(run: Callable[[], object], device: torch.device) -> list[float]:
    _seconds(run, device)  # the first makes the optimizer's state and chooses kernels
    taken = [_seconds(run, device)]
    while len(taken) < _MOST and sum(taken) < _PATIENCE_S:
        taken.append(_seconds(run, device))
    return taken


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    """Time one call; on a CPU by the clock or the processor's time, whichever is shorter.

    On a machine that is busy with something else, the clock goes on while we wait; with several
    threads on a quiet one, the processor's time is a multiple of the clock's.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start, worked = time.perf_counter(), time.process_time()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter() - start
    return min(time.perf_counter() - start, time.process_time() - worked)


def in_turn(steps: Mapping[Key, Callable[[], float]]) -> dict[Key, list[float]]:
    """Take steps of several in turn, forwards and backwards; each call returns a step's seconds.

    When to end is decided by the seconds alone: ranks that know the same ones take as many steps.
    """
    times: dict[Key, list[float]] = {key: [] for key in steps}
    for done in range(_MOST_ROUNDS):
        if done >= _ROUNDS and all(sum(taken) >= _FINAL_S for taken in times.values()):
            break
        for key in steps if done % 2 else reversed(list(steps)):
            times[key].append(steps[key]())
    return times


def summary(times: list[float], peak_bytes: int) -> Measured:
    """Return the median of a plan's steps and what they spread by."""
    low, middle, high = statistics.quantiles(times, n=4)
    return Measured(
        seconds=middle,
        spread=(high - low) / 2 / middle,
        steps=len(times),
        peak_bytes=peak_bytes,
    )


def peak_of(ledger: MemoryLedger) -> int:
    """Return the peak that a ledger saw; on a GPU what its allocator reserved."""
    record = ledger.record()
    return record.total_peak_bytes if record.reserved_bytes is None else record.reserved_bytes
