"""What the engine costs on several ranks over torch.distributed code written by hand.

The `austen` GPT under DDP on two gloo processes of this machine, one thread each. By hand means
what the tutorials of torch write: DistributedDataParallel as it comes, autocast, GradScaler for
fp16, clip_grad_norm_, optimizer, scheduler, the loss read once a step. Ours is the step that
``narrowcast train --parallel ddp`` takes, of the engine and of the whole loop: with the mean of
the loss over the ranks, whether any of them was asked to stop, and metrics.jsonl, none of which the
code by hand has; data, checkpoints and evaluations are left out. All clip and train the same
weights on the same batches with the same fused AdamW, in the same processes and turn by turn: a
round is one step of each in a random order that all ranks share, each behind a barrier. A second
loop by hand runs along; what it differs by is what this measurement cannot see.

    python benchmarks/distributed_overhead.py [--kinds ddp] [--size tiny] [--rounds 400]

A step takes as long as on its slowest rank. The ratio is the median over rounds of ours / by hand,
with the interval between two of its order statistics that holds the true median with 95 %
confidence or more. CPU seconds, of all threads of all ranks, are compared in the same way.
Writes benchmarks/results/distributed-overhead-cpu.json; rows that are not run again stay in it.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import random
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

import torch
import torch.distributed as dist
from provenance import RESULTS, write_results
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.run import main as start_ranks
from torch.nn.parallel import DistributedDataParallel

from narrowcast.data import BatchStream
from narrowcast.parallel.meeting import Meeting
from narrowcast.parallel.peers import Ranks
from narrowcast.parallel.together import Together, together_in
from narrowcast.plan import plan_named
from narrowcast.randomness import seed_everything
from narrowcast.recipes.load import Recipe, load_recipe
from narrowcast.records.codec import to_json
from narrowcast.training.assembly import TrainOptions, assemble
from narrowcast.training.loop import Run
from narrowcast.training.run_directory import RunDirectory
from narrowcast.training.step import take_step
from narrowcast.training.train import new_record

NAME = "distributed-overhead-cpu"
RANKS = 2
TARGET = 0.02
CLIP = 1.0
DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
CPU = torch.device("cpu")

Step = Callable[[Any], float]
"""Trains on this rank's part of a batch, and returns its loss."""


def by_hand(kind: str, recipe: Recipe, precision: str, steps: int) -> Step:
    seed_everything(0, "model")
    module = recipe.build_model()
    model: nn.Module = WRAPPED[kind](module)
    optimizer = recipe.build_optimizer(model)
    scheduler: Any = recipe.build_scheduler(optimizer, steps)
    dtype = DTYPES[precision]
    scaler = torch.amp.GradScaler("cpu", enabled=precision == "fp16")

    def step(batch: Any) -> float:
        optimizer.zero_grad()
        with nullcontext() if dtype is None else torch.autocast("cpu", dtype=dtype):
            loss = recipe.compute_loss(model, batch)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        scaler.step(optimizer)
        scaler.update()
        scheduler.step()
        return loss.item()

    return step


def sharded(model: nn.Module) -> nn.Module:
    """FSDP2 as its tutorial has it: a unit for each block, and the model."""
    for block in model.blocks:  # type: ignore[union-attr]
        fully_shard(block)
    fully_shard(model)
    return model


WRAPPED: dict[str, Callable[[nn.Module], nn.Module]] = {
    "ddp": DistributedDataParallel,
    "fsdp2": sharded,
}


def ours(recipe: Recipe, precision: str, steps: int, ranks: Ranks) -> Step:
    options = TrainOptions(steps=steps, clip_norm=CLIP, watch=0)
    parts = assemble(recipe, plan_named(precision), options, CPU, ranks)

    def step(batch: Any) -> float:
        taken = take_step(parts.engine, parts.compute_loss, lambda: batch, path=recipe.path)
        return taken.loss

    return step


def the_loop(recipe: Recipe, precision: str, steps: int, ranks: Ranks, place: Path) -> Step:
    options = TrainOptions(steps=steps, clip_norm=CLIP, watch=0, measure=False)
    parts = assemble(recipe, plan_named(precision), options, CPU, ranks)
    points: list[Any] = []
    place.mkdir()
    run = Run(parts, options, RunDirectory(place), {}, points.append)
    run.begin(new_record(parts, options, ""), ())

    def step(batch: Any) -> float:
        run.next_micro_batch = lambda: batch  # type: ignore[method-assign]
        run.stop_is_asked()
        run.take_step()
        return float(points.pop().loss)

    return step


