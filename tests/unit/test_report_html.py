"""The HTML report is one whole file in which names are text and charts are plotly's."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from narrowcast.errors import RunDirectoryError
from narrowcast.records.memory import CATEGORIES
from narrowcast.report.html import render_html, write_html
from report_records import KINDS, golden, hostile, points


class _Page(HTMLParser):
    """Collects elements, their attributes and the text outside scripts and styles."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.text = ""
        self._inside = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._inside = tag

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts.append(data)
        elif self._inside != "style":
            self.text += data


def page(record: Any) -> _Page:
    return _Page(render_html(record, points=points()))


def figures(found: _Page) -> list[dict[str, Any]]:
    return json.loads(found.scripts[0])


@pytest.mark.parametrize("name", KINDS)
def test_the_page_needs_no_network(name: str) -> None:
    """No element loads anything, and the page's policy forbids it."""
    elements = page(golden(name)).elements
    loading = [
        (tag, attrs)
        for tag, attrs in elements
        for attribute in ("src", "href", "data", "action", "poster")
        if not (attrs.get(attribute) or "#").startswith(("#", "data:,"))
    ]
    policy = next(a["content"] for t, a in elements if a.get("http-equiv"))

    assert loading == []
    assert policy is not None
    assert policy.startswith("default-src 'none'")


def test_the_policy_admits_exactly_the_two_scripts_of_the_page() -> None:
    """Plotly's and ours, by digest: any other inline script is refused by the browser."""
    found = page(golden("comparison"))
    policy = next(a["content"] or "" for _, a in found.elements if a.get("http-equiv"))

    digests = [
        base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        for text in found.scripts[1:]
    ]
    assert len(digests) == 2
    assert re.findall(r"'sha256-([^']+)'", policy) == digests


@pytest.mark.parametrize("name", KINDS)
def test_names_are_text(name: str) -> None:
    """A hostile name adds no element and no attribute, and is shown as it is written."""
    safe, attacked = page(golden(name)), page(hostile(name))

    tags = {tag for tag, _ in safe.elements} | {"pre"}  # what follows a failure's first line
    assert {tag for tag, _ in attacked.elements} | {"pre"} == tags
    assert {k for _, a in attacked.elements for k in a} == {k for _, a in safe.elements for k in a}
    assert "<img src=x onerror=window.hit=1>" in attacked.text
    assert "{{7*7}}" in attacked.text
    assert "\\x1b[31m\\u202e" in attacked.text
    assert "\x1b" not in attacked.text


@pytest.mark.parametrize("name", KINDS)
def test_labels_of_charts_hold_no_markup_and_no_template(name: str) -> None:
    """Plotly reads tags, entities and %{...} in labels; in a name they are all written out."""
    drawn = json.dumps(figures(page(hostile(name))))

    assert "<img" not in drawn
    assert "<a " not in drawn
    assert "</script>" not in drawn
    assert "[red]%{x}" not in drawn
    if name != "diagnosis":  # of whose long names only the ends are drawn
        assert "[red]%&#123;x}&amp;lt;" in drawn


def test_the_data_block_cannot_end_early() -> None:
    """Inside a script element '<' may not stand: it could close it or begin a comment."""
    html = render_html(hostile("comparison"))
    block = re.search(
        r'<script type="application/json" id="figures">(.*?)</script>', html, re.DOTALL
    )

    assert block is not None
    assert "<" not in block[1]
    assert len(json.loads(block[1])) > 5


@pytest.mark.parametrize("name", KINDS)
def test_there_is_a_place_for_every_figure(name: str) -> None:
    """As many places as figures, each with a sentence for those who cannot see it."""
    found = page(golden(name))
    places = [a for _, a in found.elements if a.get("class") == "plot"]

    assert len(places) == len(figures(found))
    assert all(place["role"] == "img" and len(place["aria-label"] or "") > 20 for place in places)


@pytest.mark.parametrize("name", KINDS)
def test_every_figure_is_valid_for_plotly(name: str) -> None:
    """Plotly's own schema accepts every trace and layout, with the colours filled in."""
    graph_objects = pytest.importorskip("plotly.graph_objects")
    found = figures(page(golden(name)))

    def coloured(value: Any, key: str = "") -> Any:
        if isinstance(value, dict):
            return {k: coloured(v, k) for k, v in value.items()}
        if isinstance(value, list):
            return [coloured(v) for v in value]
        token = isinstance(value, str) and value.startswith("@")
        return "#123456" if token and "color" in key else value

    for figure in found:
        graph_objects.Figure(coloured(figure))
    assert found


def test_every_colour_is_defined_for_light_and_dark() -> None:
    """A token without a colour would draw black on black."""
    html = render_html(golden("comparison_bad"))
    style = re.search(r"<style>(.*?)</style>", html, re.DOTALL)
    assert style is not None
    light, dark = style[1].split("@media (prefers-color-scheme: dark)")[:2]
    used = set(re.findall(r'"@([a-z0-9_-]+)', html.split('id="figures">')[1].split("</script>")[0]))
    used |= set(re.findall(r"--swatch: var\(--([a-z0-9_-]+)\)", html))
    used |= {f"{prefix}m-{name}" for name in CATEGORIES for prefix in ("", "on-")}

    defined = set(re.findall(r"--([a-z0-9_-]+):", light))
    assert used - defined == set()
    assert set(re.findall(r"--([a-z0-9_-]+):", dark.split("* {")[0])) <= defined
    assert len(used) > 15


def test_writing_leaves_the_old_report_if_it_fails(tmp_path: Path) -> None:
    """A directory that cannot be written is an error of ours."""
    (tmp_path / "file").write_text("in the way")

    with pytest.raises(RunDirectoryError, match="cannot write"):
        write_html(golden("memory"), tmp_path / "file" / "report.html")


def test_the_file_is_written_whole(tmp_path: Path) -> None:
    """It ends with its last tag and says which characters it uses."""
    write_html(golden("memory"), tmp_path / "report.html")

    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert text.startswith("<!DOCTYPE html>")
    assert text.rstrip().endswith("</html>")
    assert '<meta charset="utf-8">' in text[:200]
