"""What replaying a step costs, in plain steps: bare, recorded, with values, with errors, in fp32.

A training of usual size and one of tiny operations, in one process and one thread. Every kind of
replay of one moment is timed by the process's CPU time, interleaved in rounds; what counts is the
median over rounds of the ratio to a forward and backward pass without any of it in the same round.

    python benchmarks/replay_cost.py [--rounds 9]

Writes benchmarks/results/replay-cost-cpu.json.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from provenance import write_results

from narrowcast.data import to_device
from narrowcast.plan import plan_named
from narrowcast.recipes.load import load_recipe
from narrowcast.replay.moment import Moment
from narrowcast.replay.step import replay_step
from narrowcast.training.assembly import TrainOptions, assemble

TINY = str(Path(__file__).parents[1] / "tests" / "recipes" / "t5_like_overflow.py")
CASES = [("austen", "fp32"), ("austen", "bf16"), ("austen", "lean"), (TINY, "fp32"), (TINY, "bf16")]

TARGET = 10.0
"""Plain steps that a replay may take at most."""

KINDS: dict[str, dict[str, Any]] = {
    "bare": {"ranges": None},
    "recorded": {"ranges": "none", "errors": False},
    "suspects": {"ranges": "suspects", "errors": False},
    "ranges": {"errors": False},
    "ranges and errors": {},
    "fp32": {"policy_reference": True},
}


def seconds(call: Callable[[], Any]) -> float:
    began = time.process_time()
    call()
    return time.process_time() - began


def measure(recipe_name: str, precision: str, rounds: int) -> list[dict[str, Any]]:
    recipe = load_recipe(recipe_name)
    device = torch.device("cpu")
    parts = assemble(recipe, plan_named(precision), TrainOptions(), device)
    engine = parts.engine
    engine.model.train()
    batch = to_device(next(parts.stream)[1], device)

    def plain() -> None:
        with engine.forward():
            loss = recipe.compute_loss(engine.model, batch)
        engine.backward(loss)
        engine.zero_grad()

    plain()
    moment = Moment.of(engine, batch, 1)
    taken: dict[str, list[float]] = {kind: [] for kind in KINDS}
    steps, events = [], {}
    for _ in range(rounds):
        steps.append(seconds(plain))
        for kind, options in KINDS.items():
            began = time.process_time()
            trace = replay_step(engine, recipe.compute_loss, moment, **options)
            taken[kind].append((time.process_time() - began) / steps[-1])
            events[kind] = len(trace.events)
    return [
        {
            "recipe": recipe.name,
            "precision": precision,
            "kind": kind,
            "operations": events[kind],
            "plain_step_ms": 1e3 * statistics.median(steps),
            "plain_steps": statistics.median(ratios),
            "plain_steps_quartiles": statistics.quantiles(ratios)[::2],
            "rounds": rounds,
        }
        for kind, ratios in taken.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for recipe, precision in CASES:
        for row in measure(recipe, precision, options.rounds):
            rows.append(row)
            print(
                f"{row['recipe']:16} {precision:6} {row['kind']:18} "
                f"{row['operations']:5} operations  {row['plain_steps']:5.1f} plain steps "
                f"of {row['plain_step_ms']:.1f} ms"
            )
    write_results("replay-cost-cpu", rows, target_plain_steps=TARGET)


if __name__ == "__main__":
    main()
