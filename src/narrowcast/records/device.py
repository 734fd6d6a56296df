"""What a machine can do in each precision, as ``narrowcast doctor`` measures it in seconds."""

from __future__ import annotations

from dataclasses import dataclass

from narrowcast.records.run import Environment

__all__ = ["DeviceRecord", "FormatSpeed"]


@dataclass(frozen=True, kw_only=True)
class FormatSpeed:
    """One float format on one device: whether it computes in it, how, and how fast."""

    format: str
    supported: bool
    native: bool
    """Whether the hardware has instructions for it; without them torch converts or emulates."""
    matmul_gflops: float | None = None
    """Measured on a square matrix product, on a CPU with one thread; None if not supported."""
    matmul_relative: float | None = None
    """Speed relative to fp32: 2.0 means half the time."""
    conv_relative: float | None = None
    """The same for one training step of a 3x3 convolution: forward and both gradients."""
    why: str
    """What the two verdicts above rest on."""


@dataclass(frozen=True, kw_only=True)
class DeviceRecord:
    """A device, its formats, and the precision recommended for it."""

    schema: int = 1
    device: str
    name: str
    memory_bytes: int
    threads: int
    formats: tuple[FormatSpeed, ...]
    recommended: str
    """Name of a precision, as ``--precision`` takes it."""
    why: str
    cautions: tuple[str, ...] = ()
    """What this machine does badly, in whole sentences with the measured figures."""
    seconds: float
    """How long the measurement took."""
    environment: Environment
