"""Whole steps on several ranks, for a planner that is alone: processes are started and waited for.

They are started by torchrun, as a training is, so that they have its threads and its way to end.
Question and answer are files in a folder of their own (``rank``). Every wait has a limit, and
whatever ends the planner, Ctrl-C too, ends what it started.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

import narrowcast
from narrowcast import errors
from narrowcast.errors import NarrowcastError, ParallelError
from narrowcast.parallel.world import WAIT_LIMIT, world_from
from narrowcast.planning import rank
from narrowcast.planning.choice import Setup
from narrowcast.planning.rank import Answer, Complaint, Job
from narrowcast.planning.speeds import Measured
from narrowcast.recipes.load import Recipe, option_values
from narrowcast.records.codec import dumps, loads

__all__ = ["RankTimes"]

_POLL_S = 0.05
# Beside the wait of one rank for another: for processes to start on a busy machine, and to end.
_START_S = 120.0
_END_S = 40.0
"""torchrun gives its ranks 30 s."""


class RankTimes:
    """Whole steps of a recipe in several processes of this machine, timed."""

    def __init__(
        self,
        recipe: Recipe,
        device: torch.device,
        world: int,
        *,
        seed: int,
        say: Callable[[str], None],
    ) -> None:
        self._recipe = recipe
        self._device = device
        self._world = world
        self._seed = seed
        self._say = say
        self.threads: int | None = None
        """Torch's on each rank, once ranks have run."""

    def of_setups(
        self, setups: Sequence[Setup]
    ) -> tuple[dict[Setup, Measured], dict[Setup, NarrowcastError]]:
        """Take whole steps of several setups in turn; returns what they took, and what failed.

        Where one fails, the others begin again without it. Raises what ranks fail with before the
        first.
        """
        left = list(setups)
        failed: dict[Setup, NarrowcastError] = {}
        while left:
            found = self._asked(left)
            if isinstance(found, Answer):
                self.threads = found.threads
                return dict(zip(left, found.measured, strict=True)), failed
            if found.setup is None:
                raise _error_of(found)
            failed[left.pop(found.setup)] = _error_of(found)
        return {}, failed

    def _asked(self, setups: list[Setup]) -> Answer | Complaint:
        job = Job(
            recipe=str(self._recipe.path.resolve()),
            source_hash=self._recipe.source_hash,
            options=option_values(self._recipe),
            device=self._device.type,
            seed=self._seed,
            planner=os.getpid(),
            setups=tuple(setups),
        )
        self._say(f"starting {self._world} ranks")
        with TemporaryDirectory(prefix="narrowcast-plan-") as name:
            folder = Path(name)
            (folder / rank.JOB).write_text(dumps(job))
            process = _started(folder, self._world)
            try:
                self._wait(process, folder)
            finally:
                _end(process, folder)
            return _found(process, folder, self._world)

    def _wait(self, process: subprocess.Popen[bytes], folder: Path) -> None:
        """Wait for the ranks to end, as long as they get ahead; raises ParallelError then."""
        limit = _limit_s(self._world) + _START_S
        told, deadline = "", time.monotonic() + limit
        while process.poll() is None:
            with suppress(OSError):  # not there yet
                now = (folder / rank.PROGRESS).read_text()
                if now != told:
                    told, deadline = now, time.monotonic() + limit
                    self._say(now.splitlines()[-1])
            if time.monotonic() > deadline:
                raise ParallelError(
                    f"{self._world} ranks got no further within {limit:g} s: "
                    f"{told.splitlines()[-1] if told else 'starting'}",
                    hint=f"{WAIT_LIMIT} sets the limit; or plan for the device by name",
                )
            time.sleep(_POLL_S)


def _started(folder: Path, world: int) -> subprocess.Popen[bytes]:
    """Start the ranks in a session of their own, where Ctrl-C does not reach them before us."""
    paths = [str(Path(narrowcast.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "TORCH_CPP_LOG_LEVEL": "ERROR",  # what c10d logs of itself; a complaint says it in words
    }
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    words = [*launcher, f"--nproc-per-node={world}", "-m", rank.__name__, str(folder)]
    with (folder / "output").open("wb") as output:
        return subprocess.Popen(
            words,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _limit_s(world: int) -> float:
    """Return how long a rank waits for another."""
    as_rank = {"RANK": "0", "WORLD_SIZE": str(world), "MASTER_ADDR": "here", "MASTER_PORT": "0"}
    return world_from(os.environ | as_rank).limit_s


def _end(process: subprocess.Popen[bytes], folder: Path) -> None:
    """End the launcher, which ends its ranks; what outlives it is ended by its id."""
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(_END_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        for left in folder.glob(rank.PIDS):
            with suppress(ProcessLookupError):
                os.kill(int(left.read_text()), signal.SIGKILL)


def _found(process: subprocess.Popen[bytes], folder: Path, world: int) -> Answer | Complaint:
    """Return what the ranks left: the answer, or the complaint of the first that failed."""
    if (folder / rank.ANSWER).exists():
        return loads(Answer, (folder / rank.ANSWER).read_text())
    for path in sorted(folder.glob(rank.FAILURES)):
        return loads(Complaint, path.read_text())
    said = (folder / "output").read_text(errors="replace").strip().splitlines()
    raise ParallelError(
        f"{world} ranks ended with exit code {process.returncode} and left no word"
        + (f"; the last line they wrote: {said[-1]}" if said else ""),
        hint="were they killed (out of memory?); narrowcast predict --world says what one needs",
    )


def _error_of(complaint: Complaint) -> NarrowcastError:
    """Return the error that a rank ended with, of the same class where it is ours."""
    known = complaint.kind in errors.__all__
    kind = getattr(errors, complaint.kind) if known else ParallelError
    error: NarrowcastError = kind(complaint.message, hint=complaint.hint)
    return error
