"""Waiting for ranks: what they leave, what is made of it, and that nothing outlives the planner.

In the place of torchrun stands a Python program of a few lines.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

import pytest
import torch

from narrowcast.errors import ParallelError, RecipeError, UsageError
from narrowcast.parallel.peers import Alone, Ranks
from narrowcast.plan import PLANS
from narrowcast.planning import launch, rank
from narrowcast.planning.choice import Setup
from narrowcast.planning.launch import RankTimes
from narrowcast.planning.rank import Answer, Complaint, Job
from narrowcast.planning.speeds import Measured
from narrowcast.recipes.load import load_recipe
from narrowcast.records.codec import dumps, loads

SETUPS = [Setup(PLANS["fp32"], "ddp"), Setup(PLANS["fp32"], "fsdp2")]
TOOK = Measured(seconds=0.5, spread=0.1, steps=3, peak_bytes=7)
ASLEEP = "import time; time.sleep(600)"
Program = Callable[[Path], str]


class Started:
    """Programs in the place of torchrun, one after another, and the jobs that they found."""

    def __init__(self, *programs: Program) -> None:
        self.programs: Iterator[Program] = iter(programs)
        self.jobs: list[Job] = []
        self.processes: list[subprocess.Popen[bytes]] = []

    def __call__(self, folder: Path, world: int) -> subprocess.Popen[bytes]:
        self.jobs.append(loads(Job, (folder / rank.JOB).read_text()))
        words = [sys.executable, "-c", next(self.programs)(folder)]
        with (folder / "output").open("wb") as output:
            process = subprocess.Popen(words, stdout=output, start_new_session=True)
        self.processes.append(process)
        return process


def leaving(name: str, *records: object) -> Program:
    """A program that leaves a record in each file of this name, counting from 0."""
    return lambda folder: "\n".join(
        f"open({str(folder / name.replace('*', str(n)))!r}, 'w').write({dumps(record)!r})"
        for n, record in enumerate(records)
    )


def answering(count: int) -> Program:
    return leaving(rank.ANSWER, Answer(threads=3, measured=(TOOK,) * count))


def complaining(kind: str, setup: int | None) -> Program:
    return leaving(
        rank.FAILURES, Complaint(kind=kind, message="rank 1: no", hint="do", setup=setup)
    )


def times(say: Callable[[str], None] = lambda _: None) -> RankTimes:
    recipe = load_recipe("tabular", ["width=32"])
    return RankTimes(recipe, torch.device("cpu"), 2, seed=0, say=say)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Iterator[Started]:
    found = Started()
    monkeypatch.setattr(launch, "_started", found)
    yield found
    assert all(process.poll() is not None for process in found.processes)


def test_what_ranks_took_is_returned_by_setup(started: Started) -> None:
    """The job says the recipe, its options and every setup; the answer says how many threads."""
    started.programs = iter([answering(2)])
    ranks = times()

    found, failed = ranks.of_setups(SETUPS)

    assert found == dict.fromkeys(SETUPS, TOOK)
    assert failed == {}
    assert ranks.threads == 3
    (job,) = started.jobs
    assert list(job.setups) == SETUPS
    assert job.options["width"] == 32
    assert load_recipe(job.recipe, job.options).source_hash == job.source_hash


def test_a_setup_that_fails_is_left_out_and_the_others_begin_again(started: Started) -> None:
    """With the rank's own words, as the error that it was there."""
    started.programs = iter([complaining("UsageError", 0), answering(1)])

    found, failed = times().of_setups(SETUPS)

    assert found == {SETUPS[1]: TOOK}
    assert list(failed) == [SETUPS[0]]
    assert isinstance(failed[SETUPS[0]], UsageError)
    assert failed[SETUPS[0]].message == "rank 1: no"
    assert [len(job.setups) for job in started.jobs] == [2, 1]


