"""What torch.compile does to a training step: time, graphs, and how far the numbers move.

The recipe `austen` (2 x 128) trains twice in one process from the same weights, once compiled with
inductor and once not. Steps alternate in pairs of random order; a step is timed by the process's
CPU time with one thread, which other processes on the machine disturb least. The ratio is the
median over pairs, with its quartiles and a bootstrap interval of 95 %. The first step is wall
time, with nothing in the compiler's cache.

    python benchmarks/compiled.py [--pairs 100]

Writes benchmarks/results/compiled-cpu.json.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(prefix="compiled-")

import torch
from provenance import write_results
from torch import Tensor

from narrowcast.engine.engine import Engine
from narrowcast.engine.stores import planned_optimizer
from narrowcast.plan import plan_named
from narrowcast.recipes.load import load_recipe
from narrowcast.records.codec import to_json

PRECISIONS = ("fp32", "bf16", "bf16-split")
WARM_UP = 5
RESAMPLES = 2000

Step = Callable[[Any], float]


def training(precision: str, *, compiled: bool) -> tuple[Engine, Step]:
    """Return an engine on `austen`, and a step that returns its loss."""
    torch.manual_seed(0)
    recipe = load_recipe("austen")
    model, plan = recipe.build_model(), plan_named(precision)
    optimizer = planned_optimizer(recipe.build_optimizer(model), model, plan)
    engine = Engine(model, optimizer, plan, compile=compiled)

    def step(batch: Any) -> float:
        with engine.forward():
            loss = recipe.compute_loss(model, batch)
        engine.backward(loss)
        engine.step()
        return loss.item()

    return engine, step


def batches(count: int) -> list[tuple[Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randint(0, 256, (16, 65), generator=generator, dtype=torch.uint8),)
        for _ in range(count)
    ]


def seconds(step: Step, batch: Any) -> tuple[float, float]:
    began = time.process_time()
    loss = step(batch)
    return time.process_time() - began, loss


def interval(ratios: list[float], rng: random.Random) -> tuple[float, float]:
    """Bootstrap interval of 95 % of the median."""
    medians = sorted(
        statistics.median(rng.choices(ratios, k=len(ratios))) for _ in range(RESAMPLES)
    )
    return medians[int(0.025 * RESAMPLES)], medians[int(0.975 * RESAMPLES)]


def row(precision: str, pairs: int) -> dict[str, Any]:
    rng = random.Random(0)
    engines = {
        name: training(precision, compiled=name == "compiled") for name in ("eager", "compiled")
    }
    data = batches(WARM_UP + pairs)
    first = {}
    for name, (_, step) in engines.items():
        began = time.perf_counter()
        step(data[0])
        first[name] = time.perf_counter() - began
    taken: dict[str, list[float]] = {name: [] for name in engines}
    apart: list[float] = []
    for number, batch in enumerate(data[1:], start=1):
        losses = {}
        for name in rng.sample(list(engines), 2):
            spent, losses[name] = seconds(engines[name][1], batch)
            if number >= WARM_UP:
                taken[name].append(spent)
        apart.append(abs(losses["compiled"] / losses["eager"] - 1))
    ratios = [c / e for c, e in zip(taken["compiled"], taken["eager"], strict=True)]
    quartiles = statistics.quantiles(ratios, n=4)
    compiled = engines["compiled"][0].compiled
    assert compiled is not None
    return {
        "precision": precision,
        "pairs": len(ratios),
        "eager_ms": 1e3 * statistics.median(taken["eager"]),
        "compiled_ms": 1e3 * statistics.median(taken["compiled"]),
        "ratio": statistics.median(ratios),
        "ratio_interval": interval(ratios, rng),
        "ratio_quartiles": (quartiles[0], quartiles[2]),
        "first_step_s": first["compiled"],
        "first_step_eager_s": first["eager"],
        "relative_loss_difference_second_step": apart[0],
        "relative_loss_difference_largest": max(apart),
        "compilation": to_json(compiled.record()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=100)
    pairs = parser.parse_args().pairs
    torch.set_num_threads(1)
    rows = []
    for precision in PRECISIONS:
        rows.append(row(precision, pairs))
        print(rows[-1])
    load = os.getloadavg()
    write_results("compiled-cpu", rows, recipe="austen", backend="inductor", load_average=load)


if __name__ == "__main__":
    main()
