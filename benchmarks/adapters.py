"""What our precision in a foreign trainer costs over the trainer's own, in microseconds per step.

The model is as small as a model can be (an MLP 16-16-4, batch 8, SGD), so that almost all of a step
is bookkeeping. Both arms of a trainer and precision train at once, each in a thread, and take turns
step by step, so that they see the same machine; a step's time is its own thread's CPU time. The
overhead is the median over all steps of the difference to the other arm's step beside it; the
spread is that of the medians of fifty steps each.

    python benchmarks/adapters.py [--steps 1000] [--host Fabric ...]

What ours does beside the trainer's own: in fp32 and bf16 it checks every gradient, which the
trainers do not do there, and keeps the ledger of skips. fp16 on a CPU is what Lightning and
Accelerate do not do by themselves; their arm gets torch's own scaler and autocast by hand.
Rows of trainers that are not run again stay in benchmarks/results/adapters-cpu.json.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import os
import statistics
import tempfile
import threading
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
WARM = 30
"""Steps at the beginning that are not timed."""
CHUNK = 50


class Turns:
    """Lets two threads take steps in turn."""

    def __init__(self) -> None:
        self._may_go = {True: threading.Event(), False: threading.Event()}
        self._may_go[True].set()
        self.has_failed = False

    def wait(self, arm: bool) -> None:
        self._may_go[arm].wait()
        self._may_go[arm].clear()
        if self.has_failed:
            raise SystemExit

    def pass_on(self, arm: bool) -> None:
        self._may_go[not arm].set()


class Clock:
    """Times the steps of one arm, and gives the turn to the other after each."""

    def __init__(self, turns: Turns, arm: bool) -> None:
        self.times: list[float] = []
        self._turns, self._arm = turns, arm
        self._start = 0.0

    def tick(self) -> None:
        """Note the end of a step, but for the first, and wait for the next turn."""
        if self._start:
            self.times.append((time.thread_time() - self._start) * 1e6)
        self._turns.pass_on(self._arm)
        self._turns.wait(self._arm)
        self._start = time.thread_time()


Block = Callable[[int, Clock], None]
"""Trains so many steps, and tells the clock after each."""


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


def looped(step: Callable[[], object], count: int, clock: Clock) -> None:
    for _ in range(count):
        step()
        clock.tick()


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

    return lambda count, clock: looped(step, count, clock)


def accelerate(precision: str, *, ours: bool) -> Block:
    from accelerate import Accelerator

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

    return lambda count, clock: looped(step, count, clock)


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

    def block(count: int, clock: Clock) -> None:
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

    return block


def transformers(precision: str, *, ours: bool) -> Block:
    from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

    class Timed(TrainerCallback):  # type: ignore[misc]
        def __init__(self, clock: Clock) -> None:
            self.clock = clock

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.clock.tick()

    sample = {"x": torch.randn(16), "labels": torch.tensor(1)}

    def block(count: int, clock: Clock) -> None:
        data = [sample] * (8 * count)  # one epoch, as a step is not one
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
    """Median of the paired differences."""
    quartiles_us: tuple[float, float]
    """Of the medians of fifty differences each."""
    n: int
    """Steps of each arm."""

    @classmethod
    def of(cls, host: str, precision: str, times: dict[bool, list[float]]) -> Row:
        differences = [a - b for a, b in zip(times[True], times[False], strict=True)]
        chunks = [differences[i : i + CHUNK] for i in range(0, len(differences), CHUNK)]
        low, _, high = statistics.quantiles(map(statistics.median, chunks), n=4)
        return cls(
            host=host,
            precision=precision,
            own_us=round(statistics.median(times[False]), 1),
            ours_us=round(statistics.median(times[True]), 1),
            overhead_us=round(statistics.median(differences), 1),
            quartiles_us=(round(low, 1), round(high, 1)),
            n=len(differences),
        )

    def __str__(self) -> str:
        low, high = self.quartiles_us
        verdict = "met" if self.overhead_us <= TARGET_US else "MISSED"
        return (
            f"{self.host:14}{self.precision:6}{self.own_us:9.1f}{self.ours_us:9.1f}"
            f"{self.overhead_us:+9.1f}  ({low:+.1f} .. {high:+.1f})  target <= 30: {verdict}"
        )


def measure(host: str, precision: str, count: int) -> Row:
    """Train both arms, turn by turn."""
    _reset(host)
    turns = Turns()
    clocks = {arm: Clock(turns, arm) for arm in (True, False)}
    blocks = {arm: HOSTS[host](precision, ours=arm) for arm in (True, False)}

    def run(arm: bool) -> None:
        try:
            turns.wait(arm)  # they are built one after the other, too
            blocks[arm](WARM + count, clocks[arm])
        except BaseException:
            turns.has_failed = True
            raise
        finally:
            turns.pass_on(arm)

    threads = [threading.Thread(target=run, args=(arm,)) for arm in (True, False)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return Row.of(host, precision, {arm: clock.times[WARM:] for arm, clock in clocks.items()})


def _reset(host: str) -> None:
    """An Accelerator keeps its precision in its class."""
    if host in ("Accelerate", "Transformers"):
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(reset_partial_state=True)


def _other_rows(hosts: set[str]) -> list[dict[str, Any]]:
    """Return what was measured before of trainers that are not measured now."""
    path = RESULTS / f"{NAME}.json"
    known = json.loads(path.read_text())["rows"] if path.exists() else []
    return [row for row in known if row["host"] not in hosts]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--host", action="append", choices=list(HOSTS))
    asked = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    rows = []
    print(f"{'trainer':14}{'':6}{'own us':>9}{'ours us':>9}{'over':>9}")
    for host in asked.host or HOSTS:
        for precision in PRECISIONS:
            with warnings.catch_warnings(action="ignore"):
                rows.append(measure(host, precision, asked.steps))
            print(rows[-1], flush=True)
    write_results(
        NAME,
        [*_other_rows({row.host for row in rows}), *to_json(rows)],
        question="microseconds per step over the trainer's own precision handling",
        model="MLP 16-16-4, batch 8, SGD, one thread",
        clock="CPU time of the thread",
        steps=asked.steps,
        versions=versions(),
    )


if __name__ == "__main__":
    main()
