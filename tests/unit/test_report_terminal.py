"""The terminal report fits its width, survives a pipe, and obeys no name."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from narrowcast.report.outline import outline_of
from narrowcast.report.terminal import render_summary, render_terminal
from report_records import KINDS, golden, hostile, points


def rendered(record: Any, *, width: int = 80, terminal: bool = False, brief: bool = False) -> str:
    file = io.StringIO()
    colours = "truecolor" if terminal else None
    console = Console(file=file, width=width, force_terminal=terminal, color_system=colours)
    render = render_summary if brief else render_terminal
    render(record, console, points=points())
    return file.getvalue()


@pytest.mark.parametrize("width", [40, 80, 200])
@pytest.mark.parametrize("name", KINDS)
def test_no_line_is_wider_than_the_terminal(name: str, width: int) -> None:
    """Tables fold or split and pictures shrink, down to half of a usual terminal.

    Code alone goes on past the edge: what is copied has to run.
    """
    record = golden(name)
    code = [record.command, *record.code.splitlines()] if name == "plan" else []
    if name == "diagnosis":
        code = [*record.minimal_fp32.keep_fp32, *(cure.how for cure in record.remedies)]
    lines = rendered(record, width=width).splitlines()

    assert [line for line in lines if len(line) > width and line.rstrip() not in code] == []


@pytest.mark.parametrize("name", KINDS)
def test_a_pipe_gets_no_escape_codes(name: str) -> None:
    """What is not a terminal is not painted."""
    text = rendered(golden(name))

    assert "\x1b" not in text


def test_a_terminal_gets_colours() -> None:
    """The same report is painted where somebody looks at it."""
    assert "\x1b[" in rendered(golden("comparison"), terminal=True)


@pytest.mark.parametrize("name", KINDS)
def test_both_renderings_have_the_same_sections(name: str) -> None:
    """Each section of the outline has its heading in the terminal."""
    text = rendered(golden(name))

    missing = [s.title for s in outline_of(golden(name), points()).sections if s.title not in text]
    assert missing == []


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("terminal", [False, True])
def test_names_are_inert(name: str, terminal: bool) -> None:
    """Markup is printed as it stands; escapes and direction overrides are written out."""
    text = rendered(hostile(name), width=200, terminal=terminal)

    assert "[red]%{x}&lt;" in text
    assert "\\x1b[31m\\u202e" in text
    assert "\x1b[31m" not in text
    assert "\u202e" not in text


def test_the_verdict_is_printed_whole() -> None:
    """Word, estimate with interval and n, reason, and what was not tested, in the summary."""
    text = rendered(golden("comparison_bad"), brief=True)

    assert "fp16: FAILED" in text
    assert "-0.0213, 90% interval [-0.0237, -0.0188], n=5" in text
    assert "about 11 seeds would be needed" in text
    assert "What was not tested" in text
    assert "Machine and versions" not in text


def test_the_margin_and_the_interval_are_drawn() -> None:
    """The strip of differences has dots, a stroke for the mean, and both vertical lines."""
    lines = rendered(golden("comparison_bad"), width=100).splitlines()
    strip = next(line for line in lines if line.startswith("bf16 ") and "●" in line)

    assert strip.count("●") == 5
    assert {"━", "┃", "┊", "│"} <= set(strip)


def test_many_seeds_split_the_table_and_lose_none() -> None:
    """A table that does not fit is continued below, and each part names its rows."""
    text = rendered(golden("comparison"), width=60)

    assert all(f"seed {seed}" in text for seed in (11, 23, 42, 57, 91))
    assert "0.8633" in text


def test_a_long_table_says_how_much_it_left_out() -> None:
    """Nothing disappears silently: the page and the JSON have the rest."""
    record = golden("memory")
    many = type(record)(**{**vars(record), "modules": record.modules * 3})

    text = rendered(many)

    assert "... and 15 more rows" in text


def test_an_ascii_console_gets_ascii() -> None:
    """A console that cannot write blocks and dots gets signs that it can, and foreign names too."""
    raw = io.BytesIO()
    console = Console(file=io.TextIOWrapper(raw, encoding="ascii"), width=80)

    render_terminal(hostile("comparison_bad"), console)
    console.file.flush()

    text = raw.getvalue().decode("ascii")
    assert "o" * 2 in text
    assert "\\u202e" in text
