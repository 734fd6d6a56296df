"""What a report says of a plan: the choice and its reason, what it changes, what else there was."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from narrowcast.records.plan import SPEED_SOURCES, PlanPoint, PlanRecord, name_of
from narrowcast.report.parts import environment_facts, options_text
from narrowcast.report.shapes import (
    Block,
    Chart,
    Column,
    Facts,
    LegendEntry,
    LinePanel,
    Outline,
    Prose,
    Section,
    Series,
    Table,
)
from narrowcast.report.wording import bytes_or_nothing, plural, sentence
from narrowcast.units import format_bytes, format_duration

__all__ = ["outline_of_plan"]

_FRONTIER = "p-bf16"
_TERMINAL_ROWS = 16


def outline_of_plan(record: PlanRecord) -> Outline:
    """Lay out one plan."""
    chosen = record.chosen
    return Outline(
        title=f"{record.recipe} in {format_bytes(record.budget_bytes)}: {_name(chosen)}",
        subtitle=f"Plan for a budget, batch {record.batch_size}, on {_place(record)}",
        sections=(
            Section(key="plan", title="The plan", blocks=_plan(record), brief=True),
            Section(key="frontier", title="Memory against speed", blocks=_frontier(record)),
            Section(key="run", title="How to run it", blocks=_run(record), brief=True),
            Section(key="planning", title="How it was found", blocks=_planning(record)),
        ),
        footer=f"narrowcast {record.environment.narrowcast}, torch {record.environment.torch}",
    )


def _plan(record: PlanRecord) -> tuple[Block, ...]:
    chosen = record.chosen
    facts = (
        ("budget" if record.world == 1 else "budget of a rank", format_bytes(record.budget_bytes)),
        ("predicted peak", format_bytes(chosen.predicted_bytes)),
        ("measured peak", bytes_or_nothing(chosen.measured_bytes)),
        (f"a step ({chosen.speed})", format_duration(chosen.seconds)),
    )
    return (
        Prose(lines=(sentence(record.why),)),
        Facts(pairs=facts, headline=True),
        _effects(record) if record.effects else Prose(lines=("It changes nothing.",)),
    )


def _place(record: PlanRecord) -> str:
    return record.device if record.world == 1 else f"{record.world} ranks, {record.device}"


def _name(point: PlanPoint) -> str:
    return name_of(point.name, point.parallel)


def _effects(record: PlanRecord) -> Table:
    return Table(
        caption="What the plan changes",
        columns=(Column(title="axis"), Column(title="choice"), Column(title="exact"),
                 Column(title="what it does")),
        rows=tuple((e.axis, e.choice, _yes_no(e.exact), e.says) for e in record.effects),
    )  # fmt: skip


def _frontier(record: PlanRecord) -> tuple[Block, ...]:
    points = record.frontier
    return (
        Chart(
            key="frontier",
            title="Peak memory and seconds a step",
            summary=f"{plural(len(points), 'plan')} that no other beats in both memory and speed, "
            f"from {_worded(points[0])} to {_worded(points[-1])}; the budget is "
            f"{format_bytes(record.budget_bytes)}, the choice {_worded(record.chosen)}.",
            panels=(_panel(record),),
            legend=(
                LegendEntry(label="frontier", colour=_FRONTIER),
                LegendEntry(label="budget", colour="fails"),
            ),
        ),
        _table(points, record.chosen),
        Prose(lines=tuple(_sources(points)), kind="list"),
    )


def _sources(points: Sequence[PlanPoint]) -> Iterator[str]:
    """Say where the seconds in the table come from."""
    for source, means in SPEED_SOURCES.items():
        if any(point.speed == source for point in points):
            yield f"{source}{'' if source == 'measured' else ' (~)'}: {means}"


def _worded(point: PlanPoint) -> str:
    size, seconds = format_bytes(point.predicted_bytes), format_duration(point.seconds)
    return f"{_name(point)} ({size}, {seconds})"


def _seconds(point: PlanPoint) -> str:
    """Write a duration, and before one that was not measured that it is about so."""
    about = "" if point.speed == "measured" else "~"
    return about + format_duration(point.seconds)


def _yes_no(fact: bool) -> str:  # noqa: FBT001 -- it is the thing to be worded
    return "yes" if fact else "no"


def _panel(record: PlanRecord) -> LinePanel:
    points, chosen = record.frontier, record.chosen
    return LinePanel(
        title="",
        x_title="predicted peak",
        x_unit="bytes",
        unit="seconds",
        series=(
            Series(
                name="frontier",
                group="",
                colour=_FRONTIER,
                x=tuple(float(point.predicted_bytes) for point in points),
                y=tuple(point.seconds for point in points),
                dotted=True,
                details=tuple(f"{_worded(point)}, {point.speed}" for point in points),
            ),
        ),
        mark=(float(chosen.predicted_bytes), chosen.seconds, "chosen"),
        limit=(float(record.budget_bytes), "budget"),
    )


def _table(points: Sequence[PlanPoint], chosen: PlanPoint) -> Table:
    # A plan off the frontier can be chosen: within the noise, or for stores that round less.
    is_on_it = any(_is_same(point, chosen) for point in points)
    shown = points if is_on_it else sorted((*points, chosen), key=lambda point: point.seconds)
    return Table(
        caption="The frontier, the fastest first" + ("" if is_on_it else ", and the choice"),
        columns=(
            Column(title="plan"),
            Column(title="peak", numeric=True),
            Column(title="a step", numeric=True),
            Column(title="exact"),
        ),
        rows=tuple(
            (
                f"{_name(point)} (chosen)" if _is_same(point, chosen) else _name(point),
                format_bytes(point.predicted_bytes),
                _seconds(point),
                _yes_no(point.exact),
            )
            for point in shown
        ),
        terminal_rows=_TERMINAL_ROWS,
    )


def _is_same(point: PlanPoint, chosen: PlanPoint) -> bool:
    return (point.plan, point.parallel) == (chosen.plan, chosen.parallel)


def _run(record: PlanRecord) -> tuple[Block, ...]:
    return (
        Prose(lines=(record.command,), kind="code"),
        Prose(lines=("In a loop of your own:",)),
        Prose(lines=tuple(record.code.splitlines()), kind="code"),
    )


def _planning(record: PlanRecord) -> tuple[Block, ...]:
    facts = Facts(
        pairs=(
            ("plans to choose from", str(record.considered)),
            ("steps predicted", str(record.traced)),
            ("plans that took whole steps", str(record.measured)),
            ("differences that count as none", f"below {record.noise:.0%}"),
            ("precisions", ", ".join(record.precisions)),
            ("batch may be split", _yes_no(not record.keep_batch)),
            ("margin in the peak", format_bytes(record.margin_bytes)),
            ("planned in", format_duration(record.seconds)),
            ("options", options_text(record.options)),
        )
    )
    notes: tuple[Block, ...] = (Prose(lines=record.notes, kind="list"),) if record.notes else ()
    return (facts, *notes, environment_facts(record.environment, command=record.command))
