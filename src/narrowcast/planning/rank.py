"""One of several processes in which plans take whole steps: what `launch` starts under torchrun.

    python -m torch.distributed.run --nproc-per-node N -m narrowcast.planning.rank FOLDER

The folder holds the question (`Job`), and rank 0 leaves the answer in it. A rank that fails leaves
why, and which setup it was at.

A step is timed by the clock, and takes as long as on its slowest rank. For one process the planner
takes the processor's time where that is shorter, since a process that waits is one that another
program held up. A rank also waits for the others and for what they send, which is a part of the
step: by the processor's time alone a slow network would cost nothing. So a busy machine is seen as
slow here, and what its disturbances come to is in the spread.
"""

from __future__ import annotations

import copy
import gc
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from narrowcast.data import MapDataset
from narrowcast.errors import NarrowcastError, ParallelError, RecipeError
from narrowcast.parallel.failures import PeerFailed
from narrowcast.parallel.peers import Ranks
from narrowcast.parallel.together import Together, together_in
from narrowcast.planning.choice import Setup
from narrowcast.planning.speeds import Measured, in_turn, peak_of, summary
from narrowcast.precision.cast import numeric_settings
from narrowcast.precision.device import device_at_hand
from narrowcast.prediction.sharding import shared
from narrowcast.profiling import Bench, first_batch
from narrowcast.randomness import seed_everything
from narrowcast.recipes.load import Recipe, load_recipe
from narrowcast.records.codec import dumps, loads
from narrowcast.records.run import OptionValue

__all__ = ["ANSWER", "FAILURES", "JOB", "PIDS", "PROGRESS", "Answer", "Complaint", "Job", "main"]

JOB, ANSWER, PROGRESS = "job.json", "answer.json", "progress"
FAILURES, PIDS = "failed-*.json", "*.pid"
"""Files of a job, in the folder that is its own."""

# Steps before each that is looked at; the first makes the optimizer's state. gloo's threads let go
# of what a collective sent when they find the time, so that a busy rank may hold it for longer than
# it needs to: of three looks the one that shows the least is taken.
_WARM_UPS = (1, 0, 0)


@dataclass(frozen=True, kw_only=True)
class Job:
    """What the ranks are to do: take steps by each setup, in turn."""

    recipe: str
    """Path of its file."""
    source_hash: str
    options: dict[str, OptionValue]
    device: str
    seed: int
    planner: int
    """The process that asks: without it nobody waits for an answer."""
    setups: tuple[Setup, ...]


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What the ranks took, setup by setup: the slowest rank's seconds, the largest one's peak."""

    threads: int
    """Torch's on each rank."""
    measured: tuple[Measured, ...]


@dataclass(frozen=True, kw_only=True)
class Complaint:
    """Why a rank failed, as an error to raise."""

    kind: str
    message: str
    hint: str
    setup: int | None
    """Number of the setup that was being tried; None before the first."""


