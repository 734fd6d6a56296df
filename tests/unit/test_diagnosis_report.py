"""What the report of a diagnosis says, on a terminal and on a page."""

from __future__ import annotations

import io
import math
from dataclasses import replace

import pytest
from rich.console import Console

from narrowcast.records.codec import dumps, loads
from narrowcast.records.diagnosis import DiagnosisRecord, Finding
from narrowcast.report.charts import figures_of
from narrowcast.report.diagnosis_outline import tone_of
from narrowcast.report.html import render_html
from narrowcast.report.outline import outline_of
from narrowcast.report.shapes import Chart, Listing, StripPanel, Table
from narrowcast.report.terminal import render_summary, render_terminal
from report_records import golden, hostile

CULPRIT = "encoder.block.1.layer.1.DenseReluDense.wo"


def blocks(record: DiagnosisRecord, kind: type) -> list:
    return [b for s in outline_of(record).sections for b in s.blocks if isinstance(b, kind)]


def printed(record: DiagnosisRecord, width: int = 120) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    render_terminal(record, console)
    return console.export_text()


def test_a_diagnosis_comes_back_from_json() -> None:
    """A record like any other."""
    record = golden("diagnosis")

    assert loads(DiagnosisRecord, dumps(record)) == record


def test_the_verdict_names_module_operation_and_line() -> None:
    """They stand in the title and in the first facts."""
    record = golden("diagnosis")
    text = printed(record)

    assert outline_of(record).title == f"t5_like_overflow in fp16: forward overflow at {CULPRIT}"
    assert record.finding.code in text
    assert f"{record.finding.file}:{record.finding.line}" in text


def test_the_accused_line_is_marked_and_shows_what_is_not_finite() -> None:
    """Every other line has its magnitudes."""
    record = golden("diagnosis")
    (listing,) = blocks(record, Listing)

    accused = [line for line in listing.lines if line.tone == "fails"]
    assert [line.number for line in accused] == [record.finding.line]
    assert "inf" in accused[0].beside[0]
    first = next(line for line in listing.lines if "embed_tokens" in line.code)
    assert " to " in first.beside[0]


def test_source_lines_are_in_order_and_gaps_are_shown() -> None:
    """A reader finds the places again in the file."""
    (listing,) = blocks(golden("diagnosis"), Listing)
    numbers = [line.number for line in listing.lines]

    assert numbers == sorted(set(numbers))
    assert "..." in printed(golden("diagnosis"))


def test_the_picture_shows_which_module_is_beyond_the_format() -> None:
    """In fp32 the culprit's outputs end right of fp16's largest number; its inputs do not."""
    record = golden("diagnosis")
    (chart,) = blocks(record, Chart)
    forward = chart.panels[0]
    assert isinstance(forward, StripPanel)
    assert forward.limit is not None
    top = forward.limit[0]

    by_name = {strip.label: strip for strip in forward.strips}
    assert top == math.log2(65504)
    culprit = by_name["..." + CULPRIT[-29:]]
    assert culprit.interval[1] > top
    assert culprit.colour == "fails"
    assert all(s.interval[1] < top for n, s in by_name.items() if n.endswith(("wi", ".o")))


def test_gradients_are_held_against_the_format_at_the_loss_scale() -> None:
    """They are unscaled, so the format's ends move the other way."""
    record = replace(golden("diagnosis"), scale=1024.0)
    (chart,) = blocks(record, Chart)
    backward = chart.panels[1]
    assert isinstance(backward, StripPanel)

    assert backward.limit[0] == pytest.approx(math.log2(65504) - 10)
    assert backward.bands[0].end == -24 - 10
    assert "1024" in backward.title or "1,024" in backward.title


def test_axes_name_powers_of_two() -> None:
    """A magnitude is read off as 2^k."""
    (chart,) = blocks(golden("diagnosis"), Chart)

    for figure in figures_of(chart):
        assert all(name.startswith("2^") for name in figure["layout"]["xaxis"]["ticktext"])


def test_the_proof_of_the_smallest_set_is_shown() -> None:
    """Each member, what it gave when dropped, and the trainings with it."""
    record = golden("diagnosis")
    tables = {table.caption: table for table in blocks(record, Table)}

    proof = tables["Proof: each one given back to low precision alone"]
    assert [row[:2] for row in proof.rows] == [(CULPRIT, "yes")]
    trainings = tables["Short trainings with the set in fp32"]
    assert [row[0] for row in trainings.rows] == ["0", "1", "2"]


def test_the_command_of_the_policy_file_is_shown_where_there_is_one() -> None:
    """Ready to be copied."""
    record = golden("diagnosis")
    written = replace(record.minimal_fp32, policy_file="runs/x/policy.json")

    without = printed(replace(record, minimal_fp32=replace(written, policy_file="")))

    assert "--policy" not in without
    assert "--set large=last --policy runs/x/policy.json" in printed(
        replace(record, minimal_fp32=written)
    )


def test_good_news_has_the_same_report_without_what_there_is_not() -> None:
    """No cures, no set, no source: no empty section."""
    record = golden("diagnosis")
    fine = replace(
        record,
        verdict="fine",
        finding=Finding(kind="fine", explanation="20 steps, nothing to see"),
        remedies=(),
        minimal_fp32=None,
        ranges=(),
        lines=(),
    )

    assert [section.key for section in outline_of(fine).sections] == ["verdict", "run"]
    assert "20 steps, nothing to see." in printed(fine)


@pytest.mark.parametrize(
    ("verdict", "tone"),
    [("fine", "holds"), ("forward overflow", "fails"), ("not a precision problem", "open"),
     ("inconclusive", "open"), ("lost updates", "fails"), ("nothing to diagnose", "holds")],
)  # fmt: skip
def test_a_verdict_has_its_tone(verdict: str, tone: str) -> None:
    """An accusation is red, an open question yellow."""
    assert tone_of(verdict) == tone


def test_the_summary_is_short() -> None:
    """At the end of the command: verdict, cures and the set."""
    console = Console(width=100, record=True, file=io.StringIO())
    render_summary(golden("diagnosis"), console)
    text = console.export_text()

    assert "The verdict" in text
    assert "What cures it" in text
    assert "With its values" not in text


def test_foreign_text_stays_text() -> None:
    """Names, source and messages are a user's."""
    page = render_html(hostile("diagnosis"))

    assert "<script>window.hit=1" not in page
    assert "<img src=x" not in page