@dataclass
class Row:
    """One way to share the work in one precision."""

    kind: str
    precision: str
    hand_ms: float
    """Median wall time of a step by hand, on the slower rank."""
    ours_ms: float
    overhead: float
    """Median over rounds of ours / by hand, less 1."""
    interval: tuple[float, float]
    """95 %."""
    cpu_overhead: float
    """The same of CPU seconds, all ranks and threads together."""
    cpu_interval: tuple[float, float]
    loop_ms: float
    """The same four of the loop."""
    loop_overhead: float
    loop_interval: tuple[float, float]
    loop_cpu_overhead: float
    loop_cpu_interval: tuple[float, float]
    control: float
    """The second loop by hand over the first, in wall time."""
    control_interval: tuple[float, float]
    cpu_control: float
    cpu_control_interval: tuple[float, float]
    losses_differ_by: float
    """The largest relative difference between the losses of ours and by hand."""
    n: int
    """Rounds."""
    load: tuple[float, float, float]
    """Of the machine at the end: 1, 5 and 15 minutes."""

    def __str__(self) -> str:
        """Return the row of the table in docs/distributed.md."""

        def percent(middle: float, span: tuple[float, float]) -> str:
            low, high = span
            return f"{middle * 100:+.1f} % [{low * 100:.1f}, {high * 100:.1f}]"

        cells = (
            self.kind,
            self.precision,
            f"{self.hand_ms:.0f} ms",
            percent(self.cpu_overhead, self.cpu_interval),
            percent(self.loop_cpu_overhead, self.loop_cpu_interval),
            percent(self.cpu_control, self.cpu_control_interval),
            percent(self.overhead, self.interval),
            percent(self.loop_overhead, self.loop_interval),
            percent(self.control, self.control_interval),
        )
        return f"| {' | '.join(cells)} |"


def median_ratio(ours: list[float], hand: list[float]) -> tuple[float, tuple[float, float]]:
    """Return the median of the ratios less 1, and the interval of order statistics around it."""
    ratios = sorted(a / b - 1 for a, b in zip(ours, hand, strict=True))
    n = len(ratios)
    # Ranks of the sign test, by its normal approximation, rounded outwards.
    reach = 0.98 * math.sqrt(n) + 0.5
    low, high = max(0, math.floor(n / 2 - reach)), min(n - 1, math.ceil(n / 2 + reach) - 1)
    return (
        round(statistics.median(ratios), 5),
        (round(ratios[low], 5), round(ratios[high], 5)),
    )


