"""The pictures of a comparison: every run is drawn, and all runs in the same way."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from narrowcast.records.comparison import ArmRecord, ComparisonRecord, CurvePoint, VerdictRecord
from narrowcast.report.parts import category_legend, phase_bands, phase_legend, segments
from narrowcast.report.shapes import (
    Band,
    Bar,
    BarPanel,
    Block,
    Chart,
    Column,
    LinePanel,
    Prose,
    Series,
    Strip,
    StripPanel,
    Table,
)
from narrowcast.report.wording import (
    bytes_or_nothing,
    colour_of,
    estimate,
    listed,
    number,
    plural,
    run_values,
    seconds_or_nothing,
)

__all__ = ["curves", "differences", "loss_scale", "memory", "quality", "speed"]


def differences(record: ComparisonRecord) -> tuple[Block, ...]:
    """Draw each seed's difference from the reference, the interval, and the margin."""
    p = record.protocol
    strips = [_difference_strip(v, p.seeds) for v in record.verdicts]
    if record.control and record.control.differences:
        strips.append(
            Strip(
                label=f"{p.reference} perturbed",
                colour=colour_of("control"),
                dots=_dots(p.seeds, record.control.differences),
                hollow=True,
            )
        )
    strips = [s for s in strips if s.dots or s.centre is not None]
    if not strips:
        return ()
    margins = {v.margin for v in record.verdicts if v.margin is not None}
    edge = next(iter(margins)) if len(margins) == 1 else None
    limit = None if edge is None else edge if p.direction == "lower" else -edge
    panel = StripPanel(
        title="",
        x_title="← worse    better →" if p.direction == "higher" else "← better    worse →",
        unit="number",
        strips=tuple(strips),
        zero=p.reference,
        limit=None if limit is None else (limit, "margin"),
        bands=() if limit is None else (_harm_band(limit),),
    )
    said = "; ".join(
        f"{v.precision} {estimate(v.difference, v.interval, v.n)}" for v in record.verdicts
    )
    return (
        Chart(
            key="differences",
            title=f"Difference in {p.metric} from {p.reference}",
            summary=f"A dot is a seed, the bar the interval, the stroke the mean. {said}. "
            + ("" if limit is None else f"The margin lies at {number(limit, 3)}."),
            panels=(panel,),
        ),
    )


def _harm_band(limit: float) -> Band:
    below = limit < 0
    return Band(
        start=None if below else limit,
        end=limit if below else None,
        label="more harm than the margin allows",
        shade="harm",
    )


def _difference_strip(verdict: VerdictRecord, seeds: Sequence[int]) -> Strip:
    known = verdict.interval is not None and all(map(math.isfinite, verdict.interval))
    interval = verdict.interval if known else None
    return Strip(
        label=verdict.precision,
        colour=colour_of(verdict.precision),
        dots=_dots(seeds, verdict.differences),
        centre=verdict.difference,
        centre_name="mean difference",
        interval=interval,
    )


def _dots(seeds: Sequence[int], values: Sequence[float | None]) -> tuple[tuple[str, float], ...]:
    return tuple(
        (f"seed {seed}", value)
        for seed, value in zip(seeds, values, strict=False)
        if value is not None and math.isfinite(value)
    )


def quality(record: ComparisonRecord) -> tuple[Block, ...]:
    """Draw the metric of every run as a dot, in fp32 and in the training precision."""
    p = record.protocol
    arms = [(arm.precision, colour_of(arm.precision), arm) for arm in record.arms]
    if record.control:
        arms.append((f"{p.reference} perturbed", colour_of("control"), record.control.arm))
    panels = []
    for title, field in (
        ("evaluated in fp32", "metrics"),
        ("evaluated in the training precision", "training_precision_metrics"),
    ):
        strips = []
        for label, colour, arm in arms:
            values = getattr(arm, field).get(p.metric, ())
            lost = sum(value is None for value in values)
            mean = arm.metric_means.get(p.metric) if field == "metrics" else None
            strips.append(
                Strip(
                    label=f"{label} ({lost} diverged)" if lost else label,
                    colour=colour,
                    dots=_dots(arm.seeds, values),
                    centre=mean,
                    centre_name="mean",
                    hollow=colour == colour_of("control"),
                )
            )
        panels.append(
            StripPanel(title=title, x_title=p.metric, unit="number", strips=tuple(strips))
        )
    means = listed(
        f"{arm.precision} {number(arm.metric_means.get(p.metric))}" for arm in record.arms
    )
    return (
        Chart(
            key="quality",
            title=f"{p.metric} of every run",
            summary=f"A dot is a run, the stroke the mean over its seeds. Means: {means}.",
            panels=tuple(panels),
        ),
    )


def curves(record: ComparisonRecord) -> tuple[Block, ...]:
    """Draw the training loss of every run, one panel a precision on a common scale."""
    panels = tuple(_curve_panel(arm) for arm in record.arms if any(arm.curves))
    if not panels:
        return ()
    runs = sum(len(panel.series) for panel in panels)
    return (
        Chart(
            key="loss",
            title="Training loss",
            summary=f"{plural(runs, 'run')}, none smoothed: of long ones every n-th step and every "
            "skipped one, which is a cross.",
            panels=panels,
        ),
        _final_losses(record),
    )


