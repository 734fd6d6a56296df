"""What a report says of a comparison: the verdict, and what it does not cover, come first.

Quality, memory and step time stand in one table, because each is bought with the others; every
run is shown, the diverged ones too; and good and bad news get the same layout.
"""

from __future__ import annotations

from collections.abc import Iterator

from narrowcast.records.comparison import ArmRecord, ComparisonRecord, VerdictRecord
from narrowcast.report import comparison_charts as charts
from narrowcast.report.parts import (
    environment_facts,
    failure_blocks,
    footer,
    not_as_asked,
    options_text,
)
from narrowcast.report.shapes import (
    Block,
    Column,
    Facts,
    Outline,
    Prose,
    Section,
    Table,
    Verdict,
    Verdicts,
)
from narrowcast.report.wording import (
    MEANINGS,
    NOTHING,
    TONES,
    bytes_or_nothing,
    colour_of,
    count,
    dtypes_text,
    estimate,
    listed,
    moment,
    number,
    plural,
    relative,
    run_values,
    seconds_or_nothing,
    sentence,
    spaced,
    yes_no,
)

__all__ = ["outline_of_comparison"]


def outline_of_comparison(record: ComparisonRecord) -> Outline:
    """Lay out a comparison; the first sections are also its summary."""
    protocol = record.protocol
    sections = (
        Section(key="verdict", title="Verdict", blocks=_verdict(record), brief=True),
        Section(
            key="not-tested",
            title="What was not tested",
            blocks=(Prose(lines=record.untested, kind="list"),),
            brief=True,
        ),
        Section(key="quality", title="Quality, seed by seed", blocks=_quality(record)),
        Section(key="curves", title="Training", blocks=charts.curves(record)),
        Section(key="memory", title="Memory", blocks=charts.memory(record)),
        Section(key="speed", title="Speed", blocks=charts.speed(record)),
        Section(key="skips", title="Skipped steps and loss scale", blocks=_skips(record)),
        Section(key="dtypes", title="What really executed", blocks=_dtypes(record)),
        Section(key="protocol", title="Protocol", blocks=(_protocol(record),)),
        Section(
            key="environment",
            title="Machine and versions",
            blocks=(environment_facts(record.environment, command=record.command),),
        ),
    )
    return Outline(
        title=f"{protocol.recipe}: {_versus(record)}",
        subtitle=(
            f"{plural(len(protocol.seeds), 'seed')} of {plural(protocol.steps, 'step')} in each "
            f"precision on {record.environment.device_name}"
        ),
        sections=tuple(s for s in sections if s.blocks),
        footer=footer(record.environment, record.finished),
    )


def _versus(record: ComparisonRecord) -> str:
    return f"{_candidates(record, 'and')} against {record.protocol.reference}"


def _candidates(record: ComparisonRecord, conjunction: str) -> str:
    """Name the precisions that are judged: 'fp16, bf16 and bf16-true'."""
    *first, last = (arm for arm in record.protocol.arms if arm != record.protocol.reference)
    return f"{', '.join(first)} {conjunction} {last}" if first else last


def _verdict(record: ComparisonRecord) -> tuple[Block, ...]:
    blocks: list[Block] = []
    warnings = (*record.warnings, *_precision_warnings(record))
    blocks += [
        Prose(lines=(_question(record),)),
        _main_table(record),
        Verdicts(verdicts=tuple(_verdict_of(v, record) for v in record.verdicts)),
    ]
    if warnings:
        blocks.append(Prose(lines=warnings, kind="warning"))
    blocks += charts.differences(record)
    return tuple(blocks)


def _precision_warnings(record: ComparisonRecord) -> tuple[str, ...]:
    """Say of every arm that did not run in its precision that it did not."""
    return tuple(
        f"{arm.precision}: {text}"
        for arm in record.arms
        if arm.precision_honoured is False
        for text in not_as_asked(
            arm.precision_notes,
            [told for told in record.warnings if told.startswith(f"{arm.precision}: ")],
        )
    )


def _question(record: ComparisonRecord) -> str:
    p = record.protocol
    asked = (
        f"Is training in {_candidates(record, 'or')} worse than in {p.reference}, "
        f"by {p.metric} ({p.direction} is better)? "
        f"Every run was evaluated in {p.evaluation_precision}."
    )
    if p.margin is None:
        return f"{asked} No margin was fixed beforehand, so no verdict is given."
    when = f" on {moment(p.written)}" if p.written else ""
    return (
        f"{asked} A harm of up to {p.margin_text} was declared acceptable{when}, before the first "
        f"step (protocol {p.hash[:12]})."
    )


