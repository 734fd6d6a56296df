"""Cross-entropy of a GPT-2 head, whole and in chunks: peak bytes, time, distance from fp64.

The head is GPT-2's (50,304 x 768), the batch what a CPU can do in seconds (192 tokens; a GPU has
8,192). One step is forward and backward with gradients for hidden states and weight. Bytes are the
peak of a MemoryLedger beyond the inputs, gradients included: exact, n = 1. Time is the process's
CPU time with one thread, variants interleaved in a random order a round. Distance is that of the
weight's gradient from fp64 arithmetic on the same inputs, relative, by norm.

    python benchmarks/chunked_loss.py [--tokens 192] [--rounds 3]

F.linear_cross_entropy is torch's own, from 2.13 on; so slow on a CPU that it is timed once, in the
run that the ledger watches. Writes benchmarks/results/chunked-loss-cpu.json.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.nn.functional as F
from provenance import write_results
from torch import Tensor

from narrowcast.loss.cross_entropy import CHUNK_BYTES, linear_cross_entropy
from narrowcast.memory.measure import MemoryLedger
from narrowcast.records.codec import to_json
from narrowcast.units import format_bytes

CLASSES, WIDTH = 50_304, 768
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass
class Row:
    """One variant in one format; times in seconds of CPU."""

    variant: str
    formats: str
    peak_bytes: int = 0
    beyond_gradients_bytes: int = 0
    forward_s: float = 0.0
    backward_s: float = 0.0
    forward_times_s: list[float] = field(default_factory=list)
    backward_times_s: list[float] = field(default_factory=list)
    distance: float = 0.0
    note: str = ""


def whole(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """As HF's causal models do it: logits, then fp32."""
    return F.cross_entropy(F.linear(hidden, weight).float(), target)


def native(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(hidden, weight, target, options=options)


def chunked(chunk_bytes: int) -> Loss:
    def loss(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return linear_cross_entropy(hidden, weight, target, chunk_bytes=chunk_bytes)

    return loss


VARIANTS: dict[str, Loss] = {
    "whole": whole,
    "chunked, 8 MiB": chunked(2**23),
    f"chunked, {CHUNK_BYTES >> 20} MiB (default)": chunked(CHUNK_BYTES),
    "F.linear_cross_entropy": native,
}
FORMATS = {
    "fp32": (torch.float32, False),
    "bf16": (torch.bfloat16, False),
    "fp32, bf16 autocast": (torch.float32, True),
}


@dataclass
class Bench:
    """Inputs in one format, and what fp64 says of them."""

    tokens: int
    formats: str

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        dtype, self.autocast = FORMATS[self.formats]
        self.hidden = torch.randn(self.tokens, WIDTH).to(dtype).requires_grad_()
        self.weight = (torch.randn(CLASSES, WIDTH) * 0.05).to(dtype).requires_grad_()
        self.target = torch.randint(0, CLASSES, (self.tokens,))
        self.exact = self.gradient_in_fp64()

    def gradient_in_fp64(self) -> Tensor:
        compute = torch.bfloat16 if self.autocast else self.hidden.dtype
        h, w = (t.detach().to(compute).double() for t in (self.hidden, self.weight))
        dz = torch.softmax(h @ w.T, 1)
        dz[torch.arange(self.tokens), self.target] -= 1
        return (dz / self.tokens).T @ h

    def step(self, loss: Loss) -> tuple[float, float]:
        """Run forward and backward; return the CPU time of each."""
        self.hidden.grad = self.weight.grad = None
        start = time.process_time()
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            value = loss(self.hidden, self.weight, self.target)
        middle = time.process_time()
        value.backward()
        return middle - start, time.process_time() - middle

    def measure(self, row: Row, loss: Loss) -> None:
        inputs = (self.hidden, self.weight, self.target)
        held = sum(t.nbytes for t in inputs)
        self.hidden.grad = self.weight.grad = None
        with MemoryLedger(device="cpu") as ledger:
            ledger.inputs(inputs)
            forward, backward = self.step(loss)
        gradient = self.weight.grad
        assert gradient is not None
        row.forward_times_s, row.backward_times_s = [round(forward, 3)], [round(backward, 3)]
        row.peak_bytes = ledger.record().total_peak_bytes - held
        row.beyond_gradients_bytes = row.peak_bytes - self.hidden.nbytes - self.weight.nbytes
        row.distance = float((gradient.double() - self.exact).norm() / self.exact.norm())


def rows_of(bench: Bench, rounds: int) -> list[Row]:
    rows: dict[str, Row] = {}
    for name, loss in VARIANTS.items():
        row = rows[name] = Row(name, bench.formats)
        if loss is native and (bench.autocast or not hasattr(F, "linear_cross_entropy")):
            row.note = "left out" if bench.autocast else "not in this torch"
            continue
        bench.measure(row, loss)
    timed = [name for name, row in rows.items() if VARIANTS[name] is not native]
    for name in timed:
        rows[name].forward_times_s, rows[name].backward_times_s = [], []  # the ledger slows them
    chance = random.Random(0)
    for _ in range(rounds):
        chance.shuffle(timed)
        for name in timed:
            forward, backward = bench.step(VARIANTS[name])
            rows[name].forward_times_s.append(round(forward, 3))
            rows[name].backward_times_s.append(round(backward, 3))
    for row in rows.values():
        if row.note:
            continue
        row.forward_s = statistics.median(row.forward_times_s)
        row.backward_s = statistics.median(row.backward_times_s)
    return list(rows.values())


def table(rows: list[Row]) -> str:
    heads = f"{'beyond gradients':>17}{'forward':>9}{'backward':>9}{'from fp64':>11}"
    lines = [f"{'formats':20} {'variant':25}{heads}"]
    for row in rows:
        if row.note:
            lines.append(f"{row.formats:20} {row.variant:25}  {row.note}")
            continue
        lines.append(
            f"{row.formats:20} {row.variant:25}{format_bytes(row.beyond_gradients_bytes):>17}"
            f"{row.forward_s:>8.2f}s{row.backward_s:>8.2f}s{row.distance:>11.1e}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=192)
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    rows = [
        row for formats in FORMATS for row in rows_of(Bench(asked.tokens, formats), asked.rounds)
    ]
    print(table(rows))
    write_results(
        "chunked-loss-cpu",
        to_json(rows),
        question="peak bytes and CPU time of a head's cross-entropy, whole and in chunks",
        head=[CLASSES, WIDTH],
        tokens=asked.tokens,
        rounds=asked.rounds,
        clock="process CPU time, one thread, median of rounds",
        measured_on="cpu",
    )


if __name__ == "__main__":
    main()
