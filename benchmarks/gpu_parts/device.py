"""The GPU as the parts use it: waiting, an empty device, its allocator's counters, what it is.

On a CPU, where everything is rehearsed, there is nothing to wait for and nothing is counted.
"""

from __future__ import annotations

import gc
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from narrowcast.planning.place import place_named

__all__ = ["Peaks", "empty", "gpu_at_hand", "machine", "synchronize"]

_COUNTERS = ("requested", "allocated", "reserved")
_PACKAGES = (
    "bitsandbytes",
    "flashoptim",
    "numpy",
    "torch",
    "torch-optimi",
    "torchao",
    "triton",
)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def empty(device: torch.device) -> None:
    """Leave nothing cached, workspaces of cuBLAS included."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()


class Peaks:
    """Peaks of the allocator's counters: two of them since `steady`, reserved since the start."""

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self.already_reserved = 0
        self._reserved = 0
        empty(device)
        if self._is_cuda:
            torch.cuda.reset_peak_memory_stats()
            self.already_reserved = torch.cuda.memory_reserved()

    def steady(self) -> None:
        """Count requested and allocated from here on."""
        if self._is_cuda:
            torch.cuda.synchronize()
            self._reserved = torch.cuda.max_memory_reserved()
            torch.cuda.reset_peak_memory_stats()

    def read(self) -> dict[str, int]:
        """Return the peaks in bytes; {} where nothing is counted."""
        if not self._is_cuda:
            return {}
        torch.cuda.synchronize()
        stats = torch.cuda.memory_stats()
        found = {f"{name}_bytes": int(stats[f"{name}_bytes.all.peak"]) for name in _COUNTERS}
        found["reserved_bytes"] = max(found["reserved_bytes"], self._reserved)
        return found | {"reserved_before_bytes": self.already_reserved}


def machine(device: torch.device) -> dict[str, Any]:
    """Describe what a figure depends on beyond the environment of a record."""
    packages = {}
    for name in _PACKAGES:
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = "absent"
    found: dict[str, Any] = {"packages": packages, "python": platform.python_version()}
    if device.type != "cuda":
        return found
    properties = torch.cuda.get_device_properties(device)
    return found | {
        "gpu": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }


def gpu_at_hand() -> str:
    """Return the name under which peaks of this GPU are predicted; a rehearsal takes an H200's.

    Raises UsageError for a GPU whose peaks cannot be predicted.
    """
    return place_named("cuda").target if torch.cuda.is_available() else "h200"
