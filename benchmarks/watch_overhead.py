"""What watching a training costs, as a share of a step, beside two tools that are always on.

The steps are those of `narrowcast train` (`training.step.take_step`) on built-in recipes, the watch
as it is by default: batches and random states at every step, values at module borders every
hundredth. The loops take turns, step by step, so that all see the same machine; a round is a
hundred steps of each, of which the default watch samples one, or ten of those loops that are slow
at every step. A ratio is the median over rounds of a loop's time to that of the plain steps beside
it. The clock is the process's CPU time with one thread.

    python benchmarks/watch_overhead.py [--case austen-fp32 ...] [--rounds 9]

Rows of cases that are not run again stay in benchmarks/results/watch-overhead-cpu.json.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import json
import os
import random
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from provenance import RESULTS, provenance, write_results

from narrowcast.data import to_device
from narrowcast.plan import plan_named
from narrowcast.recipes.load import load_recipe
from narrowcast.records.codec import to_json
from narrowcast.training.assembly import TrainOptions, assemble
from narrowcast.training.step import take_step
from narrowcast.watch.watch import EVERY, Watch

NAME = "watch-overhead-cpu"
TARGET = 0.03
CASES = {
    "austen-fp32": ("austen", "fp32"),
    "austen-bf16": ("austen", "bf16"),
    "fashion-fp32": ("fashion", "fp32"),
}
CPU = torch.device("cpu")

Block = Callable[[int], None]
"""Takes so many optimizer steps."""


class Loop:
    """One training of its own, of which blocks of steps are timed."""

    def __init__(self, recipe: str, precision: str) -> None:
        loaded = load_recipe(recipe)
        parts = assemble(loaded, plan_named(precision), TrainOptions(), CPU)
        self.engine, self.path, self.loss = parts.engine, loaded.path, loaded.compute_loss
        batches = [to_device(next(parts.stream)[1], CPU) for _ in range(32)]
        self.batches = itertools.cycle(batches)
        self.engine.model.train()

    def plain(self, steps: int) -> None:
        for _ in range(steps):
            take_step(self.engine, self.loss, lambda: next(self.batches), path=self.path)

    def watched(self, watch: Watch) -> Block:
        def block(steps: int) -> None:
            for _ in range(steps):
                taken = take_step(
                    self.engine,
                    self.loss,
                    lambda: next(self.batches),
                    path=self.path,
                    watching=watch.passing,
                )
                watch.after(taken.report, loss=taken.loss)

        return block


def plain(loop: Loop) -> Block:
    return loop.plain


def watching(every: int) -> Callable[[Loop], Block]:
    return lambda loop: loop.watched(Watch(loop.engine, every=every))


def shadowing(loop: Loop) -> Block:
    return loop.watched(Watch(loop.engine, shadow=loop.loss))


def underflow_overflow(loop: Loop) -> Block:
    from transformers.debug_utils import DebugUnderflowOverflow

    DebugUnderflowOverflow(loop.engine.model)
    return loop.plain


def anomaly(loop: Loop) -> Block:
    def block(steps: int) -> None:
        with torch.autograd.set_detect_anomaly(True):
            loop.plain(steps)

    return block


LOOPS = {
    "plain": (plain, 1),
    "plain again": (plain, 1),
    f"watch, values every {EVERY} steps": (watching(EVERY), 1),
    f"watch, and a loss in fp32, every {EVERY} steps": (shadowing, 1),
    "watch, values never": (watching(0), 1),
    "watch, values at every step": (watching(1), 10),
    "DebugUnderflowOverflow": (underflow_overflow, 10),
    "detect_anomaly": (anomaly, 10),
}
"""How to make each loop, and at which of the steps of a round it takes one: every so many."""


@dataclass
class Row:
    case: str
    loop: str
    ms: float | None = None
    ratio: float | None = None
    """Median of paired ratios to the plain loop."""
    quartiles: tuple[float, float] | None = None
    n: int = 0
    ratios: list[float] | None = None
    note: str = ""
    measured: str = ""
    """When, and at which commit: cases may be measured one by one."""


def timed(block: Block) -> float:
    """Return milliseconds of CPU time of one step."""
    began = time.process_time()
    block(1)
    return (time.process_time() - began) * 1e3


def measure(case: str, rounds: int) -> list[Row]:
    blocks, absent = {}, []
    for name, (make, every) in LOOPS.items():
        try:
            with warnings.catch_warnings(action="ignore"):
                block = make(Loop(*CASES[case]))
                block(5)  # beyond the steps that are probed, and the first sampled one
        except ImportError as error:
            absent.append(Row(case, name, note=f"not installed: {error}"))
            continue
        blocks[name] = block, every
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in blocks}
    chance = random.Random(0)
    for _ in range(rounds):
        for name, pair in one_round(blocks, chance).items():
            found[name].append(pair)
    return [row(case, name, pairs) for name, pairs in found.items()] + absent


def one_round(
    blocks: dict[str, tuple[Block, int]], chance: random.Random
) -> dict[str, tuple[float, float]]:
    """Return for each loop milliseconds a step, and those of the plain steps beside it."""
    sums = {name: [0.0, 0.0] for name in blocks}
    for step in range(EVERY):
        due = [name for name, (_, every) in blocks.items() if step % every == 0]
        chance.shuffle(due)
        with warnings.catch_warnings(action="ignore"):
            taken = {name: timed(blocks[name][0]) for name in due}
        for name, ms in taken.items():
            sums[name][0] += ms
            sums[name][1] += taken["plain"]
    steps = {name: EVERY // every for name, (_, every) in blocks.items()}
    return {name: (own / steps[name], base / steps[name]) for name, (own, base) in sums.items()}


def row(case: str, name: str, pairs: list[tuple[float, float]]) -> Row:
    ratios = [own / base for own, base in pairs]
    low, middle, high = statistics.quantiles(ratios, n=4)
    ms = statistics.median(own for own, _ in pairs)
    found = Row(case, name, ms=round(ms, 3), n=len(pairs))
    if name == "plain":
        return found
    found.ratio, found.quartiles = round(middle, 4), (round(low, 4), round(high, 4))
    found.ratios = [round(ratio, 4) for ratio in ratios]
    if str(EVERY) in name:
        verdict = "met" if middle - 1 <= TARGET else "MISSED"
        found.note = f"target <= {1 + TARGET}: {verdict}"
    return found


def state_costs() -> dict[str, float]:
    """Return microseconds of reading each random state."""
    readers = {
        "torch": torch.get_rng_state,
        "python": random.getstate,
        "numpy": lambda: dict(np.random.get_state(legacy=False)),  # noqa: NPY002
    }
    found = {}
    for name, read in readers.items():
        began = time.process_time()
        for _ in range(2000):
            read()
        found[name] = round((time.process_time() - began) / 2000 * 1e6, 2)
    return found


def table(rows: list[dict]) -> str:
    lines = [f"{'case':14}{'loop':46}{'ms/step':>9}{'ratio':>8}{'quartiles':>18}  note"]
    for one in rows:
        spread = "" if one["quartiles"] is None else "{:.3f} .. {:.3f}".format(*one["quartiles"])
        ratio = "" if one["ratio"] is None else f"{one['ratio']:.3f}"
        ms = "-" if one["ms"] is None else f"{one['ms']:.2f}"
        lines.append(
            f"{one['case']:14}{one['loop']:46}{ms:>9}{ratio:>8}{spread:>18}  {one['note']}"
        )
    return "\n".join(lines)


def kept(cases: list[str]) -> list[dict]:
    """Return the rows of an earlier record that are not measured again."""
    path = RESULTS / f"{NAME}.json"
    if not path.exists():
        return []
    return [one for one in json.loads(path.read_text())["rows"] if one["case"] not in cases]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", action="append", choices=tuple(CASES))
    parser.add_argument("--rounds", type=int, default=9)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    cases = asked.case or list(CASES)
    rows = kept(cases) + [to_json(one) for case in cases for one in measure(case, asked.rounds)]
    here = provenance()
    now = f"{here['date']} at {here['commit']}, {asked.rounds} rounds"
    rows = [one if one["case"] not in cases else {**one, "measured": now} for one in rows]
    rows.sort(key=lambda one: list(CASES).index(one["case"]))
    print(table(rows))
    costs = state_costs()
    print("microseconds to read a random state:", costs)
    write_results(
        NAME,
        rows,
        question="CPU time of a watched step over that of a plain one",
        clock="process CPU time, one thread",
        rounds=asked.rounds,
        steps_a_round={name: EVERY // every for name, (_, every) in LOOPS.items()},
        microseconds_to_read_a_random_state=costs,
        versions={n: importlib.metadata.version(n) for n in ("torch", "transformers")},
    )


if __name__ == "__main__":
    main()
