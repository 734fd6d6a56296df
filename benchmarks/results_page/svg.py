"""Charts as small SVG files: bars with their spread, points, and lines. Nothing is computed here.

Written by hand because the page must be drawn from the records alone, on any machine: no browser,
no plotting library. Nothing is told by hue alone (labels stand beside what they name), and colours
follow the reader's light or dark setting.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape

__all__ = ["Bar", "Point", "Series", "bars", "lines", "scatter"]

_WIDTH = 840
_RIGHT, _TOP = 130, 56
_ROW = 24
_LETTER = 7
"""About how wide a letter is; labels are never cut."""
_LINE_HEIGHT = 13
_STYLE = """
text { font: 13px system-ui, sans-serif; fill: #1f2328; }
.title { font-size: 15px; font-weight: 600; } .small { font-size: 11.5px; fill: #59636e; }
.grid { stroke: #d1d9e0; stroke-width: 1; } .whisker { stroke: #1f2328; stroke-width: 1.5; }
.mark { stroke: #c4432b; stroke-width: 1.5; stroke-dasharray: 5 4; }
.c0 { fill: #2f6fb0; } .c1 { fill: #8a939d; } .c2 { fill: #c77a1b; } .c3 { fill: #3f8f5b; }
.l { fill: none; stroke-width: 1.6; }
.l0 { stroke: #2f6fb0; } .l1 { stroke: #8a939d; } .l2 { stroke: #c77a1b; }
.l3 { stroke: #3f8f5b; } .l4 { stroke: #8b4fa8; } .l5 { stroke: #c4432b; }
@media (prefers-color-scheme: dark) {
 text { fill: #e6edf3; } .small { fill: #9198a1; } .grid { stroke: #3d444d; }
 .whisker { stroke: #e6edf3; } .c0 { fill: #5b9bd9; } .l0 { stroke: #5b9bd9; }
}
"""


@dataclass(frozen=True, kw_only=True)
class Bar:
    """A value with its spread."""

    label: str
    value: float
    low: float | None = None
    high: float | None = None
    group: int = 0
    """Which of four colours: 0 ours, 1 what it is compared with, 2 and 3 others."""
    says: str = ""
    """What stands beside it; else the value."""


@dataclass(frozen=True, kw_only=True)
class Point:
    label: str
    x: float
    y: float
    group: int = 0


@dataclass(frozen=True, kw_only=True)
class Series:
    label: str
    values: Sequence[float] = field(default_factory=tuple)


def bars(title: str, rows: Sequence[Bar], *, axis: str, mark: float | None = None) -> str:
    """Draw horizontal bars from zero; `mark` is a line to compare with."""
    most = max([r.high if r.high is not None else r.value for r in rows] + [mark or 0.0])
    top = _nice(most)
    left = 16 + _LETTER * max(len(row.label) for row in rows)
    plot = _WIDTH - left - _RIGHT
    height = _TOP + _ROW * len(rows) + 40

    def x(value: float) -> float:
        return left + plot * value / top

    parts = [_text(0, 20, title, "title"), *_grid(x, top, _TOP - 8, height - 36, axis)]
    for place, row in enumerate(rows):
        y = _TOP + _ROW * place
        parts.append(_text(left - 8, y + 13, row.label, anchor="end"))
        width = max(x(row.value) - left, 1)
        parts.append(
            f'<rect class="c{row.group}" x="{left}" y="{y + 2}" width="{width:.1f}" '
            f'height="{_ROW - 9}" rx="2"/>'
        )
        end = row.value if row.high is None else max(row.high, row.value)
        if row.low is not None and row.high is not None:
            parts.append(_line(x(row.low), y + 9.5, x(row.high), y + 9.5, "whisker"))
        parts.append(_text(x(end) + 6, y + 13, row.says or _short(row.value)))
    if mark is not None:
        parts.append(_line(x(mark), _TOP - 8, x(mark), height - 36, "mark"))
    return _svg(height, parts, title)


def scatter(
    title: str, points: Sequence[Point], *, x_axis: str, y_axis: str,
    marks: tuple[float | None, float | None] = (None, None),
) -> str:  # fmt: skip
    """Draw labelled points from zero on both axes; `marks` are lines at an x and a y."""
    left, right, height = 60, 40, 420
    top_x = _nice(max([p.x for p in points] + [marks[0] or 0.0]))
    top_y = _nice(max([p.y for p in points] + [marks[1] or 0.0]))
    plot_x, plot_y = _WIDTH - left - right, height - _TOP - 50

    def x(value: float) -> float:
        return left + plot_x * value / top_x

    def y(value: float) -> float:
        return _TOP + plot_y * (1 - value / top_y)

    parts = [_text(0, 20, title, "title"), *_grid(x, top_x, _TOP, height - 50, x_axis)]
    for tick in _ticks(top_y):
        parts.append(_line(left, y(tick), _WIDTH - right, y(tick), "grid"))
        parts.append(_text(left - 6, y(tick) + 4, _short(tick), "small", "end"))
    parts.append(_text(0, _TOP - 10, y_axis, "small"))
    if marks[0] is not None:
        parts.append(_line(x(marks[0]), _TOP, x(marks[0]), height - 50, "mark"))
    if marks[1] is not None:
        parts.append(_line(left, y(marks[1]), _WIDTH - right, y(marks[1]), "mark"))
    taken: list[tuple[float, float, float]] = []
    for point in sorted(points, key=lambda p: -p.y):
        place = f'cx="{x(point.x):.1f}" cy="{y(point.y):.1f}"'
        parts.append(f'<circle class="c{point.group}" {place} r="5"/>')
        is_far = x(point.x) > _WIDTH - right - 170
        at = x(point.x) + (-9 if is_far else 9)
        wide = _LETTER * len(point.label)
        start = at - wide if is_far else at
        level = _free_level(y(point.y) + 4, start, start + wide, taken)
        parts.append(_text(at, level, point.label, "small", "end" if is_far else "start"))
    return _svg(height, parts, title)


def _free_level(
    level: float, start: float, end: float, taken: list[tuple[float, float, float]]
) -> float:
    """Return the next level downwards at which a label covers no other, and note that it is there.

    `taken` are (level, start, end) of the labels so far.
    """
    while any(abs(level - at) < _LINE_HEIGHT and a < end and start < b for at, a, b in taken):
        level += _LINE_HEIGHT / 2
    taken.append((level, start, end))
    return level


def lines(title: str, series: Sequence[Series], *, x_axis: str, y_axis: str) -> str:
    """Draw one line for each series over 1, 2, 3 and so on; the last values stand beside them."""
    left, right, height = 60, 170, 360
    values = [v for s in series for v in s.values if math.isfinite(v)]
    low, high = min(values), max(values)
    room = (high - low) or 1.0
    top_x = max(len(s.values) for s in series)
    plot_x, plot_y = _WIDTH - left - right, height - _TOP - 50

    def x(step: float) -> float:
        return left + plot_x * step / top_x

    def y(value: float) -> float:
        return _TOP + plot_y * (1 - (value - low) / room)

    parts = [_text(0, 20, title, "title"), *_grid(x, top_x, _TOP, height - 50, x_axis)]
    for part in range(5):
        value = low + room * part / 4
        parts.append(_line(left, y(value), _WIDTH - right, y(value), "grid"))
        parts.append(_text(left - 6, y(value) + 4, _short(value), "small", "end"))
    parts.append(_text(0, _TOP - 10, y_axis, "small"))
    for place, one in enumerate(series):
        dots = [(x(k + 1), y(v)) for k, v in enumerate(one.values) if math.isfinite(v)]
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in dots)
        parts.append(f'<polyline class="l l{place % 6}" points="{path}"/>')
        key = _TOP + 18 * place
        parts.append(_line(_WIDTH - right + 10, key, _WIDTH - right + 30, key, f"l l{place % 6}"))
        parts.append(_text(_WIDTH - right + 36, key + 4, one.label, "small"))
    return _svg(height, parts, title)


def _svg(height: float, parts: Iterable[str], title: str) -> str:
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height:.0f}" '
        f'width="{_WIDTH}" role="img" aria-label="{escape(title)}">\n'
        f"<style>{_STYLE}</style>\n{body}\n</svg>\n"
    )


def _grid(x: object, top: float, above: float, below: float, axis: str) -> Iterable[str]:
    assert callable(x), "maps a value to its place"
    for tick in _ticks(top):
        yield _line(x(tick), above, x(tick), below, "grid")
        yield _text(x(tick), below + 15, _short(tick), "small", "middle")
    yield _text((x(0) + x(top)) / 2, below + 32, axis, "small", "middle")


def _text(x: float, y: float, text: str, kind: str = "", anchor: str = "start") -> str:
    return (
        f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
    )


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _ticks(top: float) -> list[float]:
    return [top * k / 4 for k in range(5)]


def _nice(most: float) -> float:
    """Return the next number of the form 1, 1.2, 1.6, 2, 2.4, 3.2, 4, 6, 8 times a power of ten."""
    if most <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(most))
    return next(f * power for f in (1, 1.2, 1.6, 2, 2.4, 3.2, 4, 6, 8, 10) if f * power >= most)


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
