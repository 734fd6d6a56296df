"""The ways in which a training can be done: in one process, or by ranks that share it.

Each way has its own peaks and its own choices. What a step takes is measured on the device at hand,
by ranks in as many processes as there will be, or bounded by a roofline. On ranks at hand

    seconds(plan, way) = seconds of the plan in one process, on a rank's part of the batch
                         + what sharing costs

with the cost of the plain plan, whose steps are taken in both. Where there are more ranks than
cores, what they take from each other is in it too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from narrowcast.data import MapDataset
from narrowcast.errors import NarrowcastError, UnknownName, UsageError
from narrowcast.parallel.together import KINDS
from narrowcast.plan import Plan
from narrowcast.planning.choice import Setup
from narrowcast.planning.launch import RankTimes
from narrowcast.planning.peaks import Peaks
from narrowcast.planning.place import Place
from narrowcast.planning.roofline import Roofline
from narrowcast.planning.space import Space, plain_plan
from narrowcast.planning.speeds import Measured, Speeds, StepTimes
from narrowcast.planning.survey import survey
from narrowcast.policy import Policy
from narrowcast.profiling import first_batch
from narrowcast.recipes.load import Recipe

__all__ = ["Request", "Way", "Ways", "kinds_for", "ways_of"]

Surveyed = dict[str, tuple[Peaks, Space]]
Finals = tuple[dict[Setup, Measured], dict[Setup, NarrowcastError]]
"""What whole steps took, and which setups failed."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is to be planned."""

    recipe: Recipe
    place: Place
    policies: tuple[Policy, ...]
    keep_batch: bool
    release: bool
    kinds: tuple[str, ...]
    """The ways to share that are considered; none: one process."""
    world: int
    seed: int
    say: Callable[[str], None]

    @property
    def on_cuda(self) -> bool:
        """Whether a GPU is at hand."""
        return self.place.device is not None and self.place.device.type == "cuda"


@dataclass(frozen=True, kw_only=True)
class Way:
    """One way to do the training: what there is to choose from, and what a choice takes."""

    peaks: Peaks
    space: Space
    seconds: Callable[[Plan], float]
    """Estimates the seconds of a step, or bounds them."""


@dataclass(frozen=True, kw_only=True)
class Ways:
    """All that are possible, by how ranks share."""

    each: dict[str, Way]
    finals: Callable[[Sequence[Setup]], Finals] | None = None
    """Takes whole steps of several setups in turn; None where no step can be taken."""
    notes: tuple[str, ...] = ()


def kinds_for(world: int, parallel: str | None) -> tuple[str, ...]:
    """Return the ways to share that are to be considered: none for one process, else all or one.

    Raises UnknownName and UsageError for what cannot be asked.
    """
    if parallel is not None and parallel not in KINDS:
        raise UnknownName.of("kind of parallel training", parallel, KINDS)
    if isinstance(world, bool) or not isinstance(world, int) or world < 1:
        raise UsageError(f"the number of ranks is {world!r}", hint="a whole number, at least 1")
    if world == 1 and parallel is not None:
        raise UsageError(
            f"one process shares with nobody, and --parallel {parallel} was given",
            hint="say how many ranks there are, such as --world 2, or leave --parallel out",
        )
    if world == 1:
        return ()
    return KINDS if parallel is None else (parallel,)


