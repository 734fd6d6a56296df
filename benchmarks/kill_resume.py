"""kill -9 at random moments of a run, resume, and compare the final weights bit for bit.

    python benchmarks/kill_resume.py [--precisions fp32,bf16,lean] [--kills 20] [--record]

Per precision: one run that nobody disturbs is the reference. Then runs are killed, each at a random
moment between its start and its end (building, first checkpoint, steps, evaluations, the writing of
every checkpoint, the export of the weights), and resumed until they are finished. A run is LOST if
it cannot be resumed, DIFFERENT if its weights, metrics or record are not the reference's.

This process imports torch once and forks; a child does what `narrowcast train` does and dies of a
real SIGKILL. The recipe (tests/small_recipe.py) draws from every random source and saves on every
second step, so that a good part of the moments falls into the writing of a checkpoint.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from provenance import write_results

from narrowcast.plan import plan_named
from narrowcast.recipes.load import load_recipe
from narrowcast.records.run import StepPoint
from narrowcast.training.run_directory import RunDirectory
from narrowcast.training.train import TrainOptions, train

RECIPE = Path(__file__).parents[1] / "tests" / "small_recipe.py"
OPTIONS = TrainOptions(
    steps=40, evaluate_every=10, checkpoint_every=2, clip_norm=1.0, accumulate=2, measure=False
)


@dataclass(frozen=True)
class Kill:
    """One run that was killed at least once."""

    precision: str
    moment_s: float
    """Seconds from the start of the run to the signal."""
    killed_at_step: int
    """Steps whose point was in metrics.jsonl at that moment."""
    resumed_from: int
    """Step of the checkpoint that the run went on from; -1 where none had been written."""
    outcome: str
    """'equal', 'finished before' (the signal came too late), 'different: ...' or 'lost: ...'."""


def train_in_child(directory: Path, precision: str, *, resume: bool) -> int:
    """Fork, train, and return the child's process id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        train(
            load_recipe(RECIPE),
            plan_named(precision),
            OPTIONS,
            directory,
            device=torch.device("cpu"),
            resume=resume,
        )
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def ended_well(child: int) -> bool:
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status) == 0


def result_of(directory: Path) -> tuple[bytes, list[object], object]:
    """Everything of a run that must be equal: weights, points and record, without times."""
    place = RunDirectory(directory)
    points = [
        replace(p, seconds=0.0) if isinstance(p, StepPoint) else p for p in place.read_metrics()
    ]
    record = replace(
        place.read_record(),
        started="",
        finished="",
        resumed_at=(),
        warnings=(),
        step_seconds=None,
        samples_per_second=None,
    )
    return place.weights_path.read_bytes(), points, record


def kill_once(directory: Path, precision: str, moment: float, reference: object) -> Kill:
    child = train_in_child(directory, precision, resume=False)
    time.sleep(moment)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    too_late = os.WIFEXITED(status)
    place = RunDirectory(directory)
    steps = sum(isinstance(p, StepPoint) for p in place.read_metrics())
    if not ended_well(train_in_child(directory, precision, resume=True)):
        return Kill(precision, moment, steps, -1, "lost: it could not be resumed")
    record = place.read_record()
    resumed = record.resumed_at[-1] if record.resumed_at else -1
    parts = ("weights", "metrics", "record")
    wrong = [
        name for name, a, b in zip(parts, result_of(directory), reference, strict=True) if a != b
    ]
    equal = "finished before" if too_late else "equal"
    outcome = f"different: {', '.join(wrong)}" if wrong else equal
    return Kill(precision, moment, steps, resumed, outcome)


def kills_of(precision: str, wanted: int, root: Path, rng: random.Random) -> list[Kill]:
    """Kill `wanted` runs that were still running; those that ended before do not count."""
    whole = root / f"{precision}-whole"
    began = time.monotonic()
    if not ended_well(train_in_child(whole, precision, resume=False)):
        sys.exit(f"the undisturbed run in {precision} failed")
    duration = time.monotonic() - began
    reference = result_of(whole)
    found: list[Kill] = []
    attempts = 0
    while sum(k.outcome != "finished before" for k in found) < wanted:
        attempts += 1
        directory = root / f"{precision}-{attempts}"
        found.append(kill_once(directory, precision, rng.uniform(0, duration), reference))
        with contextlib.suppress(OSError):
            shutil.rmtree(directory)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--precisions", default="fp32,fp16,bf16,bf16-true,bf16-split,lean")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", action="store_true", help="write benchmarks/results")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # a fork keeps one thread; a pool that was started would be lost
    # Loads, once for all children, the parts of torch that are only imported when they are used.
    torch.use_deterministic_algorithms(True)
    torch.optim.SGD([torch.zeros(1, requires_grad=True)])
    torch.use_deterministic_algorithms(False)
    rng = random.Random(arguments.seed)
    kills: list[Kill] = []
    print("precision   killed  equal  different  lost   steps at the kill   resumed from")
    with tempfile.TemporaryDirectory() as root:
        for precision in arguments.precisions.split(","):
            mine = kills_of(precision, arguments.kills, Path(root), rng)
            kills += mine
            real = [k for k in mine if k.outcome != "finished before"]
            counts = [
                sum(k.outcome.startswith(word) for k in real)
                for word in ("equal", "different", "lost")
            ]
            at = [k.killed_at_step for k in real]
            resumed = [k.resumed_from for k in real]
            print(
                f"{precision:<12}{len(real):>6}{counts[0]:>7}{counts[1]:>11}{counts[2]:>6}"
                f"{min(at):>11} to {max(at):<4}{min(resumed):>11} to {max(resumed)}",
                flush=True,
            )
    if arguments.record:
        write_results("kill-resume", [asdict(k) for k in kills], options=asdict(OPTIONS))
    bad = [k for k in kills if k.outcome not in ("equal", "finished before")]
    for kill in bad:
        print(kill)
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
