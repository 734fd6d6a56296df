"""What a training loop costs over the same loop written by hand, in microseconds per step.

The model is as small as a model can be (an MLP 16-16-4, batch 8, SGD), so that almost all of a step
is bookkeeping. All loops run in one process, in interleaved blocks in a random order per round; the
overhead is the median over rounds of the difference to the hand-written loop of the same precision
in the same round. On a CPU the clock is the process's CPU time with one thread, which other
processes on the machine disturb least; on CUDA it is wall time up to a synchronisation per block.

    python benchmarks/overhead.py [--device cuda] [--rounds 40] [--steps 150]

Peers that are not installed are reported as such. Writes benchmarks/results/overhead-<device>.json.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import random
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.nn.functional as F
from provenance import write_results
from torch import nn

from narrowcast.engine.engine import Engine
from narrowcast.records.codec import to_json

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TARGET_US = {"fp32": 25.0, "bf16": 25.0, "fp16": 40.0}

Step = Callable[[], object]


class AbsentError(Exception):
    """This loop cannot run here; the message says why."""


@dataclass
class Bench:
    """One loop's own model, data and optimizer."""

    device: torch.device

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        layers = nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)
        self.model: nn.Module = nn.Sequential(*layers).to(self.device)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01)
        self.x = torch.randn(8, 16, device=self.device)
        self.y = torch.randint(0, 4, (8,), device=self.device)
        self.dtypes: set[torch.dtype] = set()
        self._probe = layers[-1].register_forward_hook(
            lambda _m, _i, output: self.dtypes.add(output.dtype)
        )

    def executed(self, step: Step) -> str:
        """Run one step and name the dtype in which the last layer really computed."""
        step()
        self._probe.remove()
        return ", ".join(str(d).removeprefix("torch.") for d in self.dtypes)


def hand(bench: Bench, precision: str) -> Step:
    model, optimizer, x, y = bench.model, bench.optimizer, bench.x, bench.y
    kind, dtype = bench.device.type, DTYPES[precision]

    def fp32() -> None:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()

    def bf16() -> None:
        optimizer.zero_grad()
        with torch.autocast(kind, dtype=dtype):
            loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()

    scaler = torch.amp.GradScaler(kind)

    def fp16() -> None:
        optimizer.zero_grad()
        with torch.autocast(kind, dtype=dtype):
            loss = F.cross_entropy(model(x), y)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

    return {"fp32": fp32, "bf16": bf16, "fp16": fp16}[precision]


def narrowcast(bench: Bench, precision: str) -> Step:
    model, x, y = bench.model, bench.x, bench.y
    engine = Engine(model, bench.optimizer, precision)

    def step() -> None:
        with engine.forward():
            loss = F.cross_entropy(model(x), y)
        engine.backward(loss)
        engine.step()

    return step


def fabric(bench: Bench, precision: str) -> Step:
    try:
        from lightning.fabric import Fabric
        from lightning.fabric.plugins import MixedPrecision
    except ImportError:
        try:
            from lightning_fabric import Fabric
            from lightning_fabric.plugins import MixedPrecision
        except ImportError:
            raise AbsentError("not installed") from None
    kind = bench.device.type
    if precision == "fp16":
        # Asked for "16-mixed" on a CPU, Fabric runs bf16; with the plugin spelled out it does not.
        scaler = torch.amp.GradScaler(kind)
        chosen = {"plugins": [MixedPrecision("16-mixed", kind, scaler=scaler)]}
    else:
        chosen = {"precision": {"fp32": "32-true", "bf16": "bf16-mixed"}[precision]}
    peer = Fabric(accelerator=kind, devices=1, **chosen)
    model, optimizer = peer.setup(bench.model, bench.optimizer)
    x, y = bench.x, bench.y

    def step() -> None:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        peer.backward(loss)
        optimizer.step()

    return step


def accelerate(bench: Bench, precision: str) -> Step:
    try:
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState
    except ImportError:
        raise AbsentError("not installed") from None
    if precision == "fp16" and bench.device.type == "cpu":
        raise AbsentError("runs fp32 without a word on a CPU")
    AcceleratorState._reset_state()
    chosen = "no" if precision == "fp32" else precision
    peer = Accelerator(cpu=bench.device.type == "cpu", mixed_precision=chosen)
    model, optimizer = peer.prepare(bench.model, bench.optimizer)
    x, y = bench.x, bench.y

    def step() -> None:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        peer.backward(loss)
        optimizer.step()

    return step


LOOPS = {"hand": hand, "narrowcast": narrowcast, "Fabric": fabric, "Accelerate": accelerate}