def ways_of(request: Request) -> Ways:
    """Return the ways that a recipe can be trained in.

    Raises what makes all of them impossible; of one that is, a note says why.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(request.seed)
        share = (0, request.world)
        size = request.recipe.batch_size
        data, batch = first_batch(request.recipe, size, request.seed, share=share)
        if request.kinds:
            return _shared(request, data, batch)
        return _alone(request, data, batch)


def _alone(request: Request, data: MapDataset, batch: Any) -> Ways:
    peaks = Peaks(request.recipe, request.place.target, batch, say=request.say)
    space = _surveyed(request, peaks)
    device = request.place.device
    if device is None:
        return Ways(each=_bounded(request, data, batch, {"": (peaks, space)}))
    times = StepTimes(request.recipe, device, data, batch, say=request.say)
    seconds = Speeds(times, plain_plan(space)).of

    def finals(setups: Sequence[Setup]) -> Finals:
        found = times.of_finalists([setup.plan for setup in setups])
        return {Setup(plan): measured for plan, measured in found.items()}, {}

    return Ways(each={"": Way(peaks=peaks, space=space, seconds=seconds)}, finals=finals)


def _surveyed(request: Request, peaks: Peaks) -> Space:
    return survey(
        request.recipe,
        peaks,
        request.policies,
        keep_batch=request.keep_batch,
        release=request.release and not request.kinds,  # a gradient that is gone meets no other
        # What the bus costs is measured, and in no roofline.
        offload=request.on_cuda,
    )


def _bounded(request: Request, data: MapDataset, batch: Any, found: Surveyed) -> dict[str, Way]:
    """Return ways with a roofline; what is computed is counted once for all of them."""
    roofline = Roofline(request.recipe, request.place.target, batch, data=data, say=request.say)

    def way(peaks: Peaks, space: Space) -> Way:
        def seconds(plan: Plan) -> float:
            sent = peaks.sent_bytes(plan, space.micro_batches) if request.kinds else 0
            held = peaks.bytes_held(plan)
            return roofline.of(plan, elements=peaks.elements, held_bytes=held, sent_bytes=sent)

        return Way(peaks=peaks, space=space, seconds=seconds)

    return {kind: way(*each) for kind, each in found.items()}


def _shared(request: Request, data: MapDataset, batch: Any) -> Ways:
    refused: dict[str, NarrowcastError] = {}
    found = _ways_to_share(request, batch, refused)
    device = request.place.device
    if device is None:
        return Ways(each=_bounded(request, data, batch, found), notes=_left_out(refused))
    if request.on_cuda and torch.cuda.device_count() < request.world:
        raise UsageError(
            f"{request.world} ranks take {request.world} GPUs, and there are "
            f"{torch.cuda.device_count()}",
            hint=f"plan for them by name: --device {request.place.target}",
        )
    ranks = RankTimes(request.recipe, device, request.world, seed=request.seed, say=request.say)
    plain = {kind: Setup(plain_plan(space), kind) for kind, (_, space) in found.items()}
    together, failed = ranks.of_setups(list(plain.values()))
    for setup, error in failed.items():
        refused[setup.parallel] = error
        del found[setup.parallel]
    _require_one(found, refused)
    times = StepTimes(request.recipe, device, data, batch, say=request.say, threads=ranks.threads)
    speeds = Speeds(times, next(iter(plain.values())).plan)

    def way(kind: str, peaks: Peaks, space: Space) -> Way:
        alone = speeds.of(plain[kind].plan)
        cost = max(together[plain[kind]].seconds - alone, 0.0)
        return Way(peaks=peaks, space=space, seconds=lambda plan: speeds.of(plan) + cost)

    each = {kind: way(kind, *both) for kind, both in found.items()}
    return Ways(each=each, finals=ranks.of_setups, notes=_left_out(refused))


def _ways_to_share(request: Request, batch: Any, refused: dict[str, NarrowcastError]) -> Surveyed:
    """Return what there is to choose from, for each way that can be traced."""
    found: Surveyed = {}
    for kind in request.kinds:
        try:
            peaks = Peaks(
                request.recipe, request.place.target, batch, say=request.say,
                world=request.world, parallel=kind,
            )  # fmt: skip
            space = _surveyed(request, peaks)
            peaks.need(plain_plan(space))
        except NarrowcastError as error:
            refused[kind] = error
        else:
            found[kind] = peaks, space
    _require_one(found, refused)
    return found


def _require_one(found: Surveyed, refused: dict[str, NarrowcastError]) -> None:
    """Raise what stands against sharing, if nothing is left of it."""
    if found:
        return
    errors = list(refused.values())
    if len({error.message for error in errors}) == 1:
        raise errors[0]
    said = "; ".join(f"{kind}: {error.message}" for kind, error in refused.items())
    raise UsageError(f"ranks cannot share this training. {said}", hint=errors[0].hint)


def _left_out(refused: dict[str, NarrowcastError]) -> tuple[str, ...]:
    return tuple(
        f"left out {kind}: {error.message.splitlines()[0]}" for kind, error in refused.items()
    )
