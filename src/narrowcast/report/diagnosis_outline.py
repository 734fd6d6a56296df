"""What a report says of a diagnosis: the verdict, the source with its values, cures, the fp32 set.

The picture of ranges holds what passes each module in fp32 against what the format can hold: a bar
from the smallest to the largest magnitude, and shaded on both sides what the format has not.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Sequence
from itertools import groupby

from narrowcast.formats import FORMATS, FloatFormat
from narrowcast.records.diagnosis import (
    DiagnosisRecord,
    ExecutedOp,
    Finding,
    Kind,
    MinimalFp32,
    ModuleRange,
    Phase,
    SourceLine,
)
from narrowcast.records.ranges import TensorRange
from narrowcast.report.parts import environment_facts, footer, options_text
from narrowcast.report.shapes import (
    Band,
    Block,
    Chart,
    Column,
    Facts,
    Listing,
    ListingLine,
    Outline,
    Prose,
    Section,
    Strip,
    StripPanel,
    Table,
    Tone,
)
from narrowcast.report.wording import count, number, plural, sentence, signed_bytes
from narrowcast.units import format_bytes, format_duration, format_percent

__all__ = ["outline_of_diagnosis"]

_TERMINAL_ROWS = 14
_MOST_STRIPS = 24
"""Modules in one picture: those nearest to the format's ends."""
_LONGEST_NAME = 32
_OPEN: tuple[Kind, ...] = ("inconclusive", "not reproducible", "not a precision problem")
_GOOD: tuple[Kind, ...] = ("fine", "nothing to diagnose")


def outline_of_diagnosis(record: DiagnosisRecord) -> Outline:
    """Lay out one diagnosis."""
    sections = (
        Section(key="verdict", title="The verdict", blocks=_verdict(record), brief=True),
        Section(key="source", title="The source, with its values", blocks=_source(record)),
        Section(key="ranges", title="What each module passes on", blocks=_ranges(record)),
        Section(key="cures", title="What cures it", blocks=_cures(record), brief=True),
        Section(
            key="smallest", title="The smallest set in fp32", blocks=_smallest(record), brief=True
        ),
        Section(key="run", title="How it was found", blocks=_run(record)),
    )
    place = f" at {record.finding.module}" if record.finding.module else ""
    return Outline(
        title=f"{record.recipe} in {record.precision}: {record.verdict}{place}",
        subtitle=f"Diagnosis of up to {plural(record.steps, 'step')}, seed {record.seed}",
        sections=tuple(section for section in sections if section.blocks),
        footer=footer(record.environment, record.started),
    )


def tone_of(verdict: Kind) -> Tone:
    """Return whether a verdict is good news, bad news or none."""
    return "holds" if verdict in _GOOD else "open" if verdict in _OPEN else "fails"


def _verdict(record: DiagnosisRecord) -> tuple[Block, ...]:
    finding = record.finding
    facts = [
        ("verdict", record.verdict),
        ("module", finding.module),
        ("operation", finding.op),
        ("line", _place(finding)),
        ("seen", record.symptom),
        ("in fp32", record.reference.removeprefix("fp32: ")),
    ]
    blocks: list[Block] = [
        Facts(pairs=tuple(pair for pair in facts if pair[1]), headline=False),
        Prose(lines=(sentence(finding.explanation),)),
    ]
    if finding.evidence:
        blocks.append(_evidence(finding.evidence))
    if record.others:
        blocks.append(Prose(lines=tuple(map(_other, record.others)), kind="list"))
    if record.notes:
        blocks.append(Prose(lines=record.notes, kind="list"))
    return tuple(blocks)


def _place(finding: Finding) -> str:
    if not finding.line:
        return ""
    return f"{finding.file}:{finding.line}  {finding.code}".rstrip()


def _other(finding: Finding) -> str:
    where = f" at {finding.module}" if finding.module else ""
    return f"also {finding.kind}{where}: {finding.explanation}"


def _evidence(events: Sequence[ExecutedOp]) -> Table:
    """List the accused operation and what fed it, in the order of execution."""
    return Table(
        caption="The operation and what fed it, in the order of execution",
        columns=(
            Column(title="operation"),
            Column(title="module"),
            Column(title="format"),
            Column(title="values"),
        ),
        rows=tuple(
            (
                event.op.removeprefix("aten.").removesuffix(".default"),
                event.module,
                event.outputs[0].dtype if event.outputs else "",
                "; ".join(map(_worded, event.outputs)),
            )
            for event in sorted(events, key=lambda event: event.index)
        ),
    )


