"""Where a plan or a prediction is for: a device at hand, or one that is only named."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from narrowcast.errors import UnknownName, UsageError
from narrowcast.precision.device import device_at_hand
from narrowcast.prediction.gpus import GPUS, Gpu, gpu_known_as

__all__ = ["Place", "place_named"]


@dataclass(frozen=True, kw_only=True)
class Place:
    """A device to plan for: at hand, so that steps can be timed on it, or not."""

    target: str
    """By which name its peak is predicted: ``cpu``, or one of ``prediction.gpus``."""
    device: torch.device | None
    """Where steps can be timed; None where the device is not there."""

    @property
    def name(self) -> str:
        return self.target if self.device is None else str(self.device)

    @property
    def usable_bytes(self) -> int | None:
        """What a training can have of a GPU's memory; None for a CPU."""
        gpu = gpu_known_as(self.target)
        return None if gpu is None else gpu.usable_bytes


def place_named(name: str | None) -> Place:
    """Return the device of this name: cpu, cuda, a GPU by its model, or the best one at hand.

    Capitals and spaces do not matter. Raises UnknownName with the nearest match, UsageError for a
    CUDA device that is absent or whose kernels and sizes we do not know.
    """
    known = name.lower() if name is not None else None
    gpu = None if known is None else gpu_known_as(known)
    if gpu is not None:
        return Place(target=gpu.name, device=None)
    if known is not None and known.partition(":")[0] not in ("cpu", "cuda"):
        raise UnknownName.of("device", str(name), ("cpu", "cuda", *GPUS))
    device = device_at_hand(known)
    if device.type == "cpu":
        return Place(target="cpu", device=device)
    return Place(target=_model_of(device).name, device=device)


def _model_of(device: torch.device) -> Gpu:
    """Recognise a GPU by what decides its kernels and sizes: capability, processors, memory."""
    found = torch.cuda.get_device_properties(device)
    alike = [
        gpu
        for gpu in GPUS.values()
        if gpu.sm == 10 * found.major + found.minor
        and gpu.multiprocessors == found.multi_processor_count
    ]
    if not alike:
        raise UsageError(
            f"{found.name} (compute capability {found.major}.{found.minor}, "
            f"{found.multi_processor_count} multiprocessors) is none of the GPUs whose peaks can "
            "be predicted",
            hint=f"plan for the nearest one by name: --device {', '.join(GPUS)}",
        )
    return min(alike, key=lambda gpu: abs(gpu.memory_bytes - found.total_memory))
