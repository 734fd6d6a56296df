"""What all figures have in common: layout, axes, bands, and labels that plotly cannot misread."""

from __future__ import annotations

from typing import Any

from narrowcast.report.axes import Axis
from narrowcast.report.shapes import Band
from narrowcast.report.wording import printable

__all__ = ["AXIS_ROOM", "Figure", "axis_ticks", "axis_title", "base_layout", "label", "ruler",
           "ruler_name", "shaded"]  # fmt: skip

Figure = dict[str, Any]

AXIS_ROOM = 62
"""Height of an axis with its figures and its title."""
_HOVER = {"bgcolor": "@surface", "bordercolor": "@rule", "font": {"color": "@ink"}, "align": "left"}


def label(text: str) -> str:
    """Make a name inert in plotly, which reads some tags, entities and %{templates} in text."""
    plain = printable(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return plain.replace("%{", "%&#123;")


def shaded(band: Band) -> Figure:
    """Shade a stretch over the whole height; an open end reaches the edge of the picture."""
    return {
        "type": "rect",
        "layer": "below",
        "xref": "x",
        "yref": "paper",
        "x0": band.start,
        "x1": band.end,
        "y0": 0,
        "y1": 1,
        "fillcolor": f"@s-{band.shade}",
        "line": {"width": 0},
    }


def ruler(x: float, colour: str, dash: str) -> Figure:
    """Draw a vertical line over the whole height."""
    return {
        "type": "line",
        "xref": "x",
        "yref": "paper",
        "x0": x,
        "x1": x,
        "y0": 0,
        "y1": 1,
        "line": {"color": colour, "width": 1.5, "dash": dash},
    }


def ruler_name(x: float, text: str, colour: str, *, rightwards: bool) -> Figure:
    """Name a vertical line above the picture, to one side of it."""
    return {
        "x": x,
        "y": 1,
        "yref": "paper",
        "yanchor": "bottom",
        "text": label(text),
        "showarrow": False,
        "xanchor": "left" if rightwards else "right",
        "font": {"color": colour, "size": 12},
    }


def base_layout(height: int, *, left: int) -> Figure:
    axis = {
        "gridcolor": "@rule-soft",
        "linecolor": "@rule",
        "zerolinecolor": "@rule",
        "zeroline": False,
        "tickfont": {"color": "@ink-soft", "size": 12},
        "ticklabelstandoff": 4,
        "automargin": True,
    }
    return {
        "height": height,
        "margin": {"l": left, "r": 16, "t": 8, "b": 40, "pad": 0},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": "@font", "size": 13, "color": "@ink"},
        "showlegend": False,
        "hoverlabel": _HOVER,
        "xaxis": dict(axis),
        "yaxis": dict(axis),
    }


def axis_title(text: str) -> Figure:
    return {"text": label(text), "font": {"size": 12, "color": "@ink-soft"}, "standoff": 8}


def axis_ticks(axis: Axis) -> Figure:
    return {"tickmode": "array", "tickvals": list(axis.ticks), "ticktext": list(axis.names)}