@pytest.mark.parametrize(
    ("kind", "raised"), [("RecipeError", RecipeError), ("KeyError", ParallelError)]
)
def test_what_fails_before_the_first_setup_is_the_error(
    started: Started, kind: str, raised: type[Exception]
) -> None:
    """A recipe that does not load would fail with every setup; what is not ours is told as well."""
    started.programs = iter([complaining(kind, None)])

    with pytest.raises(raised, match="rank 1: no"):
        times().of_setups(SETUPS)


def test_ranks_that_leave_no_word_are_told_with_their_last_line(started: Started) -> None:
    """They may have been killed."""
    started.programs = iter([lambda _: "print('out of luck'); raise SystemExit(9)"])

    with pytest.raises(ParallelError, match=r"exit code 9 .*last line they wrote: out of luck"):
        times().of_setups(SETUPS)


def test_ctrl_c_ends_what_was_started(started: Started) -> None:
    """Wherever it arrives; the fixture sees that no process is left."""
    started.programs = iter(
        [lambda folder: f"open({str(folder / rank.PROGRESS)!r}, 'w').write('timing\\n')\n{ASLEEP}"]
    )

    def say(text: str) -> None:
        if text == "timing":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        times(say).of_setups(SETUPS)


def test_ranks_that_get_no_further_are_ended(
    started: Started, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No wait is without a limit; the error says how it is set."""
    monkeypatch.setattr(launch, "_START_S", 0.0)
    monkeypatch.setenv("NARROWCAST_WAIT_S", "0.1")
    started.programs = iter([lambda _: ASLEEP])

    with pytest.raises(ParallelError, match=r"no further within 0.1 s: starting") as raised:
        times().of_setups(SETUPS)
    assert "NARROWCAST_WAIT_S" in raised.value.hint


def test_a_launcher_that_does_not_end_is_killed_and_its_ranks_by_their_ids(
    started: Started, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A rank has a session of its own, and would go on."""
    monkeypatch.setattr(launch, "_START_S", 0.0)
    monkeypatch.setattr(launch, "_END_S", 0.1)
    monkeypatch.setenv("NARROWCAST_WAIT_S", "300")
    told = tmp_path / "id"

    def stubborn(folder: Path) -> str:
        return (
            "import signal, subprocess, sys, time\n"
            "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
            f"left = subprocess.Popen([sys.executable, '-c', {ASLEEP!r}], start_new_session=True)\n"
            f"open({str(folder / '0.pid')!r}, 'w').write(str(left.pid))\n"
            f"open({str(told)!r}, 'w').write(str(left.pid))\n"
            f"open({str(folder / rank.PROGRESS)!r}, 'w').write('timing\\n')\n"
            "time.sleep(600)\n"
        )

    def say(text: str) -> None:
        if text == "timing":
            raise KeyboardInterrupt

    started.programs = iter([stubborn])

    with pytest.raises(KeyboardInterrupt):
        times(say).of_setups(SETUPS)

    state = Path(f"/proc/{told.read_text()}/stat")
    deadline = time.monotonic() + 60
    while is_running(state) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not is_running(state)


def is_running(state: Path) -> bool:
    """Whether a process is there and more than a name that nobody has asked for yet."""
    try:
        return state.read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_rank_goes_on_only_while_its_planner_is_there(tmp_path: Path) -> None:
    """Killed, it can end nobody: ranks look before every step."""
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()

    def desk(planner: int) -> rank._Desk:
        job = Job(
            recipe="", source_hash="", options={}, device="cpu", seed=0, planner=planner,
            setups=tuple(SETUPS),
        )  # fmt: skip
        (tmp_path / rank.JOB).write_text(dumps(job))
        return rank._Desk(tmp_path)

    ranks = cast("Ranks", Alone())

    assert desk(os.getpid()).begin(1, "timing", ranks) == SETUPS[1]
    assert (tmp_path / rank.PROGRESS).read_text() == "timing fp32 by fsdp2 on 1 ranks\n"
    with pytest.raises(ParallelError, match=f"process {ended.pid}, which planned, has ended"):
        desk(ended.pid).begin(0, "timing", ranks)