@dataclass
class Row:
    """One loop in one precision; times in microseconds per step."""

    loop: str
    precision: str
    executed: str
    note: str = ""
    median_us: float | None = None
    overhead_us: float | None = None
    """Median over rounds of the paired difference to the hand-written loop."""
    quartiles_us: tuple[float, float] | None = None
    """Of the paired differences."""
    n: int = 0
    differences_us: list[float] | None = None


def build(device: torch.device) -> tuple[dict[tuple[str, str], Step], list[Row]]:
    """Make every loop that can run here, and a row for each."""
    steps: dict[tuple[str, str], Step] = {}
    rows = []
    for precision, dtype in DTYPES.items():
        for name, make in LOOPS.items():
            bench = Bench(device)
            try:
                with warnings.catch_warnings(action="ignore"):
                    step = make(bench, precision)
                    executed = bench.executed(step)
            except AbsentError as reason:
                rows.append(Row(name, precision, "", note=str(reason)))
                continue
            wanted = str(dtype).removeprefix("torch.")
            note = "" if executed == wanted else f"ran in {executed}"
            steps[name, precision] = step
            rows.append(Row(name, precision, executed, note=note))
    return steps, rows


def block(step: Step, count: int, device: torch.device) -> float:
    """Return microseconds per step over `count` steps."""
    cpu = device.type == "cpu"
    clock = time.process_time if cpu else time.perf_counter
    if not cpu:
        torch.cuda.synchronize()
    start = clock()
    for _ in range(count):
        step()
    if not cpu:
        torch.cuda.synchronize()
    return (clock() - start) / count * 1e6


def measure(
    steps: dict[tuple[str, str], Step], rounds: int, count: int, device: torch.device
) -> dict[tuple[str, str], list[float]]:
    times: dict[tuple[str, str], list[float]] = {key: [] for key in steps}
    order, chance = list(steps), random.Random(0)
    for step in steps.values():
        block(step, count, device)  # warm-up: allocator, autocast's and optimizers' first steps
    for _ in range(rounds):
        chance.shuffle(order)
        for key in order:
            times[key].append(block(steps[key], count, device))
    return times


def fill(rows: list[Row], times: dict[tuple[str, str], list[float]]) -> None:
    for row in rows:
        own = times.get((row.loop, row.precision))
        if own is None:
            continue
        base = times["hand", row.precision]
        row.median_us = round(statistics.median(own), 1)
        row.n = len(own)
        if row.loop == "hand":
            continue
        differences = [a - b for a, b in zip(own, base, strict=True)]
        low, row.overhead_us, high = (round(q, 1) for q in statistics.quantiles(differences, n=4))
        row.quartiles_us = (low, high)
        row.differences_us = [round(d, 1) for d in differences]


def table(rows: list[Row]) -> str:
    lines = [f"{'loop':12}{'precision':>10}{'us/step':>10}{'over hand':>11}{'quartiles':>18}  note"]
    for row in rows:
        if row.median_us is None:
            lines.append(f"{row.loop:12}{row.precision:>10}{'-':>10}{'-':>11}{'-':>18}  {row.note}")
            continue
        over = "" if row.overhead_us is None else f"{row.overhead_us:+.1f}"
        spread = "" if row.quartiles_us is None else "{:+.1f} .. {:+.1f}".format(*row.quartiles_us)
        note = row.note
        if row.loop == "narrowcast" and not note and row.overhead_us is not None:
            target = TARGET_US[row.precision]
            note = f"target <= {target:.0f}: {'met' if row.overhead_us <= target else 'MISSED'}"
        lines.append(
            f"{row.loop:12}{row.precision:>10}{row.median_us:>10.1f}{over:>11}{spread:>18}  {note}"
        )
    return "\n".join(lines)


def versions() -> dict[str, str]:
    found = {}
    for name in ("torch", "lightning-fabric", "lightning", "accelerate"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--steps", type=int, default=150, help="steps per block")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device(asked.device)
    steps, rows = build(device)
    fill(rows, measure(steps, asked.rounds, asked.steps, device))
    print(table(rows))
    write_results(
        f"overhead-{asked.device}",
        to_json(rows),
        question="microseconds per step over the same hand-written loop",
        model="MLP 16-16-4, batch 8, SGD, one thread",
        measured_on=asked.device,
        clock="process CPU time" if asked.device == "cpu" else "wall time, synchronised",
        rounds=asked.rounds,
        steps_per_block=asked.steps,
        versions=versions(),
    )


if __name__ == "__main__":
    main()
