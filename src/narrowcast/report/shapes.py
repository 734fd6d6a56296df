"""The vocabulary of an outline: what a report consists of, before it is a terminal or a page.

An outline holds finished words and the raw values of charts, and nothing about how they look: the
terminal and the HTML page are two renderings of the same one, so neither can say more or less than
the other. Strings may hold names from a user's recipe; they are plain text, and each renderer
makes them harmless in its own way (``wording.printable``, then the escaping of its medium).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = [
    "Band",
    "Bar",
    "BarPanel",
    "Block",
    "Chart",
    "Column",
    "Facts",
    "LegendEntry",
    "LinePanel",
    "Listing",
    "ListingLine",
    "Outline",
    "Panel",
    "Prose",
    "Section",
    "Segment",
    "Series",
    "Shade",
    "Strip",
    "StripPanel",
    "Table",
    "Tone",
    "Unit",
    "Verdict",
    "Verdicts",
]

Tone = Literal["holds", "fails", "open"]
Unit = Literal["number", "bytes", "seconds", "scale", "power"]
"""``power``: exponents of two."""
Shade = Literal["forward", "backward", "optimizer", "harm"]


@dataclass(frozen=True, kw_only=True)
class Prose:
    """Sentences: a paragraph each, the items of a list, or warnings that must be seen; or code."""

    lines: tuple[str, ...]
    kind: Literal["paragraphs", "list", "warning", "code"] = "paragraphs"


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Pairs of a label and a value."""

    pairs: tuple[tuple[str, str], ...]
    headline: bool = False
    """Whether these are the figures that a reader came for."""


@dataclass(frozen=True, kw_only=True)
class Column:
    """A column's heading; numbers are set flush right, with digits of one width."""

    title: str
    numeric: bool = False
    verdict: bool = False
    """Whether it holds verdict words."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of finished words; the first cell of a row names it."""

    caption: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[str, ...], ...]
    colours: tuple[str, ...] = ()
    """The colour of each row's subject, where it has one in the pictures."""
    main: bool = False
    """Whether this is the table that a reader in a hurry reads: it must fit every screen."""
    terminal_rows: int | None = None
    """How many rows a terminal shows of a long table; it says how many it left out."""


@dataclass(frozen=True, kw_only=True)
class ListingLine:
    """A line of source with what is said beside it; `tone` where it is accused."""

    number: int
    code: str
    beside: tuple[str, ...] = ()
    tone: Tone | None = None


@dataclass(frozen=True, kw_only=True)
class Listing:
    """Lines of a source file, with columns of values beside them; gaps are shown as such."""

    file: str
    columns: tuple[str, ...]
    lines: tuple[ListingLine, ...]


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What is said of one precision. Estimate, interval and n are one string: never apart."""

    precision: str
    colour: str
    word: str
    tone: Tone
    meaning: str
    estimate: str
    why: str
    facts: tuple[tuple[str, str], ...]


@dataclass(frozen=True, kw_only=True)
class Verdicts:
    """All verdicts, in the same layout whatever the news is."""

    verdicts: tuple[Verdict, ...]


@dataclass(frozen=True, kw_only=True)
class LegendEntry:
    """A name and its colour; entries with a `group` show and hide the series of that group."""

    label: str
    colour: str
    group: str = ""
    mark: Literal["line", "block", "area"] = "line"


@dataclass(frozen=True, kw_only=True)
class Series:
    """One curve; `flags` are the positions of points to be marked with a cross."""

    name: str
    group: str
    colour: str
    x: tuple[float, ...]
    y: tuple[float | None, ...]
    dashed: bool = False
    stepped: bool = False
    dotted: bool = False
    """Whether each point is marked, where there are few."""
    flags: tuple[int, ...] = ()
    details: tuple[str, ...] = ()
    """What to show on hover for each point, instead of the value."""


@dataclass(frozen=True, kw_only=True)
class Band:
    """A shaded stretch of the horizontal axis; None is the edge of the picture."""

    start: float | None
    end: float | None
    label: str
    shade: Shade


@dataclass(frozen=True, kw_only=True)
class LinePanel:
    """Curves over a common axis. Stacked curves add up, in their order, to the total."""

    title: str
    x_title: str
    unit: Unit
    series: tuple[Series, ...]
    stacked: bool = False
    bands: tuple[Band, ...] = ()
    x_figures: bool = True
    """Whether positions on the horizontal axis mean anything in figures."""
    mark: tuple[float, float, str] | None = None
    """One named point (x, y, label), such as the peak."""
    x_unit: Unit = "number"
    """What positions are counted in; anything but numbers stands in the points' details too."""
    limit: tuple[float, str] | None = None
    """A vertical line with its name, such as a budget."""


@dataclass(frozen=True, kw_only=True)
class Segment:
    """A part of a bar."""

    label: str
    group: str
    colour: str
    value: int


@dataclass(frozen=True, kw_only=True)
class Bar:
    """A bar of segments; `total` is written at its end and is the record's, not a sum made here."""

    label: str
    segments: tuple[Segment, ...]
    total: int


@dataclass(frozen=True, kw_only=True)
class BarPanel:
    """Horizontal stacked bars with a common scale."""

    title: str
    unit: Unit
    bars: tuple[Bar, ...]


@dataclass(frozen=True, kw_only=True)
class Strip:
    """One row of dots (one a seed), with a centre and an interval where the record has them."""

    label: str
    colour: str
    dots: tuple[tuple[str, float], ...]
    """(what it is, value)."""
    centre: float | None = None
    centre_name: str = ""
    interval: tuple[float, float] | None = None
    hollow: bool = False


@dataclass(frozen=True, kw_only=True)
class StripPanel:
    """Rows of dots over one axis of values; `zero` and `limit` are vertical lines with names.

    `zero` names what lies at 0, if that means something.
    """

    title: str
    x_title: str
    unit: Unit
    strips: tuple[Strip, ...]
    zero: str = ""
    limit: tuple[float, str] | None = None
    bands: tuple[Band, ...] = ()


Panel = LinePanel | BarPanel | StripPanel


@dataclass(frozen=True, kw_only=True)
class Chart:
    """Panels that share a scale, their legend, and a sentence for those who cannot see them."""

    key: str
    title: str
    summary: str
    panels: tuple[Panel, ...]
    legend: tuple[LegendEntry, ...] = ()
    beside: bool = True
    """Whether panels may stand beside each other, where there is room."""


Block = Prose | Facts | Table | Listing | Verdicts | Chart


@dataclass(frozen=True, kw_only=True)
class Section:
    """A heading and what stands under it; `brief` sections alone make the summary of a run."""

    key: str
    title: str
    blocks: tuple[Block, ...]
    brief: bool = False


@dataclass(frozen=True, kw_only=True)
class Outline:
    """A whole report."""

    title: str
    subtitle: str
    sections: tuple[Section, ...]
    footer: str
