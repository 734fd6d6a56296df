"""What our precision in a foreign trainer costs over the trainer's own, in microseconds per step.

The model is as small as a model can be (an MLP 16-16-4, batch 8, SGD), so that almost all of a step
is bookkeeping. Both arms of a trainer and precision train at once, each in a thread, and take turns
step by step on one core, so that they see the same machine; a step's time is its own thread's CPU
time. Whoever goes first is slower by some microseconds, so both do once: a row is the mean of the
medians of two trainings, and its spread that of the medians of fifty steps. The trainer's own
beside the trainer's own is measured the same way: the control, which is 0 but for noise.

    python benchmarks/adapters.py [--steps 1000] [--host Fabric ...]

What ours does beside the trainer's own: in fp32 and bf16 it checks every gradient, which the
trainers do not do there, and keeps the ledger of skips. fp16 on a CPU is what Lightning and
Accelerate do not do by themselves; their arm gets torch's own scaler and autocast by hand. Ours
watches a Transformers Trainer as by default, every hundredth step; what those steps cost is in the
row as well.
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
from collections.abc import Callable, Sequence
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
from narrowcast.watch.watch import EVERY

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
    """Median of the paired differences; the mean of two, each arm having gone first."""
    quartiles_us: tuple[float, float]
    """Of the medians of fifty differences each, means of two likewise."""
    control_us: float
    """The trainer's own over itself, measured in the same way."""
    watched_us: float | None
    """The overhead of the steps whose values are looked at; None where none are."""
    n: int
    """Pairs of steps."""

    def __str__(self) -> str:
        low, high = self.quartiles_us
        verdict = "met" if self.overhead_us <= TARGET_US else "MISSED"
        return (
            f"{self.host:14}{self.precision:6}{self.own_us:9.1f}{self.ours_us:9.1f}"
            f"{self.overhead_us:+9.1f}  ({low:+.1f} .. {high:+.1f}){self.control_us:+9.1f}"
            f"  target <= {TARGET_US:.0f}: {verdict}"
        )


def measure(host: str, precision: str, count: int) -> Row:
    """Train ours beside the trainer's own, each going first once, and that beside itself."""
    before, own = trained(host, precision, count, (True, False))
    own_too, after = trained(host, precision, count, (False, True))
    over = differences(before, own), differences(after, own_too)
    same = [trained(host, precision, count, (False, False)) for _ in range(2)]
    control = differences(*same[0]), differences(*reversed(same[1]))
    chunks = [
        mean_of_medians([one[i : i + CHUNK] for one in over]) for i in range(0, len(over[0]), CHUNK)
    ]
    low, _, high = statistics.quantiles(chunks, n=4)
    # The first time kept is that of step WARM + 2: the clock starts at the end of the first step.
    watched = [one[-(WARM + 2) % EVERY :: EVERY] for one in over]
    is_watched = host == "Transformers" and bool(watched[0])
    return Row(
        host=host,
        precision=precision,
        own_us=round(mean_of_medians([own, own_too]), 1),
        ours_us=round(mean_of_medians([before, after]), 1),
        overhead_us=round(mean_of_medians(over), 1),
        quartiles_us=(round(low, 1), round(high, 1)),
        control_us=round(mean_of_medians(control), 1),
        watched_us=round(mean_of_medians(watched), 1) if is_watched else None,
        n=2 * len(own),
    )


def differences(ours: Sequence[float], own: Sequence[float]) -> list[float]:
    return [a - b for a, b in zip(ours, own, strict=True)]


def mean_of_medians(parts: Sequence[Sequence[float]]) -> float:
    return statistics.mean(map(statistics.median, parts))


def trained(
    host: str, precision: str, count: int, ours: tuple[bool, bool]
) -> tuple[list[float], list[float]]:
    """Train two arms, turn by turn; returns the times of each one's steps, first of the first."""
    _reset(host)
    turns = Turns()
    clocks = {arm: Clock(turns, arm) for arm in (True, False)}
    blocks = {
        arm: HOSTS[host](precision, ours=is_ours)
        for arm, is_ours in zip((True, False), ours, strict=True)
    }

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
    return clocks[True].times[WARM:], clocks[False].times[WARM:]


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
    if hasattr(os, "sched_setaffinity"):  # two cores are never equally busy
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    logging.disable(logging.WARNING)
    rows = []
    print(f"{'trainer':14}{'':6}{'own us':>9}{'ours us':>9}{'over':>9}{'control':>26}")
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
        clock="CPU time of the thread, both arms on one core",
        steps=asked.steps,
        versions=versions(),
    )


if __name__ == "__main__":
    main()
