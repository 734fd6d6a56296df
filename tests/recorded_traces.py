"""Recorded traces of CUDA's allocator, replayed through its simulator."""

from __future__ import annotations

import sys
from pathlib import Path

from narrowcast.prediction.allocator import AllocatorPeaks, CachingAllocator

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
RECORDS = BENCHMARKS / "results" / "gpu-traces.json"


def import_benchmarks() -> None:
    """Let the scripts' own modules be imported as they import each other."""
    if str(BENCHMARKS) not in sys.path:
        sys.path.append(str(BENCHMARKS))


def replayed(events: list[int]) -> tuple[list[list[int]], AllocatorPeaks]:
    """Return the segments that a compact trace makes, and the peaks on the way."""
    allocator, blocks, segments = CachingAllocator(), [], []
    reserved = 0
    for place, event in enumerate(events):
        if event > 0:
            blocks.append(allocator.malloc(event))
        else:
            allocator.free(blocks[-event - 1])
        grown = allocator.now.reserved_bytes - reserved
        if grown:
            segments.append([place, grown])
            reserved += grown
    return segments, allocator.peaks
