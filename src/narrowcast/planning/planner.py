"""From a recipe and a budget to the fastest plan that fits, with all that was weighed.

Nothing is searched blindly. Every plan gets an estimate of its peak (``peaks``) and of its speed
(``speeds``, or ``roofline`` for a device that is not there); from the fastest on, peaks are settled
until a handful of plans is left that fit and could be the choice; these take whole steps in turn.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from narrowcast.errors import NarrowcastError, UsageError
from narrowcast.plan import Plan
from narrowcast.planning.axes import effects_of, loss_of, stores_loss_of
from narrowcast.planning.choice import Candidate, choose, frontier, leagues, worth_a_look
from narrowcast.planning.code import code_of, command_of
from narrowcast.planning.peaks import Peaks, with_data_at_hand
from narrowcast.planning.place import Place, place_named
from narrowcast.planning.roofline import Roofline
from narrowcast.planning.space import candidates, plain_plan, policies_for
from narrowcast.planning.speeds import Speeds, StepTimes
from narrowcast.planning.survey import survey
from narrowcast.precision.device import environment
from narrowcast.prediction.targets import target_named
from narrowcast.profiling import first_batch
from narrowcast.recipes.load import Recipe, load_recipe, option_values
from narrowcast.records.codec import to_json
from narrowcast.records.plan import PlanPoint, PlanRecord
from narrowcast.units import format_bytes, format_duration

__all__ = ["Planner", "plan_recipe"]

Say = Callable[[str], None]
_FINALISTS = 5
# By how much estimates of a step's seconds have been seen to err; what lies within is measured.
_SLACK = 0.3
# A guess at a peak between two traces can lie this much too high.
_GUESS = 1.05
_WALKS = 3
"""How often the measurements of finalists may bring up new ones."""
_LEAST_TRIED = 12
"""Plans whose peaks are settled before a budget is called impossible."""


def _silent(_: str) -> None:
    """Tell nobody."""


def plan_recipe(
    recipe: Recipe | str | Path,
    budget_bytes: int,
    *,
    device: str | None = None,
    precisions: Sequence[str] = ("auto",),
    keep_batch: bool = False,
    release: bool = True,
    options: Sequence[str] = (),
    file: str = "plan.json",
    say: Say = _silent,
) -> PlanRecord:
    """Return the fastest plan of a recipe whose predicted peak fits, and the frontier.

    `options` are ``name=value`` for a recipe that is given by name or path. `keep_batch` forbids
    micro-batches, `release` allows gradient release. `file` is where the record will be, for the
    command that it tells. Raises UsageError, with the least that fits, for an impossible budget.
    """
    _require_something(budget_bytes)
    is_loaded = isinstance(recipe, Recipe)
    planner = Planner(
        recipe if isinstance(recipe, Recipe) else load_recipe(recipe, options),
        device=device,
        precisions=precisions,
        keep_batch=keep_batch,
        release=release,
        say=say,
    )
    return planner.plan(budget_bytes, file=file, options=None if is_loaded else options)


class Planner:
    """Plans one recipe on one device for any budget; what is traced and timed serves all."""

    def __init__(
        self,
        recipe: Recipe,
        *,
        device: str | None = None,
        precisions: Sequence[str] = ("auto",),
        keep_batch: bool = False,
        release: bool = True,
        seed: int = 0,
        say: Say = _silent,
    ) -> None:
        self._place: Place = place_named(device)
        self._recipe = with_data_at_hand(recipe)
        self._precisions = tuple(precisions)
        self._keep_batch = keep_batch
        self._say = say
        self._notes: list[str] = []
        self._known: dict[Plan, Candidate] = {}
        """Plans whose peak is settled, and among them those whose steps were taken."""
        self._unfit: set[Plan] = set()
        """Plans that cannot be traced or run here."""
        policies = policies_for(target_named(self._place.target), precisions)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            data, batch = first_batch(self._recipe, recipe.batch_size, seed)
            self.peaks = Peaks(self._recipe, self._place.target, batch, say=say)
            self.space = survey(
                self._recipe,
                self.peaks,
                policies,
                keep_batch=keep_batch,
                release=release,
                # What the bus costs is measured, and in no roofline.
                offload=self._place.device is not None and self._place.device.type == "cuda",
            )
        self._notes += self.space.notes
        if self._place.device is not None:
            self._times = StepTimes(self._recipe, self._place.device, data, batch, say=say)
            self._speeds: Speeds | Roofline = Speeds(self._times, plain_plan(self.space))
        else:
            self._speeds = Roofline(
                self._recipe, self._place.target, batch, data=data,
                held=self.peaks.bytes_held, say=say,
            )  # fmt: skip
        self._ranked: dict[Plan, Candidate] = {}
        """Every plan with its estimates."""

    def plan(
        self, budget_bytes: int, *, file: str = "plan.json", options: Sequence[str] | None = None
    ) -> PlanRecord:
        """Return the record for a budget. Raises UsageError, with the least that fits."""
        _require_something(budget_bytes)
        began = time.perf_counter()
        if not self._ranked:
            self._ranked = self._estimated()
        finalists = self._finalists(budget_bytes)
        chosen, noise, why = choose(finalists)
        return self._record(
            chosen, budget_bytes, noise=noise, why=why,
            command=command_of(self._recipe, options, file),
            seconds=time.perf_counter() - began,
        )  # fmt: skip

    def _estimated(self) -> dict[Plan, Candidate]:
        """Estimate peak and speed of every plan."""
        found = {}
        self.peaks.need(plain_plan(self.space))  # what cannot be traced at all is one error
        for plan in candidates(self.space):
            try:
                size = self.peaks.guess(plan, self.space.micro_batches)
            except NarrowcastError as error:
                self._leave_out(plan, error)
                continue
            found[plan] = self._candidate(plan, size)
        return found

    def _candidate(self, plan: Plan, size: int) -> Candidate:
        batch_norm = self.space.batch_norm
        return Candidate(
            plan=plan,
            bytes=size,
            traced=False,
            seconds=self._speeds.of(plan),
            speed="estimated" if self._place.device is not None else "roofline",
            loss=loss_of(plan, batch_norm=batch_norm),
            stores_loss=stores_loss_of(plan),
            levers=len(effects_of(plan, batch_norm=batch_norm)),
        )

    def _leave_out(self, plan: Plan, error: NarrowcastError) -> None:
        self._unfit.add(plan)
        note = f"left out {plan.name} and its like: {error.message.splitlines()[0]}"
        if all(error.message.splitlines()[0] not in known for known in self._notes):
            self._notes.append(note)

    def _settled(self, candidate: Candidate, budget: int) -> Candidate | None:
        """Settle a plan's peak; None if it does not fit."""
        plan = candidate.plan
        if plan in self._unfit or candidate.bytes > _GUESS * budget:
            return None
        if plan not in self._known:
            try:
                need = self.peaks.need(plan)
            except NarrowcastError as error:
                self._leave_out(plan, error)
                return None
            self._known[plan] = replace(self._ranked[plan], bytes=need.bytes, traced=need.traced)
        known = self._known[plan]
        return known if self._likely_need(known) <= budget else None

    def _likely_need(self, known: Candidate) -> float:
        """Return what a plan takes; unmeasured, by as much more as measured ones took more."""
        if known.measured_bytes is not None:
            return known.need
        measured = [c for c in self._known.values() if c.measured_bytes is not None]
        return known.bytes * statistics.median(c.need / c.bytes for c in measured or [known])

    def _finalists(self, budget: int) -> list[Candidate]:
        """Return plans that fit, measured where that can be.

        What was measured corrects the estimates of the rest, so that a plan which now looks faster
        gets its turn too.
        """

        def fits(candidate: Candidate) -> Candidate | None:
            return self._settled(candidate, budget)

        for _ in range(_WALKS):
            ranked = sorted(self._current(), key=lambda c: (c.seconds, c.loss, c.levers))
            for league in leagues(ranked):
                found = worth_a_look(league, fits, most=_FINALISTS, slack=_SLACK)
                if found:
                    break
            alone = next((c for c in league if c.levers == 1 and fits(c) is not None), None)
            names = dict.fromkeys(c.plan for c in (*found, *([alone] if alone else [])))
            unmeasured = [plan for plan in names if self._known[plan].speed == "estimated"]
            if not unmeasured:
                break
            self._measure(unmeasured)
        known = [c for c in self._known.values() if c.plan in names or c.speed == "measured"]
        return [c for c in known if fits(c) is not None] or [self._least(budget)]

    def _current(self) -> list[Candidate]:
        """Return every candidate with what is known of it by now."""
        slower = [
            known.seconds / self._ranked[plan].seconds
            for plan, known in self._known.items()
            if known.speed == "measured"
        ]
        factor = statistics.median(slower) if slower else 1.0
        current = []
        for plan, estimate in self._ranked.items():
            known = self._known.get(plan, estimate)
            if plan not in self._unfit:
                seconds = known.seconds * (1 if known.speed == "measured" else factor)
                current.append(replace(known, seconds=seconds))
        return current

    def _measure(self, plans: list[Plan]) -> None:
        if self._place.device is None or not plans:
            return
        assert isinstance(self._speeds, Speeds)
        for plan, measured in self._times.of_finalists(plans).items():
            known = self._known[plan]
            if measured.peak_bytes > known.bytes:
                self._notes.append(
                    f"{plan.name} took {measured.peak_bytes:,} bytes where {known.bytes:,} were "
                    "predicted"
                )
            self._known[plan] = replace(
                known,
                seconds=measured.seconds,
                speed="measured",
                spread=measured.spread,
                measured_bytes=measured.peak_bytes,
            )

    def _least(self, budget: int) -> Candidate:
        """Return the plan that takes the least, if it fits; raises UsageError with how much it is.

        At hand its steps are taken, and should they take more than was predicted, it is another.
        """
        least = self._least_known()
        while self._place.device is not None and least.speed != "measured":
            self._measure([least.plan])
            least = self._least_known()
        if least.need > budget:
            raise self._impossible(budget, least)
        return least

    def _least_known(self) -> Candidate:
        least: Candidate | None = None
        tried = 0
        for guess in sorted(self._ranked.values(), key=lambda c: c.bytes):
            if least is not None and (tried == _LEAST_TRIED or guess.bytes > least.need * _GUESS):
                break
            settled = self._settled(guess, guess.bytes * 1000)
            if settled is not None:
                tried += 1
                least = settled if least is None else min(least, settled, key=lambda c: c.need)
        assert least is not None, "the plainest plan was traced before anything else"
        return least

    def _impossible(self, budget: int, least: Candidate) -> UsageError:
        batch = " while the batch is kept whole" if self._keep_batch else ""
        known = "predicted" if least.measured_bytes is None else "measured"
        if least.need > least.bytes:
            known += f" where {least.bytes:,} were predicted"
        return UsageError(
            f"nothing trains {self._recipe.name} (batch {self.peaks.batch_size}) in "
            f"{format_bytes(budget)}{batch}: the least that fits is {format_bytes(least.need)} "
            f"({least.need:,} bytes, {known}), with {least.plan.name}",
            hint="allow that much, or choose a smaller model or batch with --set"
            + (", or leave --keep-batch out" if self._keep_batch else ""),
        )

    def _passed_over(self, chosen: Candidate, budget: int) -> Iterator[str]:
        """Name the plan that a roofline calls the fastest, if that was no reason to choose it."""
        fits = [c for c in self._current() if c.bytes <= budget]
        fastest = min((chosen, *fits), key=lambda c: c.seconds)
        if fastest.speed == "roofline" and fastest.stores_loss > chosen.stores_loss:
            yield (
                f"{fastest.plan.name} would take {format_duration(fastest.seconds)} by the "
                "roofline; its stores round more, and a bound alone is no reason to choose them"
            )

    def _record(
        self, chosen: Candidate, budget: int, *, noise: float, why: str, command: str,
        seconds: float,
    ) -> PlanRecord:  # fmt: skip
        everything = self._current()
        optimizer = self.peaks.rule(chosen.plan)
        return PlanRecord(
            recipe=self._recipe.name,
            options=option_values(self._recipe),
            batch_size=self.peaks.batch_size,
            budget_bytes=budget,
            margin_bytes=self.peaks.margin(),
            keep_batch=self._keep_batch,
            precisions=self._precisions,
            chosen=_point(chosen),
            why=why,
            effects=effects_of(chosen.plan, batch_norm=self.space.batch_norm),
            frontier=tuple(map(_point, frontier(everything))),
            considered=len(self._ranked),
            traced=self.peaks.traced,
            measured=sum(c.speed == "measured" for c in everything),
            noise=noise,
            notes=(*self._notes, *self._passed_over(chosen, budget)),
            command=command,
            code=code_of(chosen.plan, optimizer),
            device=self._place.name,
            seconds=seconds,
            environment=environment(self._place.device or torch.device("cpu")),
        )


def _require_something(budget_bytes: int) -> None:
    if budget_bytes < 1:
        raise UsageError(
            f"a budget of {budget_bytes} bytes holds nothing",
            hint="give an amount of memory, such as --budget 2GiB",
        )


def _point(candidate: Candidate) -> PlanPoint:
    return PlanPoint(
        name=candidate.plan.name,
        plan=to_json(candidate.plan),
        exact=candidate.loss == 0,
        predicted_bytes=candidate.bytes,
        traced=candidate.traced,
        seconds=candidate.seconds,
        speed=candidate.speed,
        spread=candidate.spread,
        measured_bytes=candidate.measured_bytes,
    )
