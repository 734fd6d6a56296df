"""Options of CUDA's caching allocator as a value, and the text that torch reads them from.

The names in the text are torch's (``PYTORCH_ALLOC_CONF``, c10/core/AllocatorConfig.h); the defaults
are those of torch 2.11 to 2.15. Options that change no size (pinned memory, locks) are accepted and
have no effect here; another backend than ``native`` is another allocator and is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from narrowcast.errors import UnknownName, UsageError

__all__ = [
    "LARGE_SEGMENT_BYTES",
    "MIN_BLOCK_BYTES",
    "MIN_LARGE_ALLOC_BYTES",
    "SEGMENT_STEP_BYTES",
    "SMALL_BYTES",
    "SMALL_SEGMENT_BYTES",
    "AllocatorConfig",
]

# c10/core/AllocatorConfig.h: kMinBlockSize, kSmallSize, kSmallBuffer, kMinLargeAlloc, kRoundLarge,
# and the default of large_segment_size_ (kLargeBuffer up to torch 2.10).
MIN_BLOCK_BYTES = 512
SMALL_BYTES = 2**20
SMALL_SEGMENT_BYTES = 2 * 2**20
MIN_LARGE_ALLOC_BYTES = 10 * 2**20
SEGMENT_STEP_BYTES = 2 * 2**20
LARGE_SEGMENT_BYTES = 20 * 2**20

_Number = TypeVar("_Number", int, float)
_MIB = 2**20
# kRoundUpPowerOfTwoIntervals: one for each power of two from 1 MiB on; the last is open.
_INTERVALS = 16
_WITHOUT_EFFECT_HERE = (
    "release_lock_on_cudamalloc",
    "pinned_use_cuda_host_register",
    "pinned_use_background_threads",
    "pinned_num_register_threads",
    "pinned_max_round_threshold_mb",
    "pinned_max_cached_size_mb",
)
_KNOWN = (
    "backend",
    "expandable_segments",
    "garbage_collection_threshold",
    "large_segment_size_mb",
    "max_non_split_rounding_mb",
    "max_split_size_mb",
    "roundup_power2_divisions",
    *_WITHOUT_EFFECT_HERE,
)


@dataclass(frozen=True, kw_only=True)
class AllocatorConfig:
    """What the allocator is told, and how much memory there is for it to take."""

    device_bytes: int | None = None
    """What cudaMalloc can give in all; None: without end."""
    allowed_bytes: int | None = None
    """The cap of ``torch.cuda.set_per_process_memory_fraction``; None: not called."""
    max_split_bytes: int | None = None
    max_non_split_rounding_bytes: int = LARGE_SEGMENT_BYTES
    large_segment_bytes: int = LARGE_SEGMENT_BYTES
    roundup_power2_divisions: tuple[int, ...] = (0,) * _INTERVALS
    """Divisions for sizes up to 2 MiB, 4 MiB, ..., 32 GiB, and above; 0 or 1: none."""
    garbage_collection_threshold: float = 0.0
    """Share of `allowed_bytes` above which old cached segments are given back; 0: never."""
    expandable_segments: bool = False

    def __post_init__(self) -> None:
        for name in ("device_bytes", "allowed_bytes"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise UsageError(f"{name} is {value}", hint="a positive number of bytes, or None")
        if len(self.roundup_power2_divisions) != _INTERVALS or any(
            d and not _is_power_of_two(d) for d in self.roundup_power2_divisions
        ):
            raise UsageError(
                f"roundup_power2_divisions is {self.roundup_power2_divisions}",
                hint=f"{_INTERVALS} numbers, each 0 or a power of two",
            )
        if not 0.0 <= self.garbage_collection_threshold < 1.0:
            raise UsageError(
                f"garbage_collection_threshold is {self.garbage_collection_threshold}",
                hint="a share of the allowed memory, between 0 and 1",
            )

    @classmethod
    def parse(cls, text: str, **more: Any) -> AllocatorConfig:
        """Read the text of ``PYTORCH_ALLOC_CONF``; `more` are fields that it cannot express."""
        found: dict[str, Any] = {}
        for name, value in _options(text):
            match name:
                case "expandable_segments":
                    found[name] = _truth(name, value)
                case "garbage_collection_threshold":
                    found[name] = _number(name, value, float)
                case "roundup_power2_divisions":
                    found[name] = _divisions(value)
                case "max_split_size_mb" | "max_non_split_rounding_mb" | "large_segment_size_mb":
                    field = name.removesuffix("_mb").replace("_size", "") + "_bytes"
                    found[field] = _mebibytes(name, value)
                case "backend" if value != "native":
                    raise UsageError(
                        f"allocator backend {value!r} is not simulated",
                        hint="only torch's own (backend:native, the default)",
                    )
                case _ if name not in _KNOWN:
                    raise UnknownName.of("allocator option", name, _KNOWN)
        return cls(**found, **more)

    def divisions_at(self, size: int) -> int:
        """Return the divisions of the interval that a size lies in."""
        interval = size.bit_length() - 1 - 20
        return self.roundup_power2_divisions[min(max(interval, 0), _INTERVALS - 1)]


def _options(text: str) -> list[tuple[str, str]]:
    squeezed = re.sub(r"\s", "", text)
    option = r"([^:,\[\]]+):(\[[^\]]*\]|[^:,\[\]]+)"
    if squeezed and not re.fullmatch(f"{option}(,{option})*", squeezed):
        raise UsageError(
            f"{text!r} is not a list of allocator options",
            hint="name:value,name:[value,value], as in expandable_segments:True",
        )
    return [(name, value) for name, value in re.findall(option, squeezed)]


def _divisions(value: str) -> tuple[int, ...]:
    """Fill the intervals as ``parseRoundUpPower2Divisions`` does, first and last entry included.

    The first entry also covers everything below it, ``>`` covers its predecessor's interval too.
    """
    name = "roundup_power2_divisions"
    if not value.startswith("["):
        return (_number(name, value, int),) * _INTERVALS
    divisions, last, first = [0] * _INTERVALS, 0, True
    for entry in value.strip("[]").split(","):
        bound, _, text = entry.partition(":")
        count = _number(name, text, int)
        if bound == ">":
            divisions[last:] = [count] * (_INTERVALS - last)
            continue
        size = _number(name, bound, int)
        if not _is_power_of_two(size):
            raise UsageError(f"{name} has {bound!r} MiB", hint="powers of two, such as 256:1")
        last = min(size.bit_length() - 1, _INTERVALS - 1)
        if first:
            divisions[:last] = [count] * last
            first = False
        divisions[last] = count
    return tuple(divisions)


def _mebibytes(name: str, value: str) -> int:
    size = _number(name, value, int) * _MIB
    # Torch refuses smaller ones too: a large segment is above kMinLargeAlloc, the limits at it.
    segment = name == "large_segment_size_mb"
    least = MIN_LARGE_ALLOC_BYTES + _MIB if segment else LARGE_SEGMENT_BYTES
    if size < least:
        raise UsageError(f"{name} is {value}", hint=f"{least // _MIB} or more")
    return size


def _number(name: str, value: str, kind: Callable[[str], _Number]) -> _Number:
    try:
        return kind(value)
    except ValueError:
        raise UsageError(f"{name} is {value!r}", hint="a number") from None


def _truth(name: str, value: str) -> bool:
    if value not in ("True", "False"):
        raise UsageError(f"{name} is {value!r}", hint="True or False")
    return value == "True"


def _is_power_of_two(value: int) -> bool:
    return value > 0 and value & (value - 1) == 0
