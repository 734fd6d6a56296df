"""One optimizer step beside torch's fused AdamW and beside what the memory's bandwidth allows.

The limit is arithmetic: bytes that a step has to read and write, each once, over the bandwidth that
a large copy reaches on this GPU in this run. All optimizers of one model step in rounds of a random
order. The least of a row's bytes: weights, remainders and states read and written, gradients read.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from optimizer_step import (
    SIZES,
    AbsentError,
    bitsandbytes,
    bytes_held,
    flashoptim,
    ours,
    temporaries,
    torchao,
    torchs,
)
from torch import nn

from gpu_parts.clock import ratios, spread
from gpu_parts.device import empty, synchronize
from gpu_parts.sheet import Ask, Sheet, is_fatal

__all__ = ["run"]

FUSED = "torch fused fp32"
_NARROW = (
    ("split16", "int8"),
    ("split8", "int4"),
    ("split16", "fp32"),
    ("stochastic", "int4"),
    ("fp32", "int8"),
)
# Name, dtype of the parameters given, and how the optimizer is made; the first is compared with.
OPTIMIZERS: list[tuple[str, torch.dtype, Callable[[list[nn.Parameter]], Any]]] = [
    (FUSED, torch.float32, torchs(fused=True)),
    *((f"narrowcast {w}+{s}", torch.float32, ours(w, s)) for w, s in _NARROW),
    ("torch fused, bf16 throughout", torch.bfloat16, torchs(fused=True)),
    ("torchao 8-bit", torch.float32, torchao("AdamW8bit")),
    ("bitsandbytes 8-bit", torch.float32, bitsandbytes),
    ("flashoptim", torch.bfloat16, flashoptim),
]
MODELS = ("gpt2-124M", "small", "gpt2-774M")
_ROUNDS, _LEAST_ROUNDS = 30, 5
_COPY_BYTES = 2**31


@dataclass(frozen=True, kw_only=True)
class Runner:
    """An optimizer with its parameters, ready to step."""

    step: Callable[[], object]
    held_bytes: int
    gradient_bytes: int

    @property
    def least_bytes(self) -> int:
        """What a step has to move."""
        return 2 * self.held_bytes + self.gradient_bytes


def run(ask: Ask) -> None:
    sheet = Sheet("optimizer", ask, baseline=FUSED, question="one step of AdamW: ms and bytes")
    bandwidth = copy_bandwidth(ask.device)
    empty(ask.device)
    sheet.write(copy_bytes_per_s=bandwidth)
    names = ("tiny",) if ask.rehearse else MODELS
    for number, name in enumerate(names):
        measure(name, ask, sheet, bandwidth, share=1 / (len(names) - number))


def copy_bandwidth(device: torch.device) -> float:
    """Return bytes read and written a second by a copy far larger than the cache; the best of ten.

    The best, since it stands for what the memory can do.
    """
    size = _COPY_BYTES if device.type == "cuda" else 2**20
    source = torch.randint(256, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    best = min(milliseconds(partial(target.copy_, source), device) for _ in range(10))
    return 2 * size / best * 1e3


def measure(name: str, ask: Ask, sheet: Sheet, bandwidth: float, *, share: float) -> None:
    clock = ask.clock.share(share)
    if "ms" in (sheet.find(model=name, optimizer=FUSED) or {}):
        return  # measured before the process died
    runners: dict[str, Runner] = {}
    for label, dtype, make in OPTIMIZERS:
        if "not_run" in (sheet.find(model=name, optimizer=label) or {}):
            continue
        with sheet.trying(model=name, optimizer=label) as found:
            try:
                runner = built(name, dtype, make, ask.device)
            except AbsentError as reason:
                found["not_run"] = str(reason)
                continue
            runners[label] = runner[0]
            found |= runner[1]
            found["limit_ms"] = runner[0].least_bytes / bandwidth * 1e3
    taken: dict[str, list[float]] = {label: [] for label in runners}
    chance, order = random.Random(0), list(runners)
    for done in range(2 if ask.rehearse else _ROUNDS):
        if done >= _LEAST_ROUNDS and clock.is_over():
            break
        chance.shuffle(order)
        for label in list(order):
            try:
                taken[label].append(milliseconds(runners[label].step, ask.device))
            except Exception as error:
                if is_fatal(error):
                    raise
                order.remove(label)
    for label, times in taken.items():
        _note(sheet, name, label, times, taken.get(FUSED, []))
    runners.clear()
    empty(ask.device)


def built(
    name: str, dtype: torch.dtype, make: Callable[[list[nn.Parameter]], Any], device: torch.device
) -> tuple[Runner, dict[str, Any]]:
    """Return an optimizer on random parameters and gradients after three steps, and its bytes."""
    shapes = [(300,), (40, 50)] if name == "tiny" else SIZES[name]
    owned = [nn.Parameter(torch.randn(s, device=device).mul_(0.02).to(dtype)) for s in shapes]
    optimizer = make(owned)
    gradients = 0
    for parameter in owned:
        parameter.grad = torch.randn_like(parameter).mul_(1e-3)
        gradients += parameter.grad.nbytes
    for _ in range(3):
        optimizer.step()
    held = bytes_held(owned, optimizer)
    count = sum(p.numel() for p in owned)
    runner = Runner(step=optimizer.step, held_bytes=held, gradient_bytes=gradients)
    about = {
        "parameters": count,
        "tensors": len(owned),
        "bytes_per_parameter": held / count,
        "moved_bytes_per_parameter": runner.least_bytes / count,
        "temporary_bytes": temporaries(owned, optimizer),
    }
    return runner, about


def milliseconds(step: Callable[[], object], device: torch.device) -> float:
    """Return milliseconds between two events around a step, launches of its kernels included."""
    if device.type == "cpu":
        began = time.perf_counter()
        step()
        return (time.perf_counter() - began) * 1e3
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    synchronize(device)
    start.record()
    step()
    end.record()
    synchronize(device)
    return float(start.elapsed_time(end))


def _note(sheet: Sheet, name: str, label: str, times: list[float], fused: list[float]) -> None:
    row = sheet.find(model=name, optimizer=label)
    if row is None or not times:
        return
    row["times_ms"] = times
    row["ms"] = spread(times)
    row["over_limit"] = row["ms"]["median"] / row["limit_ms"]
    if len(fused) == len(times):
        row["over_fused"] = ratios(times, fused)
    sheet.write()
