"""What a step of AdamW costs: bytes held, temporaries, and time, against torch and the peers.

    python benchmarks/optimizer_step.py [--device cuda] [--sizes gpt2,small] [--rounds 7]

Each optimizer gets its own parameters with the same gradients, and steps in rounds of a random
order. Bytes held are those of distinct storages of parameters and states after the first step,
without gradients. Temporaries are the most bytes that one step has alive beside what it found: on
CUDA the allocator's peak, on a CPU that of all storages that torch operations make (what a C++
kernel allocates inside is not seen). Time is the median over rounds; on a CPU process time with one
thread, on CUDA wall time up to a synchronisation.

Writes benchmarks/results/optimizer-step-<device>.json.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import os
import random
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from provenance import write_results
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from narrowcast.kernels.launch import HAS_TRITON
from narrowcast.memory.storages import StorageBook, storages_of, tensors_in
from narrowcast.optim.adamw import AdamW
from narrowcast.records.codec import to_json


def gpt2(layers: int, width: int) -> list[tuple[int, ...]]:
    """List the shapes of GPT-2's parameters."""
    block = [(width,), (width,), (3 * width, width), (3 * width,), (width, width), (width,)]
    block += [(width,), (width,), (4 * width, width), (4 * width,), (width, 4 * width), (width,)]
    return [(50257, width), (1024, width), *block * layers, (width,), (width,)]


SIZES: dict[str, list[tuple[int, ...]]] = {
    "small": [(256,)] * 500,
    "gpt2-10M": [(1000, 256), *gpt2(12, 256)[1:]],
    "gpt2-124M": gpt2(12, 768),
    "gpt2-774M": gpt2(36, 1280),
}

Make = Callable[[list[nn.Parameter]], Any]


class AbsentError(Exception):
    """This optimizer cannot run here; the message says why."""


def ours(weights: str, states: str) -> Make:
    return lambda owned: AdamW(owned, weights=weights, states=states)


def torchs(**options: Any) -> Make:
    return lambda owned: torch.optim.AdamW(owned, **options)


def torchao(name: str, **options: Any) -> Make:
    def make(owned: list[nn.Parameter]) -> Any:
        try:
            import torchao.optim as peer
        except ImportError:
            raise AbsentError("torchao is not installed") from None
        return getattr(peer, name)(owned, **options)

    return make


def bitsandbytes(owned: list[nn.Parameter]) -> Any:
    try:
        import bitsandbytes as peer
    except ImportError:
        raise AbsentError("bitsandbytes is not installed") from None
    return peer.optim.AdamW8bit(owned)


def optimi(owned: list[nn.Parameter]) -> Any:
    try:
        from optimi import AdamW as Peer
    except ImportError:
        raise AbsentError("torch-optimi is not installed") from None
    return Peer(owned, lr=1e-3)


def flashoptim(owned: list[nn.Parameter]) -> Any:
    if not owned[0].is_cuda:
        raise AbsentError("flashoptim quantises on CUDA only")
    try:
        from flashoptim import FlashAdamW
    except ImportError:
        raise AbsentError("flashoptim is not installed") from None
    return FlashAdamW(owned, lr=1e-3)


# Name, dtype of the parameters given, and how the optimizer is made.
OPTIMIZERS: list[tuple[str, torch.dtype, Make]] = [
    ("torch single", torch.float32, torchs(foreach=False, fused=False)),
    ("torch foreach", torch.float32, torchs(foreach=True)),
    ("torch fused", torch.float32, torchs(fused=True)),
    ("torch fused, bf16 throughout", torch.bfloat16, torchs(fused=True)),
    *(
        (f"narrowcast {weights}+{states}", torch.float32, ours(weights, states))
        for weights, states in (
            ("fp32", "fp32"),
            ("split16", "fp32"),
            ("split16", "int8"),
            ("split8", "int8"),
            ("split8", "int4"),
            ("stochastic", "int4"),
        )
    ),
    ("torchao 8-bit", torch.float32, torchao("AdamW8bit")),
    ("torchao 4-bit", torch.float32, torchao("AdamW4bit")),
    (
        "torchao 8-bit, bf16 stochastic",
        torch.bfloat16,
        torchao("AdamW8bit", bf16_stochastic_round=True),
    ),
    ("bitsandbytes 8-bit", torch.float32, bitsandbytes),
    ("optimi Kahan", torch.bfloat16, optimi),
    ("flashoptim", torch.bfloat16, flashoptim),
]


class Peak(TorchDispatchMode):
    """Notes the most bytes alive among storages that torch operations made."""

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.book = StorageBook(torch.device("cpu"))
        for tensor in known:
            self.book.made(tensor, "")
        self.before = self.most = self.book.total

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tensors_in(out):
            self.book.made(tensor, "")
        self.most = max(self.most, self.book.total)
        return out


@dataclass
class Row:
    """One optimizer on one model."""

    model: str
    optimizer: str
    parameters: int
    note: str = ""
    bytes_per_parameter: float | None = None
    temporary_bytes: int | None = None
    median_ms: float | None = None
    quartiles_ms: tuple[float, float] | None = None
    over_fused: float | None = None
    """Time over torch's fused AdamW in fp32."""
    times_ms: list[float] = field(default_factory=list)


