"""Rows of dots as plotly figures: every run a dot, its interval, and the lines to hold it to."""

from __future__ import annotations

import math
from collections.abc import Sequence

from narrowcast.report.axes import Axis, strip_axis
from narrowcast.report.figure_parts import (
    AXIS_ROOM,
    Figure,
    axis_ticks,
    axis_title,
    base_layout,
    label,
    ruler,
    ruler_name,
    shaded,
)
from narrowcast.report.shapes import Band, Strip, StripPanel, Unit
from narrowcast.report.wording import format_value

__all__ = ["strip_figure"]

_ROW_HEIGHT = 44
_EDGE = 0.18
"""The part of a narrow picture's width that a short name takes."""


def strip_figure(panel: StripPanel) -> Figure:
    axis = strip_axis(panel)
    data: list[Figure] = []
    for row, strip in enumerate(panel.strips):
        data += _strip(strip, row, panel.unit)
    names = bool(panel.zero or panel.limit)
    layout = base_layout(_ROW_HEIGHT * len(panel.strips) + AXIS_ROOM + (18 if names else 0), left=8)
    layout["margin"]["t"] = 26 if names else 8
    layout["xaxis"] |= axis_ticks(axis) | {
        "range": list(axis.range),
        "zeroline": False,
        "title": axis_title(panel.x_title),
    }
    layout["yaxis"] |= _row_positions([strip.label for strip in panel.strips])
    layout["shapes"] = [_clipped(band, axis) for band in panel.bands] + _rulers(panel)
    layout["annotations"] = _ruler_names(panel, axis)
    layout["hovermode"] = "closest"
    return {"data": data, "layout": layout}


def _clipped(band: Band, axis: Axis) -> Figure:
    shape = shaded(band)
    shape["x0"] = axis.range[0] if band.start is None else band.start
    shape["x1"] = axis.range[1] if band.end is None else band.end
    return shape


def _strip(strip: Strip, row: int, unit: Unit) -> list[Figure]:
    """Draw one row: interval as a thick translucent bar, centre as a stroke, runs as dots."""
    name, colour = label(strip.label), f"@{strip.colour}"
    data: list[Figure] = []
    if strip.interval:
        said = " to ".join(format_value(bound, unit) for bound in strip.interval)
        data.append(
            {
                "type": "scatter",
                "mode": "lines",
                "x": list(strip.interval),
                "y": [row, row],
                "line": {"color": f"{colour}/0.28", "width": 16},
                "hovertemplate": f"{name}<br>interval {said}<extra></extra>",
            }
        )
    data.append(
        {
            "type": "scatter",
            "mode": "markers",
            "x": [value for _, value in strip.dots],
            "y": [row] * len(strip.dots),
            "text": [f"{label(what)}: {format_value(v, unit)}" for what, v in strip.dots],
            "marker": {
                "size": 9,
                "symbol": "circle-open" if strip.hollow else "circle",
                "color": colour,
                "line": {"color": colour if strip.hollow else "@surface", "width": 1.2},
            },
            "hovertemplate": f"{name}<br>%{{text}}<extra></extra>",
        }
    )
    if strip.centre is not None and math.isfinite(strip.centre):
        said = f"{label(strip.centre_name)} {format_value(strip.centre, unit)}"
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "x": [strip.centre],
                "y": [row],
                "marker": {
                    "symbol": "line-ns",
                    "size": 26,
                    "line": {"width": 2.5, "color": "@ink"},
                },
                "hovertemplate": f"{name}<br>{said}<extra></extra>",
            }
        )
    return data


def _rulers(panel: StripPanel) -> list[Figure]:
    """Draw the vertical lines: a plain one at zero, a dashed one at the limit."""
    lines = [(0.0, "@ink-soft", "solid")] if panel.zero else []
    lines += [(panel.limit[0], "@fails", "dash")] if panel.limit else []
    return [ruler(*line) for line in lines]


def _ruler_names(panel: StripPanel, axis: Axis) -> list[Figure]:
    """Name the vertical lines above the picture, turned from each other but not out of it."""
    names = [(0.0, panel.zero, "@ink-soft")] if panel.zero else []
    names += [(*panel.limit, "@fails")] if panel.limit else []
    low, high = axis.range
    other = panel.limit[0] if panel.limit else (low + high) / 2
    found = []
    for x, text, colour in names:
        place = (x - low) / (high - low)
        rightwards = x > (other if x == 0 else 0.0)
        rightwards = (rightwards or place < _EDGE) and place <= 1 - _EDGE
        found.append(ruler_name(x, text, colour, rightwards=rightwards))
    return found


def _row_positions(names: Sequence[str]) -> Figure:
    """Name the rows of dots, the first on top."""
    return {
        "range": [len(names) - 0.4, -0.6],
        "tickvals": list(range(len(names))),
        "ticktext": [label(name) for name in names],
        "gridcolor": "@rule-soft",
        "zeroline": False,
        "automargin": True,
        "tickfont": {"size": 13, "color": "@ink"},
        "ticklabelstandoff": 8,
    }