def _worded(values: TensorRange | None) -> str:
    """Say what a tensor held: its largest and smallest magnitude, zeros, what is not finite."""
    if values is None or not values.numel:
        return ""
    bad = [f"{count(n)} {word}" for n, word in ((values.infs, "inf"), (values.nans, "NaN")) if n]
    if values.exponent_counts:
        said = f"{number(values.amin, 2)} to {number(values.amax, 3)}"
    else:
        said = "" if bad else "all 0"
    return ", ".join(part for part in (said, *bad) if part)


def _brief(values: TensorRange | None) -> str:
    """Say what is not finite, or else the magnitudes."""
    said = _worded(values)
    return said if values is None or values.is_finite else said.partition(", ")[2] or said


def _source(record: DiagnosisRecord) -> tuple[Block, ...]:
    """Set the source beside what its lines gave, a listing for each file."""
    if not record.lines:
        return ()
    scale = "" if record.scale == 1 else f", which hold the loss scale of {number(record.scale, 3)}"
    words = (
        "Beside each line: the smallest and the largest magnitude that it gave in the replayed "
        f"step, and that of the gradients that went back through it{scale}; or how many of its "
        "values are not finite."
    )
    intro = Prose(lines=(words,))
    listings = [
        Listing(
            file=file,
            columns=("forward", "backward"),
            lines=tuple(map(_line, lines)),
        )
        for file, lines in groupby(record.lines, key=lambda line: line.file)
    ]
    return (intro, *listings)


def _line(line: SourceLine) -> ListingLine:
    broken = any(v is not None and not v.is_finite for v in (line.forward, line.backward))
    return ListingLine(
        number=line.line,
        code=line.code,
        beside=(_brief(line.forward), _brief(line.backward)),
        tone="fails" if line.accused else "open" if broken else None,
    )


def _ranges(record: DiagnosisRecord) -> tuple[Block, ...]:
    """Draw what crossed the borders of the modules against the format that was computed in."""
    form = FORMATS.get(record.compute)
    if not record.ranges or form is None:
        return ()
    panels = [
        _panel(record, phase, form)
        for phase in ("forward", "backward")
        if any(each.phase == phase for each in record.ranges)
    ]
    chart = Chart(
        key="ranges",
        title=f"Values by module, against {form.name}",
        summary=f"{form.name} holds {number(form.smallest_subnormal, 2)} to "
        f"{number(form.max, 5)}; below {number(form.tiny, 2)} it has fewer bits. Bars are what the "
        "step gives in fp32, from the smallest to the largest magnitude; strokes are root mean "
        "squares.",
        panels=tuple(panels),
        beside=False,
    )
    return (chart, _ranges_table(record))


def _panel(record: DiagnosisRecord, phase: Phase, form: FloatFormat) -> StripPanel:
    """Draw one pass; gradients are shown unscaled, so the format's ends move with the scale."""
    scale = record.scale if phase == "backward" else 1.0
    ends = [math.log2(end / scale) for end in (form.smallest_subnormal, form.max)]
    shown = sorted(
        (each for each in record.ranges if each.phase == phase),
        key=lambda each: -_nearness(each.values, *ends),
    )[:_MOST_STRIPS]
    order = [each for each in record.ranges if any(each is kept for kept in shown)]
    if phase == "backward":
        order.reverse()  # as the modules stand in the forward pass
    title = "forward: outputs"
    if phase == "backward":
        title = "backward: gradients of outputs, unscaled"
        title += f"; the format at loss scale {number(scale, 3)}" if scale != 1 else ""
    return StripPanel(
        title=title,
        x_title="magnitude",
        unit="power",
        strips=tuple(_strip(each, ends[1]) for each in order),
        limit=(ends[1], f"largest {form.name}"),
        bands=(
            Band(start=None, end=ends[0], label=f"0 in {form.name}", shade="harm"),
            Band(start=ends[1], end=None, label=f"infinite in {form.name}", shade="harm"),
        ),
    )


def _nearness(values: TensorRange, low: float, high: float) -> float:
    """Return how near a tensor comes to either end of the format; infinite for one beyond."""
    if not values.is_finite:
        return math.inf
    if not values.exponent_counts:
        return -math.inf
    return max(math.log2(values.amax) - high, low - math.log2(values.amin))


