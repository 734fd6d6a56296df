"""What the report of a plan says, on a terminal and on a page."""

from __future__ import annotations

from dataclasses import replace

from rich.console import Console

from narrowcast.records.codec import dumps, loads
from narrowcast.records.plan import PlanRecord
from narrowcast.report.charts import figures_of
from narrowcast.report.html import render_html
from narrowcast.report.outline import outline_of
from narrowcast.report.shapes import Chart, Prose, Table
from narrowcast.report.terminal import render_terminal
from report_records import golden, hostile


def chart_of(record: PlanRecord) -> Chart:
    section = next(s for s in outline_of(record).sections if s.key == "frontier")
    return next(b for b in section.blocks if isinstance(b, Chart))


def test_a_plan_comes_back_from_json() -> None:
    """A plan file is a record like any other."""
    record = golden("plan")

    assert loads(PlanRecord, dumps(record)) == record


def test_the_chart_shows_frontier_choice_and_budget() -> None:
    """Memory to the right, time upwards, the chosen point named, the budget a line."""
    record = golden("plan")

    (figure,) = figures_of(chart_of(record))

    (curve,) = figure["data"]
    assert curve["x"] == [point.predicted_bytes for point in record.frontier]
    assert curve["y"] == [point.seconds for point in record.frontier]
    assert curve["mode"] == "lines+markers"
    line = next(s for s in figure["layout"]["shapes"] if s["type"] == "line")
    assert line["x0"] == line["x1"] == record.budget_bytes
    mark = figure["layout"]["annotations"][0]
    assert (mark["x"], mark["y"]) == (record.chosen.predicted_bytes, record.chosen.seconds)
    assert [note["text"] for note in figure["layout"]["annotations"]] == ["chosen", "budget"]


def test_the_horizontal_axis_is_in_binary_bytes_and_holds_the_budget() -> None:
    """A budget beyond every plan is in the picture too."""
    record = replace(golden("plan"), budget_bytes=2**30)

    (figure,) = figures_of(chart_of(record))

    low, high = figure["layout"]["xaxis"]["range"]
    assert low <= 0 < record.budget_bytes < high
    assert all(name.endswith(" MiB") for name in figure["layout"]["xaxis"]["ticktext"][1:])


def test_a_point_shows_its_plan_and_both_figures_when_asked() -> None:
    """Raw bytes and seconds stand nowhere."""
    (figure,) = figures_of(chart_of(golden("plan")))

    curve = figure["data"][0]
    assert "%{x}" not in curve["hovertemplate"]
    assert "MiB" in curve["text"][0]
    assert "ms" in curve["text"][0]


def test_the_code_stays_as_it_is_in_both_renderings() -> None:
    """Indentation survives, and long lines are not broken on a terminal."""
    record = golden("plan")
    console = Console(width=60, file=open("/dev/null", "w"), record=True)  # noqa: PTH123, SIM115

    render_terminal(record, console)
    text = console.export_text()
    console.file.close()

    for line in record.code.splitlines():
        assert line in text
    assert record.command in text
    assert "    with engine.forward():" in render_html(record)


def test_what_was_not_measured_is_marked() -> None:
    """An estimate has a sign before it, and the sign is explained."""
    record = golden("plan")
    section = next(s for s in outline_of(record).sections if s.key == "frontier")

    table = next(b for b in section.blocks if isinstance(b, Table))
    notes = next(b for b in section.blocks if isinstance(b, Prose))
    for point, row in zip(record.frontier, table.rows, strict=True):
        assert row[2].startswith("~") == (point.speed != "measured")
    assert any("(~)" in line for line in notes.lines)


def test_every_effect_is_told_with_whether_it_is_exact() -> None:
    """What the plan changes stands in the first section."""
    record = golden("plan")

    table = next(b for b in outline_of(record).sections[0].blocks if isinstance(b, Table))
    assert [row[2] for row in table.rows] == ["yes" if e.exact else "no" for e in record.effects]


def on_ranks() -> PlanRecord:
    """The golden plan, as one that four ranks share."""
    record = golden("plan")
    points = tuple(replace(point, parallel="fsdp2") for point in record.frontier)
    chosen = next(p for p, old in zip(points, record.frontier, strict=True) if old == record.chosen)
    ddp = replace(record.frontier[-1], parallel="ddp")
    return replace(record, world=4, frontier=(*points, ddp), chosen=chosen)


def test_of_ranks_it_is_said_how_many_and_how_they_share() -> None:
    """On a terminal and on a page: beside each plan, and the budget is that of a rank."""
    record = on_ranks()
    console = Console(width=100, file=open("/dev/null", "w"), record=True)  # noqa: PTH123, SIM115

    render_terminal(record, console)
    console.file.close()

    for text in (console.export_text(), render_html(record)):
        assert f"{record.chosen.name} by fsdp2 (chosen)" in text
        assert f"{record.frontier[-1].name} by ddp" in text
        assert "budget of a rank" in text
        assert "4 ranks" in text
    assert loads(PlanRecord, dumps(record)) == record


def test_names_from_a_file_cannot_become_markup() -> None:
    """A plan file may come from anybody."""
    page = render_html(hostile("plan"))

    assert "<img src=x" not in page
    assert "</script><script>window" not in page