def _final_losses(record: ComparisonRecord) -> Table:
    return Table(
        caption="Final training loss of every run",
        columns=(
            Column(title="precision"),
            *(Column(title=f"seed {seed}", numeric=True) for seed in record.protocol.seeds),
        ),
        rows=tuple(
            (arm.precision, *run_values(arm.final_losses, record.protocol.seeds))
            for arm in record.arms
        ),
    )


def _curve_panel(arm: ArmRecord) -> LinePanel:
    return LinePanel(
        title=arm.precision,
        x_title="step",
        unit="number",
        series=tuple(
            Series(
                name=f"{arm.precision}, seed {seed}",
                group=arm.precision,
                colour=colour_of(arm.precision),
                x=tuple(point.step for point in curve),
                y=tuple(map(_finite, (point.loss for point in curve))),
                flags=_skipped(curve),
            )
            for seed, curve in zip(arm.seeds, arm.curves, strict=False)
            if curve
        ),
    )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _skipped(curve: Sequence[CurvePoint]) -> tuple[int, ...]:
    return tuple(i for i, point in enumerate(curve) if not point.applied)


def loss_scale(record: ComparisonRecord) -> tuple[Block, ...]:
    """Draw the loss scale of the arms that have one; say which have none."""
    panels, without = [], []
    for arm in record.arms:
        if any(point.loss_scale != 1 for curve in arm.curves for point in curve):
            panel = _curve_panel(arm)
            series = tuple(
                replace(
                    one,
                    y=tuple(map(_finite, (point.loss_scale for point in curve))),
                    stepped=True,
                )
                for one, curve in zip(panel.series, filter(None, arm.curves), strict=True)
            )
            panels.append(replace(panel, unit="scale", series=series))
        elif any(arm.curves):
            without.append(arm.precision)
    blocks: list[Block] = []
    if panels:
        blocks.append(
            Chart(
                key="scale",
                title="Loss scale",
                summary="The loss scale of every run; a cross is a skipped step, after which the "
                "scale is lowered.",
                panels=tuple(panels),
            )
        )
    if without:
        blocks.append(Prose(lines=(f"Without loss scaling: {listed(without)}.",)))
    return tuple(blocks)


def memory(record: ComparisonRecord) -> tuple[Block, ...]:
    """Draw what the peak consists of in each precision, and how it builds up over a step."""
    held = [arm for arm in record.arms if arm.memory_lines and arm.peak_bytes is not None]
    blocks: list[Block] = []
    if held:
        said = listed(f"{arm.precision} {bytes_or_nothing(arm.peak_bytes)}" for arm in held)
        bars = tuple(
            Bar(label=arm.precision, segments=segments(arm.memory_lines), total=arm.peak_bytes or 0)
            for arm in held
        )
        blocks.append(
            Chart(
                key="memory",
                title="Memory at the peak of a training step",
                summary=f"What the peak consists of. Totals: {said}.",
                panels=(BarPanel(title="", unit="bytes", bars=bars),),
                legend=category_legend(*(arm.memory_lines for arm in held)),
            )
        )
    timed = [arm for arm in record.arms if arm.memory_timeline]
    if timed:
        blocks.append(
            Chart(
                key="timeline",
                title="Memory over one training step",
                summary="Live memory after each operation of one step: it rises while forward "
                "saves activations and falls as backward uses them up.",
                panels=tuple(_timeline_panel(arm) for arm in timed),
                legend=phase_legend(),
            )
        )
    return tuple(blocks)


def _timeline_panel(arm: ArmRecord) -> LinePanel:
    sizes = tuple(float(size) for _, size in arm.memory_timeline)
    return LinePanel(
        title=arm.precision,
        x_title="one training step, from left to right",
        x_figures=False,
        unit="bytes",
        series=(
            Series(
                name=arm.precision,
                group=arm.precision,
                colour=colour_of(arm.precision),
                x=tuple(float(i) for i in range(len(sizes))),
                y=sizes,
                details=tuple(
                    f"{phase}: {bytes_or_nothing(size)}" for phase, size in arm.memory_timeline
                ),
            ),
        ),
        bands=phase_bands([phase for phase, _ in arm.memory_timeline], range(len(sizes))),
    )


def speed(record: ComparisonRecord) -> tuple[Block, ...]:
    """Draw the step time of every run."""
    timed = [arm for arm in record.arms if any(arm.step_seconds_per_seed)]
    if not timed:
        return ()
    said = listed(f"{arm.precision} {seconds_or_nothing(arm.step_seconds)}" for arm in timed)
    strips = tuple(
        Strip(
            label=arm.precision,
            colour=colour_of(arm.precision),
            dots=_dots(arm.seeds, arm.step_seconds_per_seed),
            centre=arm.step_seconds,
            centre_name="all seeds",
        )
        for arm in timed
    )
    return (
        Chart(
            key="speed",
            title="Time of one training step",
            summary=f"A dot is the median step of one run, the stroke that of the arm: {said}.",
            panels=(StripPanel(title="", x_title="step time", unit="seconds", strips=strips),),
        ),
    )