def _strip(each: ModuleRange, top: float) -> Strip:
    values = each.values
    name = _short(each.module or "(model)")
    if not values.exponent_counts:
        return Strip(label=f"{name}: {_worded(values)}", colour="p-fp16", dots=())
    low, high = math.log2(values.amin), math.log2(values.amax)
    return Strip(
        label=name,
        colour="fails" if high >= top else "p-fp16",
        dots=(("smallest", low), ("largest", high)),
        centre=math.log2(values.rms) if values.rms else None,
        centre_name="root mean square",
        interval=(low, high),
    )


def _short(name: str) -> str:
    """Cut a long name at its front, so that it fits beside a picture on a phone."""
    return name if len(name) <= _LONGEST_NAME else f"...{name[3 - _LONGEST_NAME :]}"


def _ranges_table(record: DiagnosisRecord) -> Table:
    return Table(
        caption="What crosses the border of each module in fp32",
        columns=(
            Column(title="module"),
            Column(title="pass"),
            Column(title="format"),
            Column(title="magnitudes"),
            Column(title="zeros", numeric=True),
        ),
        rows=tuple(
            (
                each.module or "(model)",
                each.phase,
                each.values.dtype,
                _worded(each.values),
                f"{each.values.zeros / each.values.numel:.0%}" if each.values.numel else "",
            )
            for each in record.ranges
        ),
        terminal_rows=_TERMINAL_ROWS,
    )


def _cures(record: DiagnosisRecord) -> tuple[Block, ...]:
    """List the cures that were tried on the replayed step."""
    if not record.remedies:
        return ()
    table = Table(
        caption="Each was tried on the step that fails; the cheapest that works comes first",
        columns=(
            Column(title="cure"),
            Column(title="works"),
            Column(title="memory", numeric=True),
            Column(title="time", numeric=True),
            Column(title="what the step gave"),
        ),
        rows=tuple(
            (
                cure.name,
                "yes" if cure.works else "no",
                signed_bytes(cure.memory_bytes),
                "n/a" if cure.time_ratio is None else format_percent(cure.time_ratio),
                cure.outcome,
            )
            for cure in record.remedies
        ),
    )
    works = next((cure for cure in record.remedies if cure.works), None)
    if works is None:
        return (table,)
    return (
        table,
        Prose(lines=(f"{works.name}: {works.words}.",)),
        Prose(lines=(works.how,), kind="code"),
    )


def _smallest(record: DiagnosisRecord) -> tuple[Block, ...]:
    found = record.minimal_fp32
    if found is None:
        return ()
    blocks: list[Block] = [
        Prose(lines=tuple(_set_in_words(found))),
        Prose(lines=found.keep_fp32, kind="code"),
        Table(
            caption="Proof: each one given back to low precision alone",
            columns=(Column(title="dropped"), Column(title="fails"), Column(title="what it gave")),
            rows=tuple((d.module, "yes" if d.failed else "no", d.outcome) for d in found.dropped),
        ),
    ]
    if found.trainings:
        blocks.append(
            Table(
                caption="Short trainings with the set in fp32",
                columns=(Column(title="seed", numeric=True), Column(title="steps", numeric=True),
                         Column(title="works"), Column(title="what it gave")),
                rows=tuple(
                    (str(t.seed), count(t.steps), "yes" if t.works else "no", t.outcome)
                    for t in found.trainings
                ),
            )
        )  # fmt: skip
    if found.policy_file and record.typed:
        command = f"narrowcast train {record.typed} --policy {shlex.quote(found.policy_file)}"
        blocks.append(Prose(lines=(command,), kind="code"))
    return tuple(blocks)


def _set_in_words(found: MinimalFp32) -> Iterator[str]:
    single = f" ({plural(len(found.operations), 'single function')})" if found.operations else ""
    price = "" if found.memory_bytes is None else f", for {format_bytes(found.memory_bytes)}"
    yield (
        f"Of {count(found.candidates)} modules, {count(len(found.modules))} must stay in fp32"
        f"{single}{price}; found with {plural(found.oracle_calls, 'replay')}."
    )
    if found.unique:
        yield "It is the only one of its kind: every set that works holds all of it."
    elif found.unique is False:
        others = "; or ".join(", ".join(names) for names in found.alternatives)
        yield f"It is not the only one: {others} would do instead."


def _run(record: DiagnosisRecord) -> tuple[Block, ...]:
    facts = Facts(
        pairs=(
            ("recipe", record.recipe),
            ("options", options_text(record.options)),
            ("precision", record.precision),
            ("steps allowed", count(record.steps)),
            ("failed at step", "none" if record.failed_at is None else count(record.failed_at)),
            ("took", format_duration(record.seconds)),
        )
    )
    return (facts, environment_facts(record.environment, command=record.command))
