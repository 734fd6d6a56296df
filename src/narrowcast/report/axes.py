"""Where an axis begins and ends, and the round numbers on it.

Plotly could choose ticks itself, but not in KiB and MiB, and the terminal draws the same axes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from narrowcast.report.shapes import LinePanel, StripPanel, Unit
from narrowcast.units import format_bytes, format_duration

__all__ = ["Axis", "axis_over", "bounds", "line_axis", "strip_axis", "x_axis"]

_TICKS = 5
"""About as many as fit beside each other on a phone."""
_LOG_FROM: dict[Unit, float] = {"number": 100.0, "seconds": 6.0}
"""From which ratio on an axis is logarithmic: a diverging loss, one slow step among thousands."""


@dataclass(frozen=True, kw_only=True)
class Axis:
    """A range in plotly's terms (exponents of ten if logarithmic) and the named ticks in it."""

    kind: Literal["linear", "log"]
    range: tuple[float, float]
    ticks: tuple[float, ...]
    names: tuple[str, ...]


def bounds(values: Sequence[float]) -> tuple[float, float]:
    """Return the smallest and the largest finite value; (0, 1) if there is none."""
    finite = [value for value in values if math.isfinite(value)]
    return (min(finite), max(finite)) if finite else (0.0, 1.0)


def axis_over(
    values: Sequence[float], unit: Unit, *, from_zero: bool = False, log: bool = True
) -> Axis:
    """Choose an axis that holds all values, with air around them.

    Bytes begin at zero, because areas and bars do. Loss scales and, with `log`, positive values
    that would flatten all others get a logarithmic axis.
    """
    low, high = bounds(values)
    if unit == "power":
        return _exponents(low, high)
    if unit == "scale" and low > 0:
        return _powers_of_two(low, high)
    if log and low > 0 and high / low > _LOG_FROM.get(unit, math.inf):
        return _logarithmic(low, high, unit)
    low = 0.0 if unit == "bytes" or from_zero else low
    if high <= low:
        spread = abs(low) * 0.1 or 1.0
        # A share that is 1 everywhere (accuracy) has nothing above it.
        above = 0.0 if unit == "number" and high == 1 else spread
        low, high = (0.0, spread) if unit == "bytes" else (low - spread, high + above)
    air = 0.06 * (high - low)
    bottom = low if low == 0 and (unit == "bytes" or from_zero) else low - air
    ticks = _round_ticks(bottom, high + air, unit)
    return Axis(kind="linear", range=(bottom, high + air), ticks=ticks, names=_names(ticks, unit))


def _exponents(low: float, high: float) -> Axis:
    """Choose an axis of exponents of two, which are named as powers."""
    step = max(1, 2 ** round(math.log2(max(high - low, 1) / _TICKS)))
    first, last = math.floor(low / step), math.ceil(high / step)
    ticks = tuple(float(i * step) for i in range(first, last + 1))
    names = tuple(f"2^{tick:.0f}" for tick in ticks)
    return Axis(kind="linear", range=(low - 1, high + 1), ticks=ticks, names=names)


def line_axis(panels: Sequence[LinePanel]) -> Axis:
    """Choose one vertical axis for panels that are to be compared."""
    values: list[float] = []
    for panel in panels:
        columns: Iterable[Sequence[float | None]] = [series.y for series in panel.series]
        if panel.stacked:
            columns = [[sum(filter(None, column)) for column in zip(*columns, strict=True)]]
        values += [y for column in columns for y in column if y is not None]
    return axis_over(values, panels[0].unit)


def x_axis(panel: LinePanel) -> Axis:
    """Choose the horizontal axis of a panel whose positions have a unit; it holds the limit too."""
    values = [x for series in panel.series for x in series.x]
    values += [panel.limit[0]] if panel.limit else []
    return axis_over(values, panel.x_unit)


def strip_axis(panel: StripPanel) -> Axis:
    """Choose an axis that holds dots, intervals and named lines."""
    values = [value for strip in panel.strips for _, value in strip.dots]
    values += [strip.centre for strip in panel.strips if strip.centre is not None]
    values += [bound for strip in panel.strips for bound in strip.interval or ()]
    values += [0.0] if panel.zero else []
    values += [panel.limit[0]] if panel.limit else []
    return axis_over(values, panel.unit, from_zero=panel.unit == "seconds", log=False)


def _round_ticks(low: float, high: float, unit: Unit) -> tuple[float, ...]:
    step = _round_step((high - low) / _TICKS, base=1024.0 if unit == "bytes" else 1000.0)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return tuple(i * step for i in range(first, last + 1))


def _round_step(raw: float, base: float) -> float:
    """Return the next step of 1, 2, 2.5 or 5 times a power of ten, within powers of `base`."""
    thousands = base ** math.floor(math.log(raw, base))
    tens = 10.0 ** math.floor(math.log10(raw / thousands))
    return next(
        factor * tens * thousands
        for factor in (1.0, 2.0, 2.5, 5.0, 10.0, 20.0)
        if factor * tens * thousands >= raw * (1 - 1e-9)
    )


def _names(ticks: Sequence[float], unit: Unit) -> tuple[str, ...]:
    if unit == "bytes":
        return tuple(_round_bytes(tick) for tick in ticks)
    if unit == "seconds":
        return tuple("0" if tick == 0 else format_duration(tick) for tick in ticks)
    step = ticks[1] - ticks[0] if len(ticks) > 1 else max(map(abs, ticks), default=1.0) or 1.0
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    while decimals < 12 and abs(round(step, decimals) - step) > 1e-6 * step:
        decimals += 1
    if decimals > 6 or max(map(abs, ticks), default=0.0) >= 1e7:
        return tuple(f"{tick:.2g}" for tick in ticks)
    return tuple("0" if abs(tick) < step / 2 else f"{tick:,.{decimals}f}" for tick in ticks)


def _round_bytes(size: float) -> str:
    """Write a round size without decimals that say nothing: '20 MiB', not '20.0 MiB'."""
    figure, unit = format_bytes(size).split(" ")
    trimmed = figure.rstrip("0").rstrip(".") if "." in figure else figure
    return "0" if float(trimmed) == 0 else f"{trimmed} {unit}"


def _logarithmic(low: float, high: float, unit: Unit) -> Axis:
    """Choose ticks at 1, 2 and 5 times powers of ten, or at powers alone where that is enough."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    every = max(1, math.ceil((last - first) / _TICKS))
    factors = (1.0, 2.0, 5.0) if last - first <= 2 else (1.0,)
    ticks = tuple(
        factor * 10.0**i
        for i in range(first, last + 1, every)
        for factor in factors
        if low * 0.9 <= factor * 10.0**i <= high * 1.1
    )
    names = _names(ticks, unit) if unit == "seconds" else tuple(f"{tick:g}" for tick in ticks)
    air = 0.06 * math.log10(high / low)
    return Axis(
        kind="log",
        range=(math.log10(low) - air, math.log10(high) + air),
        ticks=ticks,
        names=names,
    )


def _powers_of_two(low: float, high: float) -> Axis:
    first, last = math.floor(math.log2(low)), math.ceil(math.log2(high))
    every = max(1, math.ceil((last - first) / _TICKS))
    exponents = range(first, last + 1, every)
    return Axis(
        kind="log",
        range=(
            math.log10(2) * (first - 0.3),
            math.log10(2) * (last + 0.3),
        ),
        ticks=tuple(2.0**i for i in exponents),
        names=tuple(f"{2.0**i:,.0f}" if i >= 0 else f"{2.0**i:g}" for i in exponents),
    )
