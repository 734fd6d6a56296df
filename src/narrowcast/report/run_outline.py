"""What a report says of one training: how it ended, what it cost, and what was skipped."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from narrowcast.records.run import AxisValue, Evaluation, RunRecord, StepPoint, policy_in
from narrowcast.report.memory_outline import memory_blocks, module_blocks
from narrowcast.report.parts import (
    environment_facts,
    failure_blocks,
    footer,
    not_as_asked,
    options_text,
)
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
    Unit,
)
from narrowcast.report.thinning import thinned
from narrowcast.report.wording import (
    NOTHING,
    bytes_or_nothing,
    colour_of,
    count,
    dtypes_text,
    listed,
    moment,
    number,
    plural,
    seconds_or_nothing,
    spaced,
    yes_no,
)
from narrowcast.units import format_bytes

__all__ = ["outline_of_run"]

_TERMINAL_SKIPS = 10
_TERMINAL_BORDERS = 20


def outline_of_run(record: RunRecord, points: Sequence[StepPoint] = ()) -> Outline:
    """Lay out one run; without `points` (``metrics.jsonl``) there are no curves."""
    kept = thinned(points)
    sections = (
        Section(key="result", title="Result", blocks=_result(record), brief=True),
        Section(key="curves", title="Training", blocks=_curves(record, points, kept)),
        Section(key="metrics", title="Evaluation", blocks=_evaluations(record)),
        Section(key="memory", title="Memory", blocks=_memory(record)),
        Section(key="skips", title="Skipped steps and loss scale", blocks=_skips(record, kept)),
        Section(key="dtypes", title="What really executed", blocks=_dtypes(record)),
        Section(
            key="borders",
            title=f"What crossed the borders of modules in step {count(record.watched_at)}",
            blocks=_borders(record),
        ),
        Section(key="asked", title="What was asked", blocks=(_asked(record),)),
        Section(
            key="environment",
            title="Machine and versions",
            blocks=(environment_facts(record.environment, command=record.command),),
        ),
    )
    return Outline(
        title=f"{record.recipe} in {record.precision}: {record.status}",
        subtitle=f"{count(record.completed_steps)} of {plural(record.planned_steps, 'step')}, seed "
        f"{record.seed}, on {record.environment.device_name}",
        sections=tuple(s for s in sections if s.blocks),
        footer=footer(record.environment, record.finished),
    )


def _result(record: RunRecord) -> tuple[Block, ...]:
    warnings = list(record.warnings)
    if record.precision_honoured is False:
        warnings += not_as_asked(record.precision_notes, record.warnings)
    pairs = [
        ("status", record.status),
        ("steps applied", f"{count(record.applied_steps)} of {count(record.planned_steps)}"),
        ("steps skipped", count(record.skipped_steps)),
        ("final training loss", number(record.final_loss)),
        *_last_metrics(record),
        ("peak memory", bytes_or_nothing(record.peak_bytes)),
        *_more_on_memory(record),
        ("step time", seconds_or_nothing(record.step_seconds)),
        ("samples per second", number(record.samples_per_second)),
        *((("compiled", record.compiled.words),) if record.compiled is not None else ()),
        ("executed as asked", yes_no(record.precision_honoured)),
        *(
            (f"{kind} executed in", dtypes_text(record.executed_dtypes[kind]))
            for kind in ("matmul", "conv", "attention", "rnn")  # what a precision is about
            if kind in record.executed_dtypes
        ),
    ]
    facts = Facts(pairs=tuple(pairs), headline=True)
    told = (Prose(lines=tuple(warnings), kind="warning"),) if warnings else ()
    return (facts, *_failure(record), *told)


def _failure(record: RunRecord) -> tuple[Block, ...]:
    if not record.failure:
        return ()
    kind = f" ({record.failure_kind})" if record.failure_kind else ""
    hint = f"\nhint: {record.failure_hint}" if record.failure_hint else ""
    return failure_blocks(f"The run failed{kind}: {record.failure}{hint}")


def _more_on_memory(record: RunRecord) -> list[tuple[str, str]]:
    """Give what the peak is held to, and the peaks of the ranks, where there are such."""
    found = []
    if record.budget_bytes is not None:
        found.append(("memory budget", format_bytes(record.budget_bytes)))
    if record.rank_peak_bytes:
        found.append(("peak memory by rank", listed(map(format_bytes, record.rank_peak_bytes))))
    return found


def _last_metrics(record: RunRecord) -> list[tuple[str, str]]:
    """Give the last value of each metric in each precision that it was evaluated in."""
    last = {evaluation.precision: evaluation for evaluation in record.evaluations}
    return [
        (f"{name}, evaluated in {precision}", number(value))
        for precision, evaluation in last.items()
        for name, value in evaluation.metrics.items()
    ]


def _curves(
    record: RunRecord, points: Sequence[StepPoint], kept: Sequence[StepPoint]
) -> tuple[Block, ...]:
    if not kept:
        return ()
    shown = (
        "every step is drawn"
        if len(kept) == len(points)
        else f"{count(len(kept))} of {count(len(points))} steps drawn, among them the extremes of "
        "every stretch"
    )
    last = next((p.loss for p in reversed(kept) if math.isfinite(p.loss)), None)
    loss = _chart(
        record, kept, lambda p: p.loss, key="loss", title="Training loss", crosses=True,
        summary=f"Not smoothed; {shown}; a cross is a skipped step. Last loss {number(last)}.",
    )  # fmt: skip
    norm = _chart(
        record, kept, lambda p: p.gradient_norm, key="norm", title="Gradient norm",
        summary="L2 norm of the unscaled gradients, before clipping; a skipped step has none.",
    )  # fmt: skip
    seconds = _chart(
        record, kept, lambda p: p.seconds, key="speed", title="Step time", unit="seconds",
        summary=f"Each step's time; the median is {seconds_or_nothing(record.step_seconds)}.",
    )  # fmt: skip
    rate = _chart(
        record, kept, lambda p: p.learning_rate, key="rate", title="Learning rate",
        summary="As the schedule set it for each step.",
    )  # fmt: skip
    return (loss, norm, seconds, rate)


def _chart(
    record: RunRecord,
    points: Sequence[StepPoint],
    value: Callable[[StepPoint], float],
    *,
    key: str,
    title: str,
    summary: str,
    unit: Unit = "number",
    crosses: bool = False,
) -> Chart:
    series = Series(
        name=record.precision,
        group=record.precision,
        colour=colour_of(record.precision),
        x=tuple(float(point.step) for point in points),
        y=tuple(value(p) if math.isfinite(value(p)) else None for p in points),
        stepped=unit == "scale",
        flags=tuple(i for i, p in enumerate(points) if not p.applied) if crosses else (),
    )
    panel = LinePanel(title="", x_title="step", unit=unit, series=(series,))
    return Chart(key=key, title=title, summary=summary, panels=(panel,))


def _evaluations(record: RunRecord) -> tuple[Block, ...]:
    if not record.evaluations:
        return ()
    precisions = list(dict.fromkeys(e.precision for e in record.evaluations))
    names = list(dict.fromkeys(name for e in record.evaluations for name in e.metrics))
    charts = tuple(_metric_chart(record.evaluations, name, precisions) for name in names)
    table = Table(
        caption="Every evaluation",
        columns=(
            Column(title="step"),
            Column(title="evaluated in"),
            *(Column(title=name, numeric=True) for name in names),
            Column(title="examples", numeric=True),
        ),
        rows=tuple(
            (
                count(e.step),
                e.precision,
                *(number(e.metrics.get(name)) for name in names),
                count(e.examples),
            )
            for e in record.evaluations
        ),
    )
    several = len({e.step for e in record.evaluations}) > 1
    return (*(charts if several else ()), table)


def _metric_chart(evaluations: Sequence[Evaluation], name: str, precisions: Sequence[str]) -> Chart:
    series = []
    for precision in precisions:
        held = [e for e in evaluations if e.precision == precision and name in e.metrics]
        series.append(
            Series(
                name=f"evaluated in {precision}",
                group=precision,
                colour=colour_of(precision),
                x=tuple(float(e.step) for e in held),
                y=tuple(e.metrics[name] if math.isfinite(e.metrics[name]) else None for e in held),
                dashed=precision != "fp32",
                dotted=True,
            )
        )
    last = listed(f"{number(one.y[-1])} {one.name}" for one in series if one.y)
    return Chart(
        key=f"metric-{name}",
        title=f"{name} over the run",
        summary=f"On the evaluation data. At the end: {last}.",
        panels=(LinePanel(title="", x_title="step", unit="number", series=tuple(series)),),
        legend=tuple(
            LegendEntry(label=one.name, colour=one.colour, group=one.group) for one in series
        ),
    )


def _memory(record: RunRecord) -> tuple[Block, ...]:
    if record.memory is None:
        return ()
    return (*memory_blocks(record.memory), *module_blocks(record.memory))


def _skips(record: RunRecord, kept: Sequence[StepPoint]) -> tuple[Block, ...]:
    blocks: list[Block] = []
    if any(point.loss_scale != 1 for point in kept):
        blocks.append(
            _chart(
                record, kept, lambda p: p.loss_scale, key="scale", title="Loss scale",
                summary="The factor on the loss; a cross is a skipped step, after which it is "
                "lowered.",
                unit="scale", crosses=True,
            )
        )  # fmt: skip
    elif kept:
        blocks.append(Prose(lines=(f"{record.precision} runs without loss scaling.",)))
    if not record.skipped:
        blocks.append(Prose(lines=("No optimizer step was skipped.",)))
        return tuple(blocks)
    rows = tuple(
        (count(s.step), s.reason, number(s.loss_scale), listed(s.parameters) or NOTHING)
        for s in record.skipped
    )
    blocks.append(
        Table(
            caption=f"Skipped steps ({len(rows)} of {record.skipped_steps} listed)",
            columns=(
                Column(title="step"),
                Column(title="reason"),
                Column(title="loss scale", numeric=True),
                Column(title="parameters with gradients that were not finite"),
            ),
            rows=rows,
            terminal_rows=_TERMINAL_SKIPS,
        )
    )
    return tuple(blocks)


def _dtypes(record: RunRecord) -> tuple[Block, ...]:
    if not record.executed_dtypes:
        return ()
    table = Table(
        caption="Operations of one training step, and the formats that they executed in",
        columns=(Column(title="operation"), Column(title="executed in")),
        rows=tuple(
            (spaced(kind), dtypes_text(calls))
            for kind, calls in sorted(record.executed_dtypes.items())
        ),
    )
    notes = record.precision_notes
    return (table, *((Prose(lines=notes, kind="list"),) if notes else ()))


def _borders(record: RunRecord) -> tuple[Block, ...]:
    if not record.watched:
        return ()
    rows = tuple(
        (
            border.module or "the model",
            border.phase,
            border.dtype,
            number(border.amax),
            number(border.amin),
            number(border.rms),
            f"{count(border.zeros)} of {count(border.numel)}",
            count(border.nonfinite),
        )
        for border in record.watched
    )
    titles = ("largest", "smallest above 0", "rms", "zeros", "NaN or infinite")
    table = Table(
        caption="Magnitudes of outputs (forward) and of their unscaled gradients (backward)",
        columns=(
            Column(title="module"),
            Column(title="phase"),
            Column(title="format"),
            *(Column(title=title, numeric=True) for title in titles),
        ),
        rows=rows,
        terminal_rows=_TERMINAL_BORDERS,
    )
    return (table,)


def _asked(record: RunRecord) -> Facts:
    policy = " ".join(
        f"{name}={value if isinstance(value, str) else listed(value) or 'none'}"
        for name, value in policy_in(record.plan).items()
    )
    shared = f"{plural(record.ranks, 'rank')}, {record.parallel}" if record.parallel else "alone"
    return Facts(
        pairs=(
            ("recipe", record.recipe),
            ("recipe file", record.recipe_path or NOTHING),
            ("SHA-256 of it", record.recipe_digest or NOTHING),
            ("options", options_text(record.options)),
            ("precision", record.precision),
            ("policy", policy),
            ("further axes of the plan", _axes_text(record.plan)),
            ("seed", str(record.seed)),
            *((("changed at the start", record.perturbation),) if record.perturbation else ()),
            ("steps", count(record.planned_steps)),
            ("batch size", f"{record.batch_size}, accumulated over {record.accumulate}"),
            ("gradient norm at most", number(record.clip_norm)),
            ("processes", shared),
            ("deterministic kernels only", "yes" if record.deterministic else "no"),
            ("resumed at", listed(record.resumed_at) or "never"),
            ("initial weights", record.initial_weights_hash or NOTHING),
            ("data order", record.data_order_hash or NOTHING),
            ("started", moment(record.started)),
            ("finished", moment(record.finished) if record.finished else NOTHING),
        )
    )


def _axes_text(plan: dict[str, AxisValue]) -> str:
    """Write the axes beside the policy: 'weights=split16 states=int8'."""

    def words(value: AxisValue) -> str:
        if not isinstance(value, list):
            return str(value)
        return listed(" ".join(map(str, each.values())) for each in value) or "none"

    axes = {name: value for name, value in plan.items() if name not in ("name", "policy")}
    return " ".join(f"{name}={words(value)}" for name, value in axes.items()) or NOTHING
