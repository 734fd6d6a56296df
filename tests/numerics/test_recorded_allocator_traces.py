"""What CUDA's allocator did in recorded trainings, reproduced by its simulator without a GPU."""

from __future__ import annotations

import json
from typing import Any

import pytest

from recorded_traces import RECORDS, import_benchmarks, replayed

import_benchmarks()
from gpu_parts.traces import compact  # noqa: E402 -- the path is set above

MIB = 2**20


def recorded() -> list[dict[str, Any]]:
    if not RECORDS.exists():
        return []
    return [row for row in json.loads(RECORDS.read_text())["rows"] if row.get("events")]


def traced(action: str, addr: int, size: int, stream: int = 0) -> dict[str, Any]:
    """Return an entry as ``torch.cuda.memory._snapshot()["device_traces"][0]`` has it."""
    return {"action": action, "addr": addr, "size": size, "stream": stream, "time_us": 0}


# Rules of CUDACachingAllocator.cpp: 2 MiB for a small block, 20 MiB for one below 10 MiB, and a
# freed block is used again, though at another size it is another allocation.
TRACE = [
    traced("segment_alloc", 0x1000000, 2 * MIB),
    traced("alloc", 0x1000000, 1000),
    traced("segment_alloc", 0x2000000, 20 * MIB),
    traced("alloc", 0x2000000, 5 * MIB),
    traced("free_requested", 0x1000000, 1000),
    traced("free_completed", 0x1000000, 1000),
    traced("alloc", 0x1000000, 600),
    traced("segment_alloc", 0x4000000, 18 * MIB),
    traced("alloc", 0x4000000, 16 * MIB + 1),
    traced("free_requested", 0x2000000, 5 * MIB),
    traced("free_completed", 0x2000000, 5 * MIB),
]


def test_a_trace_becomes_sizes_and_order() -> None:
    """An address stands for the allocation that took it last; requests to free do not count."""
    found = compact(TRACE)

    assert found["events"] == [1000, 5 * MIB, -1, 600, 16 * MIB + 1, -2]
    assert found["segments"] == [[0, 2 * MIB], [1, 20 * MIB], [4, 18 * MIB]]


def test_a_replay_takes_the_segments_of_the_trace() -> None:
    """Sizes and moments; and a trace with a segment of another size is told from it."""
    found = compact(TRACE)
    segments, peaks = replayed(found["events"])

    assert segments == found["segments"]
    assert segments != [[0, 2 * MIB], [1, 20 * MIB], [4, 16 * MIB]]
    assert peaks.reserved_bytes == 40 * MIB


def test_segments_that_are_given_back_are_negative() -> None:
    """A replay never gives any back, so that such a trace does not pass for reproduced."""
    given = [*TRACE, traced("segment_free", 0x2000000, 20 * MIB)]

    assert compact(given)["segments"][-1] == [6, -20 * MIB]


def test_what_a_compact_trace_cannot_hold_is_an_error() -> None:
    """A second stream, and memory from before the recording."""
    with pytest.raises(ValueError, match="2 streams"):
        compact([*TRACE, traced("alloc", 0x5000000, 100, stream=7)])
    with pytest.raises(ValueError, match="before the recording"):
        compact([traced("free_completed", 0x1000000, 100)])


@pytest.mark.skipif(not recorded(), reason="no trace was recorded on a GPU yet (make gpu)")
@pytest.mark.parametrize("row", recorded(), ids=lambda r: f"{r['workload']}, {r['arm']}")
def test_the_simulator_reproduces_what_cuda_did(row: dict[str, Any]) -> None:
    """Every segment, its size and its moment; requested, allocated and reserved at their peaks."""
    segments, peaks = replayed(row["events"])

    assert segments == row["segments"]
    assert peaks.requested_bytes == row["peak"]["requested_bytes"]
    assert peaks.allocated_bytes == row["peak"]["allocated_bytes"]
    assert peaks.reserved_bytes == row["peak"]["reserved_bytes"]