def _level(record: ComparisonRecord) -> str:
    """Name the two-sided interval that belongs to the protocol's one-sided bounds."""
    return f"{2 * record.protocol.confidence - 1:.0%}"


def _verdict_of(verdict: VerdictRecord, record: ComparisonRecord) -> Verdict:
    return Verdict(
        precision=verdict.precision,
        colour=colour_of(verdict.precision),
        word=verdict.verdict,
        tone=TONES[verdict.verdict],
        meaning=MEANINGS[verdict.verdict],
        estimate=estimate(verdict.difference, verdict.interval, verdict.n, _level(record)),
        why=sentence(verdict.why),
        facts=_verdict_facts(verdict, record),
    )


def _verdict_facts(v: VerdictRecord, record: ComparisonRecord) -> tuple[tuple[str, str], ...]:
    """List the same facts for every verdict; what does not exist is n/a, not left out."""
    seeds = len(record.protocol.seeds)
    margin = "none" if v.margin is None else number(v.margin, 3)
    rate = "" if v.failure_rate_upper is None else f"; rate at most {v.failure_rate_upper:.0%}"
    return (
        ("margin", margin),
        ("smallest margin these data support", number(v.smallest_margin, 3)),
        ("harm that could have been missed", number(v.detectable_harm, 3)),
        ("seeds needed to decide", NOTHING if v.n_needed is None else str(v.n_needed)),
        ("failed runs", f"{v.failed_runs} of {seeds}{rate}"),
        ("correlation of pairs", "n/a" if v.correlation is None else f"{v.correlation:.2f}"),
        ("paired", _beside(v, v.difference, v.paired_interval)),
        ("unpaired", _beside(v, v.difference, v.unpaired_interval)),
        (
            "own precision",
            _beside(v, v.training_precision_difference, v.training_precision_interval),
        ),
    )


def _beside(
    v: VerdictRecord, difference: float | None, interval: tuple[float, float] | None
) -> str:
    """Write an estimate that decides nothing, or that there is none."""
    return NOTHING if difference is None else estimate(difference, interval, v.n)


def _main_table(record: ComparisonRecord) -> Table:
    metric = record.protocol.metric
    columns = (
        Column(title="precision"),
        Column(title="verdict", verdict=True),
        Column(title=f"{metric}, mean", numeric=True),
        Column(title=f"difference, {_level(record)} interval, n", numeric=True),
        Column(title="peak memory", numeric=True),
        Column(title="step time", numeric=True),
        Column(title="skipped steps", numeric=True),
    )
    verdicts = {v.precision: v for v in record.verdicts}
    reference = record.arms[0]
    return Table(
        caption="Quality, memory and time of each precision",
        columns=columns,
        rows=tuple(_row(a, reference, verdicts.get(a.precision), record) for a in record.arms),
        colours=tuple(colour_of(arm.precision) for arm in record.arms),
        main=True,
    )


def _row(
    arm: ArmRecord, reference: ArmRecord, verdict: VerdictRecord | None, record: ComparisonRecord
) -> tuple[str, ...]:
    return (
        arm.precision,
        verdict.verdict if verdict else "reference",
        number(arm.metric_means.get(record.protocol.metric)),
        estimate(verdict.difference, verdict.interval, verdict.n)
        if verdict
        else f"n={len(arm.seeds) - len(arm.diverged)}",
        bytes_or_nothing(arm.peak_bytes) + relative(arm.peak_bytes, reference.peak_bytes),
        seconds_or_nothing(arm.step_seconds) + relative(arm.step_seconds, reference.step_seconds),
        f"{count(arm.skipped_steps)} of {count(arm.total_steps)}",
    )


def _quality(record: ComparisonRecord) -> tuple[Block, ...]:
    metric = record.protocol.metric
    names = [metric, *(m for m in record.arms[0].metrics if m != metric)]
    return (
        *charts.quality(record),
        *(_seed_table(record, name) for name in names),
        *(block for arm in record.arms for block in _failures(arm)),
    )


def _failures(arm: ArmRecord) -> Iterator[Block]:
    """Yield why runs have no value, each reason once with the seeds that ended for it."""
    seeds: dict[str, list[int]] = {}
    for seed, failure in zip(arm.diverged, arm.failures, strict=False):  # both as recorded
        seeds.setdefault(failure.removeprefix(f"seed {seed}: "), []).append(seed)
    for failure, members in seeds.items():
        which = f"seed{'' if len(members) == 1 else 's'} {listed(members)}"
        yield from failure_blocks(f"{arm.precision}, {which}: {failure}")


