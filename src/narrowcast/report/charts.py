"""From a chart of the outline to plotly figures, as plain dictionaries.

Colours are tokens ("@p-fp16"), resolved in the browser against the page's style sheet, so that one
figure reads well on a light and on a dark ground and in print. Text goes through `label`, because
plotly takes a part of HTML and its own %{...} templates in labels for markup. Plotly itself is not
imported: a figure is data, and its library is only needed in the browser.
"""

from __future__ import annotations

from collections.abc import Sequence

from narrowcast.report.axes import Axis, axis_over, bounds, line_axis, x_axis
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
from narrowcast.report.shapes import Bar, BarPanel, Chart, LinePanel, Panel, Series
from narrowcast.report.strip_figures import strip_figure
from narrowcast.report.wording import format_value
from narrowcast.units import format_bytes

__all__ = ["figures_of"]

_LINE_HEIGHT = 300
_SMALL_HEIGHT = 240
"""Of a panel among several."""
_BAR_HEIGHT = 56
_MOST_TICKS = 6
"""On a horizontal axis of counted positions."""
_TOTAL_ROOM = 84
"""Beside a bar, for its total."""


def figures_of(chart: Chart) -> tuple[Figure, ...]:
    """Draw each panel of a chart; panels of lines share their vertical scale.

    A trace's "meta" becomes the place of its group in the legend, by which the page finds it.
    """
    lines = [panel for panel in chart.panels if isinstance(panel, LinePanel)]
    shared = line_axis(lines) if lines else None
    alone = len(chart.panels) == 1 or not chart.beside
    figures = tuple(_figure(panel, shared, alone=alone) for panel in chart.panels)
    places = {entry.group: i for i, entry in enumerate(chart.legend)}
    for trace in (trace for figure in figures for trace in figure["data"]):
        trace["meta"] = places.get(trace.get("meta"), -1)
    return figures


def _figure(panel: Panel, shared: Axis | None, *, alone: bool) -> Figure:
    if isinstance(panel, LinePanel):
        assert shared is not None
        return _lines(panel, shared, height=_LINE_HEIGHT if alone else _SMALL_HEIGHT)
    if isinstance(panel, BarPanel):
        return _bars(panel)
    return strip_figure(panel)


def _lines(panel: LinePanel, axis: Axis, *, height: int) -> Figure:
    data: list[Figure] = []
    for series in panel.series:
        data.append(_curve(series, panel))
        if series.flags:
            data.append(_crosses(series))
    layout = base_layout(height, left=54)
    layout["yaxis"] |= axis_ticks(axis) | {"range": list(axis.range), "type": axis.kind}
    layout["xaxis"] |= _x_axis(panel)
    layout["shapes"] = [shaded(band) for band in panel.bands]
    layout["annotations"] = []
    layout["hovermode"] = "x unified" if panel.stacked else "closest"
    if panel.mark:
        layout["annotations"].append(_mark(panel.mark))
        layout["margin"]["t"] = 34
    if panel.limit:
        x, name = panel.limit
        low, high = layout["xaxis"]["range"]
        layout["shapes"].append(ruler(x, "@fails", "dash"))
        beyond = x < (low + high) / 2
        layout["annotations"].append(ruler_name(x, name, "@fails", rightwards=beyond))
        layout["margin"]["t"] = 34
    return {"data": data, "layout": layout}


def _x_axis(panel: LinePanel) -> Figure:
    if panel.x_unit != "number":
        axis = x_axis(panel)
        return axis_ticks(axis) | {"range": list(axis.range), "title": axis_title(panel.x_title)}
    low, high = bounds([x for series in panel.series for x in series.x])
    air = 0.0 if panel.bands else 0.015 * (high - low)
    # Positions are counted: left to itself, plotly would write "1.5" between two steps.
    few: Figure = {"dtick": 1} if high - low <= _MOST_TICKS else {"nticks": _MOST_TICKS}
    figures: Figure = few if panel.x_figures else {"showticklabels": False}
    return figures | {
        "title": axis_title(panel.x_title),
        "range": [low - air, high + air if high > low else low + 1],
        "showgrid": panel.x_figures,
    }


