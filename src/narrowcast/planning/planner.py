"""From a recipe and a budget to the fastest plan that fits, with all that was weighed.

Nothing is searched blindly. Every plan gets an estimate of its peak (``peaks``) and of its speed
(``speeds``, or ``roofline`` for a device that is not there); from the fastest on, peaks are settled
until a handful of plans is left that fit and could be the choice; these take whole steps in turn.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

import torch

from narrowcast.errors import NarrowcastError, UsageError
from narrowcast.planning.axes import effects_of, loss_of, stores_loss_of
from narrowcast.planning.choice import (
    Candidate,
    Setup,
    choose,
    frontier,
    leagues,
    worth_a_look,
)
from narrowcast.planning.code import code_of, command_of
from narrowcast.planning.peaks import with_data_at_hand
from narrowcast.planning.place import Place, place_named
from narrowcast.planning.space import candidates, plain_plan, policies_for
from narrowcast.planning.telling import impossible, less_room, other_way, passed_over, point_of
from narrowcast.planning.ways import Request, Way, kinds_for, ways_of
from narrowcast.precision.device import environment
from narrowcast.prediction.targets import target_named
from narrowcast.recipes.load import Recipe, load_recipe, option_values
from narrowcast.records.plan import PlanRecord

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
    world: int = 1,
    parallel: str | None = None,
    options: Sequence[str] = (),
    file: str = "plan.json",
    say: Say = _silent,
) -> PlanRecord:
    """Return the fastest plan of a recipe whose predicted peak fits, and the frontier.

    `options` are ``name=value`` for a recipe that is given by name or path. `keep_batch` forbids
    micro-batches, `release` allows gradient release. Where `world` ranks share each batch, the
    budget is that of one of them, and how they share is chosen too, or is `parallel`. `file` is
    where the record will be, for the command that it tells. Raises UsageError, with the least that
    fits, for an impossible budget.
    """
    _require_something(budget_bytes)
    is_loaded = isinstance(recipe, Recipe)
    planner = Planner(
        recipe if isinstance(recipe, Recipe) else load_recipe(recipe, options),
        device=device,
        precisions=precisions,
        keep_batch=keep_batch,
        release=release,
        world=world,
        parallel=parallel,
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
        world: int = 1,
        parallel: str | None = None,
        seed: int = 0,
        say: Say = _silent,
    ) -> None:
        kinds = kinds_for(world, parallel)
        self._place: Place = place_named(device)
        self._recipe = with_data_at_hand(recipe)
        self._precisions = tuple(precisions)
        self._keep_batch = keep_batch
        self._world = world
        self._known: dict[Setup, Candidate] = {}
        """Plans whose peak is settled, and among them those whose steps were taken."""
        self._unfit: dict[Setup, NarrowcastError] = {}
        """Plans that cannot be traced or run here, and why."""
        found = ways_of(
            Request(
                recipe=self._recipe,
                place=self._place,
                policies=policies_for(target_named(self._place.target), precisions),
                keep_batch=keep_batch,
                release=release,
                kinds=kinds,
                world=world,
                seed=seed,
                say=say,
            )
        )
        self.ways: dict[str, Way] = found.each
        """What there is to choose from, by how ranks share; "" is one process."""
        self._finals = found.finals
        said = (note for way in found.each.values() for note in way.space.notes)
        self._notes = list(dict.fromkeys((*found.notes, *said)))
        self._ranked: dict[Setup, Candidate] = {}
        """Every plan with its estimates."""

    def plan(
        self, budget_bytes: int, *, file: str = "plan.json", options: Sequence[str] | None = None
    ) -> PlanRecord:
        """Return the record for a budget. Raises UsageError, with the least that fits."""
        _require_something(budget_bytes)
        began = time.perf_counter()
        if not self._ranked:
            self._ranked = self._estimated()
        usable = self._place.usable_bytes
        room = budget_bytes if usable is None else min(budget_bytes, usable)
        finalists = self._finalists(room)
        chosen, noise, why = choose(finalists)
        return self._record(
            chosen, budget_bytes, room, noise=noise, why=why,
            command=command_of(
                self._recipe, options, file, world=self._world, parallel=chosen.parallel
            ),
            seconds=time.perf_counter() - began,
        )  # fmt: skip

    def _estimated(self) -> dict[Setup, Candidate]:
        """Estimate peak and speed of every plan, in every way to share."""
        found: dict[Setup, Candidate] = {}
        for kind, way in self.ways.items():
            way.peaks.need(plain_plan(way.space))  # what cannot be traced at all is one error
            for plan in candidates(way.space):
                setup = Setup(plan, kind)
                try:
                    size = way.peaks.guess(plan, way.space.micro_batches)
                except NarrowcastError as error:
                    self._leave_out(setup, error)
                    continue
                found[setup] = self._candidate(setup, way, size)
        return found

    def _candidate(self, setup: Setup, way: Way, size: int) -> Candidate:
        plan, kind, batch_norm = setup.plan, setup.parallel, way.space.batch_norm
        return Candidate(
            plan=plan,
            parallel=kind,
            bytes=size,
            traced=False,
            seconds=way.seconds(plan),
            speed="estimated" if self._place.device is not None else "roofline",
            loss=loss_of(plan, batch_norm=batch_norm, parallel=kind),
            stores_loss=stores_loss_of(plan),
            levers=len(effects_of(plan, batch_norm=batch_norm)) + (kind == "fsdp2"),
        )

    def _leave_out(self, setup: Setup, error: NarrowcastError) -> None:
        self._unfit[setup] = error
        note = f"left out {setup.name} and its like: {error.message.splitlines()[0]}"
        if all(error.message.splitlines()[0] not in known for known in self._notes):
            self._notes.append(note)

    def _settled(self, candidate: Candidate, budget: int) -> Candidate | None:
        """Settle a plan's peak; None if it does not fit."""
        setup = candidate.setup
        if setup in self._unfit or candidate.bytes > _GUESS * budget:
            return None
        if setup not in self._known:
            try:
                need = self.ways[setup.parallel].peaks.need(setup.plan)
            except NarrowcastError as error:
                self._leave_out(setup, error)
                return None
            self._known[setup] = replace(self._ranked[setup], bytes=need.bytes, traced=need.traced)
        known = self._known[setup]
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
            for league in leagues(_ranked(self._current())):
                found = worth_a_look(league, fits, most=_FINALISTS, slack=_SLACK)
                if found:
                    break
            alone = next((c for c in league if c.levers == 1 and fits(c) is not None), None)
            others = self._by_other_ways(found, budget)
            names = dict.fromkeys(c.setup for c in (*found, *others, *([alone] if alone else [])))
            unmeasured = [setup for setup in names if self._known[setup].speed == "estimated"]
            if not unmeasured:
                break
            self._measure(unmeasured)
        known = [c for c in self._known.values() if c.setup in names or c.speed == "measured"]
        return [c for c in known if fits(c) is not None] or [self._least(budget)]

    def _by_other_ways(self, found: list[Candidate], budget: int) -> list[Candidate]:
        """Return the fastest that fits by each way to share of which there is none among `found`.

        What a way costs is estimated from one plan. Steps of its best one decide.
        """
        missing = set(self.ways) - {c.parallel for c in found} if found else ()
        best = (self._fastest_by(kind, budget) for kind in missing)
        return [candidate for candidate in best if candidate is not None]

    def _fastest_by(self, kind: str, budget: int) -> Candidate | None:
        """Return the fastest that fits by one way to share; None if no likely one does."""
        likely = leagues([c for c in self._current() if c.parallel == kind and c.need <= budget])
        tried = islice((c for league in likely for c in _ranked(league)), _LEAST_TRIED)
        return next((c for c in tried if self._settled(c, budget) is not None), None)

    def _current(self) -> list[Candidate]:
        """Return every candidate with what is known of it by now."""
        slower = [
            known.seconds / self._ranked[setup].seconds
            for setup, known in self._known.items()
            if known.speed == "measured"
        ]
        factor = statistics.median(slower) if slower else 1.0
        current = []
        for setup, estimate in self._ranked.items():
            known = self._known.get(setup, estimate)
            if setup not in self._unfit:
                seconds = known.seconds * (1 if known.speed == "measured" else factor)
                current.append(replace(known, seconds=seconds))
        return current

    def _measure(self, setups: list[Setup]) -> None:
        if self._finals is None or not setups:
            return
        found, failed = self._finals(setups)
        for setup, error in failed.items():
            self._leave_out(setup, error)
        for setup, measured in found.items():
            known = self._known[setup]
            if measured.peak_bytes > known.bytes:
                self._notes.append(
                    f"{setup.name} took {measured.peak_bytes:,} bytes where {known.bytes:,} were "
                    "predicted"
                )
            self._known[setup] = replace(
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
            self._measure([least.setup])
            least = self._least_known()
        if least.need > budget:
            raise impossible(
                least,
                budget,
                recipe=self._recipe.name,
                batch_size=self._recipe.batch_size,
                world=self._world,
                keep_batch=self._keep_batch,
                all_of=self._place.target if budget == self._place.usable_bytes else "",
            )
        return least

    def _least_known(self) -> Candidate:
        known = [least for kind in self.ways if (least := self._least_by(kind)) is not None]
        if not known:  # the plainest plan was traced, but ranks may fail with every one
            raise next(reversed(self._unfit.values()))
        return min(known, key=lambda c: c.need)

    def _least_by(self, kind: str) -> Candidate | None:
        least: Candidate | None = None
        tried = 0
        alike = (c for c in self._ranked.values() if c.parallel == kind)
        for guess in sorted(alike, key=lambda c: c.bytes):
            if least is not None and (tried == _LEAST_TRIED or guess.bytes > least.need * _GUESS):
                break
            settled = self._settled(guess, guess.bytes * 1000)
            if settled is not None:
                tried += 1
                least = settled if least is None else min(least, settled, key=lambda c: c.need)
        return least

    def _other_ways(self, chosen: Candidate, budget: int) -> Iterator[str]:
        """Say what the fastest is that fits by each other way to share."""
        for kind in self.ways:
            sizes = [c.need for c in self._current() if c.parallel == kind]
            if kind != chosen.parallel and sizes:
                yield other_way(kind, self._fastest_by(kind, budget), min(sizes), budget)

    def _record(
        self, chosen: Candidate, budget: int, room: int, *, noise: float, why: str, command: str,
        seconds: float,
    ) -> PlanRecord:  # fmt: skip
        others = tuple(self._other_ways(chosen, room))
        everything = self._current()
        way = self.ways[chosen.parallel]
        fitting = [c for c in everything if c.bytes <= room]
        notes = (*self._notes, *less_room(budget, room, self._place.target))
        return PlanRecord(
            recipe=self._recipe.name,
            options=option_values(self._recipe),
            batch_size=way.peaks.batch_size,
            world=self._world,
            budget_bytes=budget,
            margin_bytes=way.peaks.margin(),
            keep_batch=self._keep_batch,
            precisions=self._precisions,
            chosen=point_of(chosen),
            why="; ".join((why, *others)),
            effects=effects_of(
                chosen.plan,
                batch_norm=way.space.batch_norm,
                parallel=chosen.parallel,
                world=self._world,
            ),
            frontier=tuple(map(point_of, frontier(everything))),
            considered=len(self._ranked),
            traced=sum(way.peaks.traced for way in self.ways.values()),
            measured=sum(c.speed == "measured" for c in everything),
            noise=noise,
            notes=(*notes, *passed_over(chosen, fitting)),
            command=command,
            code=code_of(chosen.plan, way.peaks.optimizer(chosen.plan), parallel=chosen.parallel),
            device=self._place.name,
            seconds=seconds,
            environment=environment(self._place.device or torch.device("cpu")),
        )


def _ranked(found: Iterable[Candidate]) -> list[Candidate]:
    """Return the fastest first; of equally fast ones the most accurate, and then the plainest."""
    return sorted(found, key=lambda c: (c.seconds, c.loss, c.levers))


def _require_something(budget_bytes: int) -> None:
    if budget_bytes < 1:
        raise UsageError(
            f"a budget of {budget_bytes} bytes holds nothing",
            hint="give an amount of memory, such as --budget 2GiB",
        )
