"""The HTML rendering of an outline: one file that needs no network and runs no foreign text.

Every string of a record is escaped by the template engine; charts travel as JSON in a data block;
and the page's own policy lets the browser run exactly two scripts, plotly's and ours, known by
their digests, and load nothing. So a name in a recipe cannot become markup, even by a mistake here.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2

from narrowcast.files import write_atomically, write_for_user
from narrowcast.records.run import StepPoint
from narrowcast.report.charts import figures_of
from narrowcast.report.outline import Reportable, outline_of
from narrowcast.report.shapes import Block, Chart, Outline, Prose
from narrowcast.report.wording import TONES, printable

__all__ = ["is_report", "render_html", "write_html", "write_html_for_user"]


def write_html(record: Reportable, path: Path, *, points: Sequence[StepPoint] = ()) -> None:
    """Write the report of a record, whole or not at all; `points` are the steps of a run.

    Raises RunDirectoryError if the file cannot be written.
    """
    write_atomically(path, render_html(record, points=points))


def write_html_for_user(
    record: Reportable, path: Path, *, points: Sequence[StepPoint] = ()
) -> None:
    """Write a report where a user asked for it; a device is written into, a file of theirs left.

    Raises RunDirectoryError if the file cannot be written or is not a report of ours.
    """
    write_for_user(path, render_html(record, points=points), is_report)


def is_report(content: bytes) -> bool:
    """Whether this is an HTML report that we wrote, known by the generator that its head names."""
    head = content[:4096].lower()
    return head.startswith(b"<!doctype html") and b'name="generator" content="narrowcast"' in head


def render_html(record: Reportable, *, points: Sequence[StepPoint] = ()) -> str:
    """Render the report of a record as one HTML document, about 5 MB, nearly all of it plotly."""
    outline = outline_of(record, points)
    plotly, ours = _plotly(), _asset("report.js")
    html: str = _template().render(
        outline=outline,
        figures=_inline_json(_figures(outline)),
        plotly=plotly,
        script=ours,
        style=_asset("report.css"),
        policy=_content_policy(plotly, ours),
    )
    return html.lstrip()


def _figures(outline: Outline) -> list[dict[str, Any]]:
    """List the figures of all charts in the order in which the template leaves room for them."""
    return [
        figure
        for section in outline.sections
        for block in section.blocks
        if isinstance(block, Chart)
        for figure in figures_of(block)
    ]


def _content_policy(*scripts: str) -> str:
    """Allow these inline scripts, styles (plotly adds its own) and nothing else."""
    digests = " ".join(
        f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
        for text in scripts
    )
    return (
        f"default-src 'none'; script-src {digests}; style-src 'unsafe-inline'; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )


def _inline_json(value: Any) -> str:
    """Write JSON that can stand inside a script element: no '<', so no tag and no comment."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


@cache
def _plotly() -> str:
    return (files("plotly") / "package_data" / "plotly.min.js").read_text(encoding="utf-8")


def _asset(name: str) -> str:
    return (files("narrowcast.report") / "templates" / name).read_text(encoding="utf-8")


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        autoescape=True,
        finalize=lambda value: printable(value) if type(value) is str else value,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"kind": _kind, "typeset": _typeset, "tone": TONES.get}
    return environment.from_string(_asset("report.html.j2"))


def _kind(block: Block) -> str:
    return (
        "warning" if isinstance(block, Prose) and block.kind == "warning" else type(block).__name__
    )


def _typeset(text: str) -> str:
    """Give negative numbers a real minus sign, and keep an interval, or a unit, in one line."""
    signed = re.sub(r"(?<![\w.)])-(?=\d)", "\u2212", text)
    whole = re.sub(r"\[[^\]]*\]", lambda found: found[0].replace(" ", "\u00a0"), signed)
    return re.sub(r"(?<=\d) (?=[KMGT]?i?B\b|[mun]?s\b)", "\u00a0", whole)