def _curve(series: Series, panel: LinePanel) -> Figure:
    name = label(series.name)
    where = f"{label(panel.x_title)} %{{x}}<br>" if panel.x_unit == "number" else ""
    trace: Figure = {
        "type": "scatter",
        "mode": "lines+markers" if series.dotted or len(series.x) == 1 else "lines",
        "x": list(series.x),
        "y": list(series.y),
        "name": name,
        "meta": series.group,
        "connectgaps": False,
        "line": {
            "color": f"@{series.colour}",
            "width": 0.5 if panel.stacked else 1.6,
            "dash": "4px,3px" if series.dashed else "solid",
            "shape": "hv" if series.stepped else "linear",
        },
        "marker": {"color": f"@{series.colour}", "size": 7},
        "hovertemplate": f"{name}<br>{where}%{{text}}<extra></extra>",
        "text": [label(text) for text in series.details]
        or [format_value(y, panel.unit) for y in series.y],
    }
    if panel.stacked:
        trace |= {
            "stackgroup": "all",
            "fillcolor": f"@{series.colour}",
            "hovertemplate": f"{name} %{{text}}<extra></extra>",
        }
    return trace


def _crosses(series: Series) -> Figure:
    """Mark skipped steps; where the value is missing, at the height of the one before."""
    heights: list[float | None] = []
    last: float | None = next((y for y in series.y if y is not None), None)
    for y in series.y:
        last = y if y is not None else last
        heights.append(last)
    return {
        "type": "scatter",
        "mode": "markers",
        "x": [series.x[i] for i in series.flags],
        "y": [heights[i] for i in series.flags],
        "meta": series.group,
        "cliponaxis": False,
        "marker": {
            "symbol": "x-thin",
            "size": 8,
            "color": "@fails",
            "line": {"width": 1.8, "color": "@fails"},
        },
        "hovertemplate": f"{label(series.name)}<br>step %{{x}} skipped<extra></extra>",
    }


def _mark(mark: tuple[float, float, str]) -> Figure:
    x, y, text = mark
    return {
        "x": x,
        "y": y,
        "text": label(text),
        "showarrow": True,
        "arrowhead": 0,
        "arrowcolor": "@ink",
        "arrowwidth": 1,
        "ax": 0,
        "ay": -22,
        "bgcolor": "@surface",
        "borderpad": 3,
        "font": {"color": "@ink", "size": 12},
    }


def _bars(panel: BarPanel) -> Figure:
    axis = axis_over([0.0, *(float(bar.total) for bar in panel.bars)], panel.unit)
    data = [_segment(bar, i) for bar in panel.bars for i in range(len(bar.segments))]
    layout = base_layout(_BAR_HEIGHT * len(panel.bars) + AXIS_ROOM, left=8)
    layout["barmode"] = "stack"
    layout["bargap"] = 0.3
    layout["uniformtext"] = {"mode": "hide", "minsize": 11}
    layout["margin"]["r"] = _TOTAL_ROOM
    layout["xaxis"] |= axis_ticks(axis) | {"range": [0, max(bar.total for bar in panel.bars) or 1]}
    layout["yaxis"] |= _rows([bar.label for bar in panel.bars])
    layout["annotations"] = [
        {
            "x": bar.total,
            "y": label(bar.label),
            "text": f"<b>{format_value(bar.total, panel.unit)}</b>",
            "showarrow": False,
            "xanchor": "left",
            "xshift": 6,
            "font": {"color": "@ink", "size": 13},
        }
        for bar in panel.bars
    ]
    return {"data": data, "layout": layout}


def _segment(bar: Bar, index: int) -> Figure:
    segment = bar.segments[index]
    size = format_bytes(segment.value)
    return {
        "type": "bar",
        "orientation": "h",
        "x": [segment.value],
        "y": [label(bar.label)],
        "name": label(segment.label),
        "meta": segment.group,
        "marker": {"color": f"@{segment.colour}", "line": {"color": "@surface", "width": 1.5}},
        "text": [size],
        "textposition": "inside",
        "insidetextanchor": "middle",
        "textangle": 0,
        "insidetextfont": {"color": f"@on-{segment.colour}", "size": 12},
        "hovertemplate": f"{label(bar.label)}<br>{label(segment.label)} {size}<extra></extra>",
    }


def _rows(names: Sequence[str]) -> Figure:
    """Name the rows of bars, the first on top."""
    return {
        "type": "category",
        "categoryorder": "array",
        "categoryarray": [label(name) for name in reversed(names)],
        "showgrid": False,
        "ticks": "",
        "automargin": True,
        "tickfont": {"size": 13, "color": "@ink"},
        "ticklabelstandoff": 8,
    }
