"""What our precision in a foreign trainer costs over the trainer's own, in microseconds per step.

The model is as small as a model can be (an MLP 16-16-4, batch 8, SGD), so that almost all of a step
is bookkeeping. Each arm trains in blocks of steps, the two arms of a trainer and precision one
after the other in random order. A block's time is the median of its steps; the overhead is the
median over rounds of the difference within a round. The clock is the process's CPU time with one
thread.

    python benchmarks/adapters.py [--rounds 20] [--steps 150] [--host Fabric ...]

What ours does beside the trainer's own: in fp32 and bf16 it checks every gradient, which the
trainers do not do there, and keeps the ledger of skips. fp16 on a CPU is what Lightning and
Accelerate do not do by themselves; their arm gets torch's own scaler and autocast by hand.
Rows of trainers that are not run again stay in benchmarks/results/adapters-cpu.json.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import logging
import os
import random
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.nn.functional as F
from overhead import versions
from provenance import RESULTS, write_results
from torch import Tensor, nn
from torch.utils.data import DataLoader

from narrowcast.integrations import accelerate as our_accelerate
from narrowcast.integrations import transformers as our_transformers
from narrowcast.integrations.lightning import fabric_precision, trainer_precision
from narrowcast.records.codec import to_json

if importlib.util.find_spec("torchvision"):
    # Built for CUDA, it stops at operators that its library should have declared; transformers
    # and lightning import it where they find it, and call nothing of it here.
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

NAME = "adapters-cpu"
TARGET_US = 30.0
PRECISIONS = ("fp32", "bf16", "fp16")
LIGHTNINGS = {"fp32": "32-true", "bf16": "bf16-mixed"}
WARM = 20
"""Steps at the beginning of a block that are not timed."""

Block = Callable[[int], float]
"""Trains so many steps and returns the microseconds that one took."""


class Net(nn.Module):
    """Returns the loss, as the Trainer of transformers wants it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": F.cross_entropy(self.layers(x), labels)}


def batch() -> dict[str, Tensor]:
    return {"x": torch.randn(8, 16), "labels": torch.randint(0, 4, (8,))}


class Clock:
    """Times each step of a block but the first ones."""

    def __init__(self) -> None:
        self._ends: list[float] = []

    def tick(self) -> None:
        """Note the end of a step."""
        self._ends.append(time.process_time())

    def us(self) -> float:
        """Return the median: a step in ten is disturbed by other work on the machine."""
        ends = self._ends[WARM:]
        return statistics.median(b - a for a, b in itertools.pairwise(ends)) * 1e6


def looped(step: Callable[[], object], count: int) -> float:
    clock = Clock()
    for _ in range(count):
        step()
        clock.tick()
    return clock.us()


def fabric(precision: str, *, ours: bool) -> Block:
    from lightning.fabric import Fabric
    from lightning.fabric.plugins import MixedPrecision

    if ours:
        chosen: dict[str, Any] = {"plugins": [fabric_precision(precision, device="cpu")]}
    elif precision == "fp16":
        scaler = torch.amp.GradScaler("cpu")
        chosen = {"plugins": [MixedPrecision("16-mixed", "cpu", scaler=scaler)]}
    else:
        chosen = {"precision": LIGHTNINGS[precision]}
    host = Fabric(accelerator="cpu", devices=1, **chosen)
    net, data = Net(), batch()
    model, optimizer = host.setup(net, torch.optim.SGD(net.parameters(), lr=0.01))

    def step() -> None:
        optimizer.zero_grad()
        host.backward(model(**data)["loss"])
        optimizer.step()

    return lambda count: looped(step, count)


def accelerate(precision: str, *, ours: bool) -> Block:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    words = {"fp32": "no"}.get(precision, precision)
    host = Accelerator(cpu=True, mixed_precision=words)
    net, data = Net(), batch()
    parts = net, torch.optim.SGD(net.parameters(), lr=0.01)
    if ours:
        model, optimizer = our_accelerate.attach(host, precision).prepare(*parts)
    else:
        if precision == "fp16":
            host.native_amp, host.scaler = True, torch.amp.GradScaler("cpu")
        model, optimizer = host.prepare(*parts)

    def step() -> None:
        optimizer.zero_grad()
        host.backward(model(**data)["loss"])
        optimizer.step()

    return lambda count: looped(step, count)


def lightning(precision: str, *, ours: bool) -> Block:
    import lightning.pytorch as pl
    from lightning.pytorch.plugins import MixedPrecision

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()

        def training_step(self, data: Any, _: int) -> Tensor:
            return self.net(**data)["loss"]

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.01)

    class Timed(pl.Callback):
        def __init__(self, clock: Clock) -> None:
            self.clock = clock

        def on_train_batch_end(self, *_: Any) -> None:
            self.clock.tick()

    def block(count: int) -> float:
        clock = Clock()
        if ours:
            chosen: dict[str, Any] = {"plugins": [trainer_precision(precision, device="cpu")]}
        elif precision == "fp16":
            chosen = {"plugins": [MixedPrecision("16-mixed", "cpu")]}
        else:
            chosen = {"precision": LIGHTNINGS[precision]}
        host = pl.Trainer(
            accelerator="cpu", devices=1, max_epochs=1, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, callbacks=[Timed(clock)],
            **chosen,
        )  # fmt: skip
        host.fit(Module(), DataLoader([batch()] * count, batch_size=None))
        return clock.us()

    return block