class _Desk:
    """Where this rank reads its job, and leaves word of how it goes."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.job = loads(Job, (folder / JOB).read_text())
        self._setup: int | None = None

    def begin(self, number: int, what: str, ranks: Ranks) -> Setup:
        """Note what is being done, for whoever waits and for a complaint.

        Raises ParallelError if the planner is gone, killed perhaps: ranks do not go on without it.
        """
        if not _is_running(self.job.planner):
            raise ParallelError(f"process {self.job.planner}, which planned, has ended")
        self._setup = number
        setup = self.job.setups[number]
        if ranks.is_main:
            with (self._folder / PROGRESS).open("a") as told:
                told.write(f"{what} {setup.name} on {ranks.size} ranks\n")
        return setup

    def leave_id(self, rank: int) -> None:
        """Note by which id this process can be ended."""
        (self._folder / PIDS.replace("*", str(rank))).write_text(str(os.getpid()))

    def answer(self, found: tuple[Measured, ...]) -> None:
        """Leave the answer."""
        answer = Answer(threads=torch.get_num_threads(), measured=found)
        (self._folder / ANSWER).write_text(dumps(answer))

    def complain(self, error: Exception, rank: int) -> None:
        """Leave word of a failure."""
        is_ours = isinstance(error, NarrowcastError)
        complaint = Complaint(
            kind=type(error).__name__,
            message=error.message if isinstance(error, NarrowcastError) else repr(error),
            hint=error.hint if is_ours else "",  # type: ignore[attr-defined]
            setup=self._setup,
        )
        (self._folder / FAILURES.replace("*", str(rank))).write_text(dumps(complaint))


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)  # asks, and sends nothing
    except ProcessLookupError:
        return False
    return True


@dataclass(frozen=True, kw_only=True)
class _Steps:
    """Takes the steps of every setup, as one of the ranks."""

    desk: _Desk
    recipe: Recipe
    device: torch.device
    ranks: Ranks
    data: MapDataset
    batch: Any
    """This rank's part of it."""

    def measured(self) -> tuple[Measured, ...]:
        """On a CPU all setups stand ready at once; on GPUs each has them for itself."""
        numbers = range(len(self.desk.job.setups))
        if self.device.type == "cpu":
            return self._in_turn(numbers)
        found: list[Measured] = []
        for number in numbers:
            found += self._in_turn(range(number, number + 1))
            gc.collect()  # hooks refer to models that refer to them
            torch.cuda.empty_cache()
        return tuple(found)

    def _in_turn(self, numbers: range) -> tuple[Measured, ...]:
        steps: dict[int, Callable[[], float]] = {}
        peaks: dict[int, int] = {}
        for number in numbers:
            bench = self._bench(number)
            peaks[number] = self._peak(bench, number)
            steps[number] = partial(self._seconds, bench, number)
        times = in_turn(steps)
        for let_go in self.ranks.before_parting:
            let_go()
        self.ranks.before_parting.clear()  # it would keep the models
        return tuple(summary(taken, peaks[n]) for n, taken in times.items())

    def _bench(self, number: int) -> Bench:
        setup = self.desk.begin(number, "setting up", self.ranks)
        # One group serves both ways to share, and one list what is to be let go of with it.
        peers = copy.copy(self.ranks)
        peers.kind, peers.cuts = setup.parallel, setup.parallel == "fsdp2"
        seed_everything(self.desk.job.seed, "model")
        bench = Bench.of(
            self.recipe, setup.plan, self.device, data=self.data, batch=self.batch, peers=peers
        )
        return shared(bench, peers)

    def _peak(self, bench: Bench, number: int) -> int:
        """Return the most that a rank holds, of the steps that show the least."""
        setup = self.desk.begin(number, "measuring", self.ranks)
        with numeric_settings(setup.plan.policy):
            looks = [peak_of(bench.steady_step(warm_up=warm_up)) for warm_up in _WARM_UPS]
        return int(max(peak for (peak,) in self.ranks.each([float(min(looks))])))

    def _seconds(self, bench: Bench, number: int) -> float:
        """Take a step together; returns the seconds of the slowest rank, on all."""
        setup = self.desk.begin(number, "timing", self.ranks)
        with numeric_settings(setup.plan.policy):
            self.ranks.any(False)  # all of them begin at once
            start = time.perf_counter()
            bench.step()
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            taken = time.perf_counter() - start
        return max(seconds for (seconds,) in self.ranks.each([taken]))


def _work(desk: _Desk, together: Together) -> None:
    """Do the job; rank 0 leaves the answer."""
    job = desk.job
    recipe = load_recipe(job.recipe, job.options)
    if recipe.source_hash != job.source_hash:
        raise RecipeError(
            f"{recipe.path} was edited while its training was planned", hint="plan it again"
        )
    device = device_at_hand(together.device_name(job.device))
    with together.meet({"recipe source": recipe.source_hash}, device) as ranks:
        seed_everything(job.seed, "data")
        share = ranks.rank, ranks.size
        data, batch = first_batch(recipe, recipe.batch_size, job.seed, share=share)
        steps = _Steps(desk=desk, recipe=recipe, device=device, ranks=ranks, data=data, batch=batch)
        found = steps.measured()
    if together.is_main:
        desk.answer(found)


def main(folder: Path) -> int:
    """Be one rank; returns the exit code."""
    desk = _Desk(folder)
    together = together_in(desk.job.setups[0].parallel, os.environ)
    rank = together.meeting.world.rank
    desk.leave_id(rank)
    try:
        with together.meeting.failing_together():
            _work(desk, together)
    except PeerFailed as followed:
        return followed.exit_code
    except Exception as error:  # noqa: BLE001 -- whatever it is, the planner is to say it
        desk.complain(error, rank)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