def held_tensors(owned: list[nn.Parameter], optimizer: Any) -> list[Tensor]:
    return [*owned, *tensors_in(list(optimizer.state.values()))]


def bytes_held(owned: list[nn.Parameter], optimizer: Any) -> int:
    found = {
        s.data_ptr(): s.nbytes() for t in held_tensors(owned, optimizer) for s in storages_of(t)
    }
    return sum(found.values())


def temporaries(owned: list[nn.Parameter], optimizer: Any) -> int:
    if owned[0].is_cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        optimizer.step()
        torch.cuda.synchronize()
        return int(torch.cuda.max_memory_allocated() - before)
    gradients = [p.grad for p in owned if p.grad is not None]
    with Peak([*held_tensors(owned, optimizer), *gradients]) as peak:
        optimizer.step()
    return int(peak.most - peak.before)


def timed(step: Callable[[], object], device: torch.device) -> float:
    """Return milliseconds of one step."""
    if device.type == "cpu":
        start = time.process_time()
        step()
        return (time.process_time() - start) * 1e3
    torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e3


def build(name: str, dtype: torch.dtype, make: Make, device: torch.device) -> tuple[Any, ...]:
    """Return parameters with gradients, and the optimizer, after its first step."""
    generator = torch.Generator().manual_seed(0)
    owned = [
        nn.Parameter((torch.randn(s, generator=generator) * 0.02).to(device, dtype))
        for s in SIZES[name]
    ]
    optimizer = make(owned)
    for p in owned:
        p.grad = (torch.randn(p.shape, generator=generator) * 1e-3).to(device, p.dtype)
    optimizer.step()
    return owned, optimizer


def measure(name: str, device: torch.device, rounds: int) -> list[Row]:
    """Measure every optimizer on one model; all of them are held at once."""
    count = sum(torch.Size(s).numel() for s in SIZES[name])
    rows, steps = [], {}
    for label, dtype, make in OPTIMIZERS:
        row = Row(name, label, count)
        rows.append(row)
        try:
            with warnings.catch_warnings(action="ignore"):
                owned, optimizer = build(name, dtype, make, device)
        except AbsentError as reason:
            row.note = str(reason)
            continue
        except Exception as error:
            row.note = f"{type(error).__name__}: {error}"[:120].replace("\n", " ")
            continue
        print(f"{name}: {label}", flush=True)
        row.bytes_per_parameter = round(bytes_held(owned, optimizer) / count, 4)
        if device.type == "cpu" and label.startswith("torchao"):
            row.note = "temporaries not watched: the step is compiled"
        else:
            row.temporary_bytes = temporaries(owned, optimizer)
        steps[label] = optimizer.step
    chance, order = random.Random(0), list(steps)
    for label in order:
        steps[label]()
    for _ in range(rounds):
        chance.shuffle(order)
        for label in order:
            row = next(r for r in rows if r.optimizer == label)
            row.times_ms.append(round(timed(steps[label], device), 3))
    for row in rows:
        if len(row.times_ms) > 1:
            low, row.median_ms, high = statistics.quantiles(row.times_ms, n=4)
            row.quartiles_ms = (round(low, 3), round(high, 3))
    fused = next((r.median_ms for r in rows if r.optimizer == "torch fused"), None)
    for row in rows:
        if fused and row.median_ms:
            row.over_fused = round(row.median_ms / fused, 3)
    return rows


def table(rows: list[Row]) -> str:
    head = (
        f"{'model':11}{'optimizer':32}{'B/param':>9}{'temporaries':>13}{'ms/step':>10}{'/fused':>8}"
    )
    lines = [head]
    for r in rows:
        held = "-" if r.bytes_per_parameter is None else f"{r.bytes_per_parameter:.3f}"
        spare = "-" if r.temporary_bytes is None else f"{r.temporary_bytes / 2**20:.2f} MiB"
        ms = "-" if r.median_ms is None else f"{r.median_ms:.2f}"
        ratio = "-" if r.over_fused is None else f"{r.over_fused:.2f}"
        lines.append(
            f"{r.model:11}{r.optimizer:32}{held:>9}{spare:>13}{ms:>10}{ratio:>8}  {r.note}"
        )
    return "\n".join(lines)


def versions() -> dict[str, str]:
    found = {}
    for name in ("torch", "triton", "torchao", "bitsandbytes", "torch-optimi", "flashoptim"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--sizes", help=f"of {', '.join(SIZES)}; default: what fits the device")
    parser.add_argument("--rounds", type=int, default=7)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device(asked.device)
    usual = "small,gpt2-10M" if asked.device == "cpu" else "small,gpt2-124M,gpt2-774M"
    rows = []
    for name in (asked.sizes or usual).split(","):
        rows += measure(name, device, asked.rounds)
        gc.collect()
    print(table(rows))
    write_results(
        f"optimizer-step-{asked.device}",
        to_json(rows),
        question="bytes held, temporaries and time of a step of AdamW",
        measured_on=asked.device,
        clock="process CPU time, one thread" if asked.device == "cpu" else "wall, synchronised",
        kernels="Triton" if asked.device == "cuda" and HAS_TRITON else "torch operations",
        rounds=asked.rounds,
        versions=versions(),
    )


if __name__ == "__main__":
    main()