def transformers(precision: str, *, ours: bool) -> Block:
    from accelerate.state import AcceleratorState
    from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

    class Timed(TrainerCallback):  # type: ignore[misc]
        def __init__(self, clock: Clock) -> None:
            self.clock = clock

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.clock.tick()

    data = [{"x": torch.randn(16), "labels": torch.tensor(1)} for _ in range(8)]

    def block(count: int) -> float:
        clock = Clock()
        AcceleratorState._reset_state(reset_partial_state=True)
        with tempfile.TemporaryDirectory() as folder:
            arguments = TrainingArguments(
                output_dir=folder, use_cpu=True, max_steps=count, logging_strategy="no",
                save_strategy="no", report_to=[], disable_tqdm=True, optim="sgd",
                fp16=precision == "fp16", bf16=precision == "bf16", dataloader_pin_memory=False,
            )  # fmt: skip
            host = Trainer(Net(), arguments, train_dataset=data, callbacks=[Timed(clock)])
            host.remove_callback(PrinterCallback)
            if ours:
                our_transformers.attach(host, precision, ledger_at=0)
            elif precision == "fp16":
                host.accelerator.native_amp = True
                host.accelerator.scaler = torch.amp.GradScaler("cpu")
            host.train()
        return clock.us()

    return block


HOSTS = {
    "Fabric": fabric,
    "Lightning": lightning,
    "Accelerate": accelerate,
    "Transformers": transformers,
}


@dataclass
class Row:
    """One trainer in one precision; times in microseconds per step."""

    host: str
    precision: str
    own_us: float
    """Median with the trainer's own precision."""
    ours_us: float
    overhead_us: float
    """Median over rounds of the paired difference."""
    quartiles_us: tuple[float, float]
    n: int
    differences_us: list[float]

    @classmethod
    def of(cls, host: str, precision: str, times: dict[bool, list[float]]) -> Row:
        differences = [a - b for a, b in zip(times[True], times[False], strict=True)]
        low, middle, high = (round(q, 1) for q in statistics.quantiles(differences, n=4))
        return cls(
            host=host,
            precision=precision,
            own_us=round(statistics.median(times[False]), 1),
            ours_us=round(statistics.median(times[True]), 1),
            overhead_us=middle,
            quartiles_us=(low, high),
            n=len(differences),
            differences_us=[round(d, 1) for d in differences],
        )

    def __str__(self) -> str:
        low, high = self.quartiles_us
        verdict = "met" if self.overhead_us <= TARGET_US else "MISSED"
        return (
            f"{self.host:14}{self.precision:6}{self.own_us:9.1f}{self.ours_us:9.1f}"
            f"{self.overhead_us:+9.1f}  ({low:+.1f} .. {high:+.1f})  target <= 30: {verdict}"
        )


def measure(host: str, precision: str, rounds: int, count: int) -> Row:
    make, chance = HOSTS[host], random.Random(0)
    times: dict[bool, list[float]] = {True: [], False: []}
    for turn in range(rounds + 1):
        arms = [True, False]
        chance.shuffle(arms)
        for ours in arms:
            # Made anew for each block: an Accelerator keeps its state in its class.
            taken = make(precision, ours=ours)(count)
            if turn:  # the first round warms up
                times[ours].append(taken)
    return Row.of(host, precision, times)


def _other_rows(hosts: set[str]) -> list[dict[str, Any]]:
    """Return what was measured before of trainers that are not measured now."""
    path = RESULTS / f"{NAME}.json"
    known = json.loads(path.read_text())["rows"] if path.exists() else []
    return [row for row in known if row["host"] not in hosts]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--steps", type=int, default=150, help="steps per block")
    parser.add_argument("--host", action="append", choices=list(HOSTS))
    asked = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    rows = []
    print(f"{'trainer':14}{'':6}{'own us':>9}{'ours us':>9}{'over':>9}")
    for host in asked.host or HOSTS:
        for precision in PRECISIONS:
            with warnings.catch_warnings(action="ignore"):
                rows.append(measure(host, precision, asked.rounds, asked.steps))
            print(rows[-1], flush=True)
    write_results(
        NAME,
        [*_other_rows({row.host for row in rows}), *to_json(rows)],
        question="microseconds per step over the trainer's own precision handling",
        model="MLP 16-16-4, batch 8, SGD, one thread",
        clock="process CPU time",
        rounds=asked.rounds,
        steps_per_block=asked.steps,
        versions=versions(),
    )


if __name__ == "__main__":
    main()