def _seed_table(record: ComparisonRecord, metric: str) -> Table:
    """Show the raw values, a row for each arm and precision of evaluation, a column a seed."""
    arms = [(arm.precision, arm) for arm in record.arms]
    if record.control:
        arms.append((f"{record.protocol.reference} perturbed", record.control.arm))
    seeds = record.protocol.seeds
    rows = []
    for label, arm in arms:
        mean, sd = arm.metric_means.get(metric), arm.metric_sds.get(metric)
        values, own = arm.metrics.get(metric, ()), arm.training_precision_metrics.get(metric, ())
        rows.append((label, "fp32", *run_values(values, seeds), number(mean), number(sd, 2)))
        if own and own != values:
            rows.append((label, arm.precision, *run_values(own, seeds), "", ""))
    heads = [*(f"seed {seed}" for seed in seeds), "mean", "sd"]
    return Table(
        caption=f"{metric}, run by run",
        columns=(
            Column(title="precision"),
            Column(title="evaluated in"),
            *(Column(title=head, numeric=True) for head in heads),
        ),
        rows=tuple(rows),
    )


def _skips(record: ComparisonRecord) -> tuple[Block, ...]:
    rows = tuple(
        (
            arm.precision,
            f"{count(arm.skipped_steps)} of {count(arm.total_steps)}",
            listed(arm.skipped_steps_per_seed) or NOTHING,
        )
        for arm in record.arms
    )
    table = Table(
        caption="Optimizer steps that were not applied",
        columns=(
            Column(title="precision"),
            Column(title="skipped", numeric=True),
            Column(title="per seed", numeric=True),
        ),
        rows=rows,
    )
    return (*charts.loss_scale(record), table)


def _dtypes(record: ComparisonRecord) -> tuple[Block, ...]:
    kinds = sorted({kind for arm in record.arms for kind in arm.executed_dtypes})
    rows = [
        (spaced(kind), *(dtypes_text(arm.executed_dtypes.get(kind, {})) for arm in record.arms))
        for kind in kinds
    ]
    rows.append(("as asked", *(yes_no(arm.precision_honoured) for arm in record.arms)))
    table = Table(
        caption="Operations of one training step, and the formats that they executed in",
        columns=(
            Column(title="operation"),
            *(Column(title=f"asked: {arm.precision}") for arm in record.arms),
        ),
        rows=tuple(rows),
    )
    notes = tuple(f"{arm.precision}: {n}" for arm in record.arms for n in arm.precision_notes)
    return (table, *((Prose(lines=notes, kind="list"),) if notes else ()))


def _protocol(record: ComparisonRecord) -> Facts:
    p, control = record.protocol, record.control
    pairs = [
        ("recipe", p.recipe),
        ("options", options_text(p.options)),
        ("metric", f"{p.metric}, {p.direction} is better, evaluated in {p.evaluation_precision}"),
        ("margin", p.margin_text or "none: no verdict"),
        ("confidence", f"{p.confidence:.0%} for each one-sided bound, a {_level(record)} interval"),
        ("horizon", plural(p.steps, "step")),
        ("seeds", listed(p.seeds)),
        ("arms", f"{listed(p.arms)}; reference {p.reference}"),
        ("training", options_text(p.training)),
        ("stopping", p.stopping),
        ("device", p.device),
        ("same initial weights", _agreement(record, "initial_weights_hashes")),
        ("same data order", _agreement(record, "data_order_hashes")),
        ("control", control.perturbation if control else "none"),
        ("control changed the loss", _changed(record)),
        ("noise floor", _noise(record)),
        ("recipe's SHA-256", p.recipe_digest or NOTHING),
        ("written", moment(p.written) if p.written else NOTHING),
        ("protocol's SHA-256", p.hash or NOTHING),
    ]
    return Facts(pairs=tuple(pairs))


def _agreement(record: ComparisonRecord, field: str) -> str:
    """Say whether the recorded hashes agree between all arms."""
    hashes = {getattr(arm, field) for arm in record.arms}
    if hashes == {()}:
        return "not recorded"
    return "yes, hashes equal in every arm" if len(hashes) == 1 else "NO, the arms' hashes differ"


def _changed(record: ComparisonRecord) -> str:
    if record.control is None:
        return NOTHING
    changed = record.control.loss_changed
    return f"on {sum(changed)} of {plural(len(changed), 'seed')}"


def _noise(record: ComparisonRecord) -> str:
    if record.control is None or record.control.sd_of_difference is None:
        return NOTHING
    what = f"{record.protocol.reference} against itself perturbed"
    return f"{what}: sd of difference {number(record.control.sd_of_difference, 3)}"
