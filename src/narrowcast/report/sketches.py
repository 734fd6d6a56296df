"""Charts in characters: a line is a row of blocks, a strip a row of dots, a bar a table of parts.

A sketch has the same axis as the picture on the page (``axes``), so both show the same thing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from narrowcast.report.axes import Axis, axis_over, line_axis, strip_axis
from narrowcast.report.shapes import BarPanel, Chart, LinePanel, Series, Strip, StripPanel
from narrowcast.report.wording import format_value
from narrowcast.units import format_bytes

__all__ = ["sketch"]

Line = tuple[str, str]
"""A line of characters and the colour token of its subject."""

_BLOCKS = "▁▂▃▄▅▆▇█"
_NARROWEST = 10


def sketch(chart: Chart, width: int) -> Iterator[Line]:
    """Draw every panel of a chart in lines of at most `width` characters."""
    lines = [panel for panel in chart.panels if isinstance(panel, LinePanel)]
    axis = line_axis(lines) if lines else axis_over((), "number")
    room = max((len(series.name) for panel in lines for series in panel.series), default=0)
    for panel in chart.panels:
        if panel.title and len(chart.panels) > 1 and not isinstance(panel, LinePanel):
            yield f"{panel.title}:", ""
        if isinstance(panel, LinePanel):
            yield from _curves(panel, axis, (room, width))
        elif isinstance(panel, BarPanel):
            yield from _bars(panel, [entry.label for entry in chart.legend], width)
        else:
            yield from _strips(panel, width)


def _curves(panel: LinePanel, axis: Axis, rooms: tuple[int, int]) -> Iterator[Line]:
    """Draw one row of blocks a curve, all on one scale, between the first and the last value.

    Of live memory the largest value is told instead.
    """
    room, width = rooms
    if panel.stacked:
        axis = axis_over([y for series in panel.series for y in series.y if y], panel.unit)
    ends = [_ends(series, panel) for series in panel.series]
    before = max((len(first) for first, _ in ends), default=0)
    after = max((len(last) for _, last in ends), default=0)
    for series, (first, last) in zip(panel.series, ends, strict=True):
        free = max(width - room - before - after - 2, _NARROWEST)
        blocks = _blocks(series, axis, free)
        yield f"{series.name:<{room}}  {first:>{before}}{blocks}{last}", series.colour


def _ends(series: Series, panel: LinePanel) -> tuple[str, str]:
    """Word what stands before and after a curve's blocks."""
    if panel.unit == "bytes":
        return "", f" up to {format_value(_largest(series), panel.unit)}"
    return f"{_end(series, panel, 0)} ", f" {_end(series, panel, -1)}"


def _largest(series: Series) -> float:
    return max((y for y in series.y if y is not None), default=0.0)


def _end(series: Series, panel: LinePanel, at: int) -> str:
    return format_value(series.y[at], panel.unit) if series.y else "nothing"


def _blocks(series: Series, axis: Axis, width: int) -> str:
    """Show every n-th value, never an average; a value that is not finite is a cross."""
    n = len(series.y)
    shown = min(n, width)
    places = [i * (n - 1) // max(shown - 1, 1) for i in range(shown)]
    low, high = axis.range
    out = []
    for i in places:
        y = series.y[i]
        if y is None or (axis.kind == "log" and y <= 0):
            out.append("\N{MULTIPLICATION SIGN}")
            continue
        height = ((math.log10(y) if axis.kind == "log" else y) - low) / (high - low)
        out.append(_BLOCKS[min(max(int(height * len(_BLOCKS)), 0), len(_BLOCKS) - 1)])
    return "".join(out)


def _bars(panel: BarPanel, order: Sequence[str], width: int) -> Iterator[Line]:
    """Draw a bar for each total, and the parts as a table: without colours a bar shows no parts."""
    room = max((len(bar.label) for bar in panel.bars), default=0)
    longest = max((bar.total for bar in panel.bars), default=0) or 1
    totals = [format_value(bar.total, panel.unit) for bar in panel.bars]
    free = max(width - room - max(map(len, totals), default=0) - 3, _NARROWEST)
    for bar, total in zip(panel.bars, totals, strict=True):
        length = max(round(free * bar.total / longest), 1)
        yield f"{bar.label:<{room}}  {'█' * length} {total}", f"p-{bar.label}"
    if len(panel.bars) > 1:
        yield "", ""
        yield from _parts(panel, order)


def _parts(panel: BarPanel, order: Sequence[str]) -> Iterator[Line]:
    held = [{s.label: s.value for s in bar.segments} for bar in panel.bars]
    names = [name for name in order if any(name in parts for parts in held)]
    room = max(map(len, names), default=0)
    cell = max(10, *(len(bar.label) + 2 for bar in panel.bars))
    yield " " * room + "".join(f"{bar.label:>{cell}}" for bar in panel.bars), ""
    for name in names:
        sizes = [format_bytes(parts[name]) if name in parts else "-" for parts in held]
        yield f"{name:<{room}}" + "".join(f"{size:>{cell}}" for size in sizes), ""


def _strips(panel: StripPanel, width: int) -> Iterator[Line]:
    axis = strip_axis(panel)
    room = max((len(strip.label) for strip in panel.strips), default=0)
    free = max(width - room - 2, _NARROWEST)
    ground = [" "] * free
    for x, sign in ((0.0, "│"), *(((panel.limit[0], "┊"),) if panel.limit else ())):
        if (x or panel.zero) and axis.range[0] <= x <= axis.range[1]:
            ground[_place(x, axis, free)] = sign
    for strip in panel.strips:
        yield f"{strip.label:<{room}}  {_row(strip, axis, ground)}", strip.colour
    yield " " * (room + 2) + _scale(axis, free), ""
    signs = "   ".join(_signs(panel))
    if room + 5 + len(signs) + len(panel.x_title) <= width:
        yield f"{' ' * (room + 2)}{panel.x_title}   {signs}", ""
    else:
        yield " " * (room + 2) + panel.x_title, ""
        yield " " * (room + 2) + signs, ""


def _signs(panel: StripPanel) -> Iterator[str]:
    """Explain the characters that the panel uses."""
    if panel.zero:
        yield f"│ {panel.zero}"
    if panel.limit:
        yield f"┊ {panel.limit[1]}"
    yield "● run"
    if any(strip.interval for strip in panel.strips):
        yield "━ interval"
    centre = next((s.centre_name for s in panel.strips if s.centre is not None), "")
    if centre:
        yield f"┃ {centre}"


def _row(strip: Strip, axis: Axis, ground: Sequence[str]) -> str:
    row = list(ground)
    if strip.interval:
        low, high = (_place(bound, axis, len(row)) for bound in strip.interval)
        row[low : high + 1] = "━" * (high + 1 - low)
    for _, value in strip.dots:
        row[_place(value, axis, len(row))] = "○" if strip.hollow else "●"
    if strip.centre is not None and math.isfinite(strip.centre):
        row[_place(strip.centre, axis, len(row))] = "┃"
    return "".join(row).rstrip()


def _place(value: float, axis: Axis, width: int) -> int:
    low, high = axis.range
    return min(max(round((value - low) / (high - low) * (width - 1)), 0), width - 1)


def _scale(axis: Axis, width: int) -> str:
    """Write the ticks' names at their places, as far as they do not touch."""
    row = [" "] * width
    end = -2
    for tick, name in zip(axis.ticks, axis.names, strict=True):
        start = min(max(_place(tick, axis, width) - len(name) // 2, 0), width - len(name))
        if start > end + 1:
            row[start : start + len(name)] = name
            end = start + len(name)
    return "".join(row).rstrip()
