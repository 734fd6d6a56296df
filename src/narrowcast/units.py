"""Bytes, durations and ratios as people read and write them; one meaning of GiB."""

from __future__ import annotations

import re

from narrowcast.errors import UsageError

__all__ = ["format_bytes", "format_duration", "format_percent", "parse_bytes"]

_BINARY = ("B", "KiB", "MiB", "GiB", "TiB")
_FACTORS = {
    **{name: 1024**i for i, name in enumerate(_BINARY)},
    **{name: 1000**i for i, name in enumerate(("B", "kB", "MB", "GB", "TB"))},
}
_BY_LOWER = {name.lower(): factor for name, factor in _FACTORS.items()}
_SIZE = re.compile(r"\s*([0-9]*\.?[0-9]+)\s*([A-Za-z]*)\s*\Z")


def format_bytes(size: float) -> str:
    """Write a byte count in binary units: 1536 -> '1.5 KiB', 11 -> '11 B'."""
    value, power = float(size), 0
    while abs(value) >= 1024 and power < len(_BINARY) - 1:
        value, power = value / 1024, power + 1
    if power == 0:
        return f"{int(size)} B"
    return f"{value:.{_decimals(value)}f} {_BINARY[power]}"


def _decimals(value: float) -> int:
    return 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2


def parse_bytes(text: str) -> int:
    """Read '2GiB', '150 MiB', '80GB' or a plain number of bytes.

    Raises UsageError for anything else: a budget in nonsense units is never guessed.
    """
    match = _SIZE.match(text)
    factor = _BY_LOWER.get(match[2].lower() or "b") if match else None
    # A part of a byte is a forgotten unit.
    if match is None or factor is None or (factor == 1 and not match[1].isdecimal()):
        raise UsageError(
            f"{text!r} is not an amount of memory",
            hint=f"write a number and a unit, such as 2GiB or 150MiB ({', '.join(_FACTORS)})",
        )
    return int(float(match[1]) * factor)


def format_duration(seconds: float) -> str:
    """Write a duration with three significant digits or as m:ss: '41.3 us', '12.0 s', '3:05'."""
    if seconds >= 3600:
        return f"{int(seconds // 3600)}:{int(seconds % 3600 // 60):02d}:{int(seconds % 60):02d}"
    if seconds >= 60:
        return f"{int(seconds // 60)}:{int(seconds % 60):02d}"
    for unit, factor in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= factor:
            return f"{seconds / factor:.3g} {unit}"
    return f"{seconds / 1e-9:.3g} ns"


def format_percent(ratio: float) -> str:
    """Write a ratio as a signed percentage of change: 0.58 -> '-42.0%'."""
    return f"{(ratio - 1) * 100:+.1f}%"