def warm(count: int) -> int:
    """Return how many rounds at the beginning are not timed."""
    return min(20, count // 2)


def rounds_of(
    arms: dict[str, Step], stream: BatchStream, count: int, ranks: Ranks
) -> dict[str, list[tuple[float, float, float]]]:
    """Take steps of all arms in turn: (wall, CPU, loss) of each on this rank."""
    chance = random.Random(0)
    order = list(arms)
    seen: dict[str, list[tuple[float, float, float]]] = {name: [] for name in arms}
    for number in range(warm(count) + count):
        _, batch = next(stream)
        chance.shuffle(order)
        for name in order:
            dist.barrier()
            wall, cpu = time.perf_counter(), time.process_time()
            loss = arms[name](batch)
            found = time.perf_counter() - wall, time.process_time() - cpu, loss
            if number >= warm(count):
                seen[name].append(found)
    return seen


def measure(recipe: Recipe, precision: str, count: int, ranks: Ranks, place: Path) -> Row | None:
    """Train all arms, round by round; the row is rank 0's to return."""
    steps = warm(count) + count
    arms = {
        "hand": by_hand(ranks.kind, recipe, precision, steps),
        "ours": ours(recipe, precision, steps, ranks),
        "loop": the_loop(recipe, precision, steps, ranks, place),
        "again": by_hand(ranks.kind, recipe, precision, steps),
    }
    training, _ = recipe.load_data()
    share = ranks.rank, ranks.size
    stream = BatchStream(training, recipe.batch_size, seed=0, collate=recipe.collate, share=share)
    gathered = ranks.gather(rounds_of(arms, stream, count, ranks))
    return _row(ranks.kind, precision, gathered) if ranks.is_main else None


def _row(
    kind: str, precision: str, gathered: list[dict[str, list[tuple[float, float, float]]]]
) -> Row:
    def joint(arm: str, part: int, how: Callable[[list[float]], float]) -> list[float]:
        parts = [[each[part] for each in of_rank[arm]] for of_rank in gathered]
        return [how(list(across)) for across in zip(*parts, strict=True)]

    wall = {arm: joint(arm, 0, max) for arm in gathered[0]}
    cpu = {arm: joint(arm, 1, sum) for arm in gathered[0]}
    loss = {arm: joint(arm, 2, statistics.fmean) for arm in gathered[0]}
    overhead, interval = median_ratio(wall["ours"], wall["hand"])
    cpu_overhead, cpu_interval = median_ratio(cpu["ours"], cpu["hand"])
    loop, loop_interval = median_ratio(wall["loop"], wall["hand"])
    loop_cpu, loop_cpu_interval = median_ratio(cpu["loop"], cpu["hand"])
    control, control_interval = median_ratio(wall["again"], wall["hand"])
    cpu_control, cpu_control_interval = median_ratio(cpu["again"], cpu["hand"])
    return Row(
        kind=kind,
        precision=precision,
        hand_ms=round(statistics.median(wall["hand"]) * 1e3, 3),
        ours_ms=round(statistics.median(wall["ours"]) * 1e3, 3),
        overhead=overhead,
        interval=interval,
        cpu_overhead=cpu_overhead,
        cpu_interval=cpu_interval,
        loop_ms=round(statistics.median(wall["loop"]) * 1e3, 3),
        loop_overhead=loop,
        loop_interval=loop_interval,
        loop_cpu_overhead=loop_cpu,
        loop_cpu_interval=loop_cpu_interval,
        control=control,
        control_interval=control_interval,
        cpu_control=cpu_control,
        cpu_control_interval=cpu_control_interval,
        losses_differ_by=max(
            abs(a / b - 1)
            for arm in ("ours", "loop")
            for a, b in zip(loss[arm], loss["hand"], strict=True)
        ),
        n=len(wall["hand"]),
        load=os.getloadavg(),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kinds", nargs="*", default=list(WRAPPED), choices=list(WRAPPED))
    parser.add_argument("--precisions", nargs="*", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument("--size", default="tiny", help="of austen")
    parser.add_argument("--rounds", type=int, default=400)
    asked = parser.parse_args()
    if "RANK" not in os.environ:
        start_ranks([f"--nproc-per-node={RANKS}", "--standalone", __file__, *sys.argv[1:]])
        return
    torch.set_num_threads(1)
    recipe = load_recipe("austen", [f"size={asked.size}"])
    first = together_in(asked.kinds[0], os.environ)
    rows = []
    if first.is_main:
        print("| | precision | by hand | CPU: engine | loop | control | wall: ", end="")
        print("engine | loop | control |")
    for number, kind in enumerate(asked.kinds):
        world = replace(first.meeting.world, attempt=number)
        together = Together(kind=kind, meeting=Meeting(world, first.meeting.store))
        with together.meet(vars(asked), CPU) as ranks:
            for precision in asked.precisions:
                with TemporaryDirectory() as place:
                    row = measure(recipe, precision, asked.rounds, ranks, Path(place) / "run")
                gc.collect()  # DDP by hand must not outlive the group; see parallel.replicas
                if row is not None:
                    rows.append(row)
                    print(row, flush=True)
    if rows:
        write(rows, asked.size)


def write(rows: list[Row], size: str) -> None:
    """Write the rows, and keep those of the record that were not run again."""
    path = RESULTS / f"{NAME}.json"
    known = json.loads(path.read_text())["rows"] if path.exists() else []
    new = [{"size": size, **row} for row in to_json(rows)]
    places = [(row["size"], row["kind"], row["precision"]) for row in new]
    kept = [r for r in known if (r["size"], r["kind"], r["precision"]) not in places]
    write_results(
        NAME,
        [*kept, *new],
        question="step time of the engine, and of the training loop, over torch.distributed code "
        "by hand, as a ratio less 1",
        model="austen, fused AdamW, clipping, warm-up and cosine; global batch of the recipe",
        ranks=RANKS,
        backend="gloo",
        threads_per_rank=1,
        target=TARGET,
        clock="wall, the slower rank; CPU time of all ranks",
    )


if __name__ == "__main__":
    main()
