"""What CUDA's allocator really did in two training steps, small enough to be kept in a repository.

torch records every allocation and every segment that it takes from the device. Kept are sizes and
order alone, which is all that the simulator has to reproduce (``tests/numerics``):

    events    n > 0: n bytes are allocated; -k: the k-th allocation, counted from 1, is freed
    segments  [after how many events, bytes]: taken from the device, or given back if negative
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from gpu_parts.arms import Arm, hand, ours
from gpu_parts.device import Peaks, empty
from gpu_parts.sheet import Ask, Sheet
from gpu_parts.training import subject_of, workload_recipe
from narrowcast.precision.cast import numeric_settings

__all__ = ["CASES", "compact", "recorded", "run"]

CASES: tuple[tuple[str, Arm], ...] = (
    ("gpt2-124m", hand("bf16")),
    ("gpt2-124m", ours("lean")),
    ("resnet50", hand("bf16")),
    ("vit-b16", ours("bf16-split")),
)
_STEPS = 2


def run(ask: Ask) -> None:
    sheet = Sheet("traces", ask, question="the segments that the allocator took, and what for")
    for name, arm in CASES:
        with sheet.trying(workload=name, arm=arm.name) as found:
            if ask.clock.is_over():
                found["not_run"] = "out of time"
                continue
            found |= recorded(name, arm, ask, tiny=ask.rehearse)


def recorded(name: str, arm: Arm, ask: Ask, *, tiny: bool) -> dict[str, Any]:
    """Train two steps from an empty device and return the compact trace."""
    subject = subject_of(workload_recipe(name, tiny=tiny), ask.device)
    is_cuda = ask.device.type == "cuda"
    with numeric_settings(arm.policy):
        peaks = Peaks(ask.device)
        if is_cuda:
            torch.cuda.memory._record_memory_history(context=None, stacks="python")
        try:
            step = arm.build(subject)
            for _ in range(_STEPS):
                step()
            found = peaks.read()
            entries = torch.cuda.memory._snapshot()["device_traces"][0] if is_cuda else ()
        finally:
            if is_cuda:
                torch.cuda.memory._record_memory_history(enabled=None)
    if found.get("reserved_before_bytes"):
        raise RuntimeError("the device was not empty when the recording began")
    del step
    empty(ask.device)
    return {"peak": found, **compact(entries)}


def compact(entries: Iterable[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Return a trace of torch as events and segments; raises ValueError for what it cannot hold.

    A block that was freed by the host and not yet by its stream stays: only ``free_completed`` says
    that it can be used again. What was allocated before the recording began is not in it.
    """
    events: list[int] = []
    segments: list[list[int]] = []
    numbers: dict[int, int] = {}
    streams: set[int] = set()
    count = 0
    for entry in entries:
        action = entry["action"]
        if action == "alloc":
            count += 1
            streams.add(entry["stream"])
            numbers[entry["addr"]] = count
            events.append(entry["size"])
        elif action == "free_completed":
            if entry["addr"] not in numbers:
                raise ValueError("something is freed that was allocated before the recording")
            events.append(-numbers.pop(entry["addr"]))
        elif action == "segment_alloc":
            segments.append([len(events), entry["size"]])
        elif action == "segment_free":
            segments.append([len(events), -entry["size"]])
    if len(streams) > 1:
        raise ValueError(
            f"{len(streams)} streams allocate, and a compact trace has no place for it"
        )
    return {"events": events, "segments": segments}
