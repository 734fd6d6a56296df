"""What a report says: all that a reader must see, in the same places whatever the news is."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from narrowcast.records.comparison import ComparisonRecord
from narrowcast.records.memory import CATEGORIES
from narrowcast.records.run import StepPoint
from narrowcast.report.outline import outline_of
from narrowcast.report.shapes import (
    BarPanel,
    Chart,
    Facts,
    LinePanel,
    Outline,
    Prose,
    StripPanel,
    Table,
    Verdict,
    Verdicts,
)
from narrowcast.report.thinning import thinned
from report_records import golden, points


def blocks(outline: Outline, section: str) -> tuple[Any, ...]:
    return next(s.blocks for s in outline.sections if s.key == section)


def chart(outline: Outline, key: str) -> Chart:
    return next(
        b for s in outline.sections for b in s.blocks if isinstance(b, Chart) and b.key == key
    )


def verdicts(outline: Outline) -> tuple[Verdict, ...]:
    return next(b.verdicts for b in blocks(outline, "verdict") if isinstance(b, Verdicts))


def main_table(outline: Outline) -> Table:
    return next(b for b in blocks(outline, "verdict") if isinstance(b, Table))


def warnings(outline: Outline, section: str) -> tuple[str, ...]:
    found = [b for b in blocks(outline, section) if isinstance(b, Prose) and b.kind == "warning"]
    return tuple(line for b in found for line in b.lines)


def test_the_verdict_and_what_was_not_tested_come_first() -> None:
    """They are also the summary that a command prints when it ends."""
    outline = outline_of(golden("comparison"))

    assert [s.key for s in outline.sections][:2] == ["verdict", "not-tested"]
    assert [s.key for s in outline.sections if s.brief] == ["verdict", "not-tested"]


def test_good_and_bad_news_have_the_same_layout() -> None:
    """The same sections, kinds of blocks and facts, in the same order."""
    layouts = []
    for name in ("comparison", "comparison_bad"):
        outline = outline_of(golden(name))
        kinds = [type(b).__name__ for b in blocks(outline, "verdict")]
        facts = {tuple(fact for fact, _ in v.facts) for v in verdicts(outline)}
        layouts.append(([s.key for s in outline.sections], kinds, facts))

    assert layouts[0] == layouts[1]
    assert len(layouts[0][2]) == 1


def test_quality_memory_and_time_stand_in_one_table() -> None:
    """Each arm has its row: verdict, mean, estimate with interval and n, memory, time, skips."""
    table = main_table(outline_of(golden("comparison")))

    assert [row[0] for row in table.rows] == ["fp32", "fp16", "bf16"]
    assert table.rows[1] == (
        "fp16", "NON-INFERIOR", "0.8629", "-0.0007 [-0.0026, +0.0012] n=5", "56.0 MiB (-24.3%)",
        "46.8 ms (+13.6%)", "15 of 2,000",
    )  # fmt: skip


def test_an_estimate_is_never_without_its_interval_and_n() -> None:
    """Every difference that the report shows is one string with all three."""
    outline = outline_of(golden("comparison_bad"))
    shown = [v.estimate for v in verdicts(outline)]
    shown += [row[3] for row in main_table(outline).rows[1:]]
    shown += [text for v in verdicts(outline) for name, text in v.facts if "paired" in name]

    assert len(shown) == 12
    assert [text for text in shown if "n=" not in text or "[" not in text] == []


def test_no_p_value_is_shown() -> None:
    """A bare p is never printed: it is in the JSON, beside what it means."""
    record = golden("comparison")
    marked = replace(
        record, verdicts=tuple(replace(v, p_value=0.031415, p_value_holm=0.027182)
                               for v in record.verdicts),
    )  # fmt: skip

    assert "31415" not in repr(outline_of(marked))
    assert "27182" not in repr(outline_of(marked))


def test_every_run_is_a_dot_and_a_diverged_one_is_counted() -> None:
    """Five seeds, of which two diverged in fp16: three dots, and the label says two diverged."""
    outline = outline_of(golden("comparison_bad"))

    panel = chart(outline, "quality").panels[0]
    assert isinstance(panel, StripPanel)
    strip = panel.strips[1]
    assert (strip.label, len(strip.dots)) == ("fp16 (2 diverged)", 3)
    assert any("seeds 23, " in line for line in warnings(outline, "quality"))


def test_a_failure_is_told_once_for_all_its_seeds() -> None:
    """Its lines are laid out below, and the hint is the last of them."""
    record = golden("comparison_bad")
    failing = "raised at step 1: it broke\n  File x, line 1\nhint: mend it"
    arms = tuple(
        replace(arm, failures=tuple(f"seed {seed}: {failing}" for seed in arm.diverged))
        for arm in record.arms
    )
    seeds = next(arm.diverged for arm in arms if len(arm.diverged) == 2)

    shown = [b for b in blocks(outline_of(replace(record, arms=arms)), "quality")
             if isinstance(b, Prose)]  # fmt: skip

    named = ", ".join(map(str, seeds))
    assert [(b.kind, b.lines) for b in shown if any("fp16" in line for line in b.lines)] == [
        ("warning", (f"fp16, seeds {named}: raised at step 1: it broke",))
    ]
    assert [b.lines for b in shown[1:3]] == [("  File x, line 1",), ("hint: mend it",)]


@pytest.mark.parametrize(("direction", "limit"), [("higher", -0.01), ("lower", 0.01)])
def test_the_margin_lies_on_the_side_of_harm(direction: str, limit: float) -> None:
    """For accuracy harm is to the left, for loss to the right; beyond the margin it is shaded."""
    record = golden("comparison")
    record = replace(record, protocol=replace(record.protocol, direction=direction))

    panel = chart(outline_of(record), "differences").panels[0]

    assert isinstance(panel, StripPanel)
    assert panel.limit == (limit, "margin")
    assert (panel.bands[0].start, panel.bands[0].end) == (
        (None, limit) if limit < 0 else (limit, None)
    )


def without_margin(record: ComparisonRecord) -> ComparisonRecord:
    return replace(
        record,
        protocol=replace(record.protocol, margin=None, margin_text=""),
        verdicts=tuple(replace(v, verdict="NO MARGIN", margin=None) for v in record.verdicts),
    )


def test_without_a_margin_there_is_no_verdict_and_no_line() -> None:
    """The report says that none was fixed and what the data could support."""
    outline = outline_of(without_margin(golden("comparison")))

    question = blocks(outline, "verdict")[0]
    assert "No margin was fixed beforehand" in question.lines[0]
    assert {v.word for v in verdicts(outline)} == {"NO MARGIN"}
    assert dict(verdicts(outline)[0].facts)["smallest margin these data support"] == "0.00257"
    assert chart(outline, "differences").panels[0].limit is None


def test_a_run_outside_its_precision_is_reported_as_such() -> None:
    """An arm whose operations did not execute as asked is a warning beside the verdict."""
    record = golden("comparison")
    arms = list(record.arms)
    arms[2] = replace(arms[2], precision_honoured=False, precision_notes=("matmul ran in fp32",))

    outline = outline_of(replace(record, arms=tuple(arms)))

    assert any("bf16" in w and "matmul ran in fp32" in w for w in warnings(outline, "verdict"))
    table = next(b for b in blocks(outline, "dtypes") if isinstance(b, Table))
    assert table.rows[-1] == ("as asked", "yes", "yes", "NO")


def test_arms_that_saw_different_data_are_told() -> None:
    """Hashes of initial weights and data order that differ between arms are called a difference."""
    record = golden("comparison")
    arms = (*record.arms[:-1], replace(record.arms[-1], data_order_hashes=("ff",) * 5))

    facts = dict(blocks(outline_of(replace(record, arms=arms)), "protocol")[0].pairs)

    assert facts["same initial weights"].startswith("yes")
    assert facts["same data order"].startswith("NO")


def test_the_protocol_and_its_hash_are_printed_whole() -> None:
    """A reader can compare the hash with the one in protocol.json."""
    record = golden("comparison")

    facts = dict(blocks(outline_of(record), "protocol")[0].pairs)

    assert facts["protocol's SHA-256"] == record.protocol.hash
    assert facts["seeds"] == "11, 23, 42, 57, 91"
    assert facts["noise floor"].endswith("0.00110")


def test_only_arms_with_loss_scaling_have_a_curve_of_it() -> None:
    """The others are named in a sentence, so that none seems forgotten."""
    outline = outline_of(golden("comparison"))

    assert [p.title for p in chart(outline, "scale").panels] == ["fp16"]
    prose = [b for b in blocks(outline, "skips") if isinstance(b, Prose)]
    assert prose[0].lines == ("Without loss scaling: fp32, bf16.",)


def test_memory_segments_follow_the_order_of_the_categories() -> None:
    """In every bar and legend, so that two reports can be laid beside each other."""
    panel = chart(outline_of(golden("comparison")), "memory").panels[0]

    assert isinstance(panel, BarPanel)
    order = list(CATEGORIES)
    for bar in panel.bars:
        places = [order.index(segment.group) for segment in bar.segments]
        assert places == sorted(places)
        assert sum(segment.value for segment in bar.segments) == bar.total


def test_the_timeline_shades_the_phases_of_the_step() -> None:
    """Forward, backward and optimizer follow one another without a gap."""
    panel = chart(outline_of(golden("comparison")), "timeline").panels[0]

    assert isinstance(panel, LinePanel)
    assert [band.shade for band in panel.bands] == ["forward", "backward", "optimizer"]
    assert [b.end for b in panel.bands[:-1]] == [b.start for b in panel.bands[1:]]


def test_a_comparison_without_measurements_still_has_a_report() -> None:
    """Runs that recorded no memory, time or curves leave those sections out."""
    record = golden("comparison")
    bare = tuple(
        replace(
            arm, peak_bytes=None, step_seconds=None, step_seconds_per_seed=(), memory_lines={},
            memory_timeline=(), curves=(), executed_dtypes={}, metric_means={}, metric_sds={},
        )
        for arm in record.arms
    )  # fmt: skip

    outline = outline_of(replace(record, arms=bare, control=None))

    assert "memory" not in [s.key for s in outline.sections]
    assert main_table(outline).rows[1][2:] == (
        "n/a", "-0.0007 [-0.0026, +0.0012] n=5", "n/a", "n/a", "15 of 2,000",
    )  # fmt: skip


def test_a_run_that_failed_says_so_first() -> None:
    """The failure is a warning in the first section, and the title says that it failed."""
    record = replace(golden("run"), status="failed", failure="loss is NaN from step 1 on")

    outline = outline_of(record)

    assert outline.title == "fashion in fp16: failed"
    assert warnings(outline, "result")[0] == "The run failed: loss is NaN from step 1 on"


def test_a_run_shows_both_evaluations_with_their_labels() -> None:
    """fp32 from the master weights and the training precision are two figures, never one."""
    facts = dict(blocks(outline_of(golden("run")), "result")[0].pairs)

    assert facts["accuracy, evaluated in fp32"] == "0.8625"
    assert facts["accuracy, evaluated in fp16"] == "0.8621"


def test_a_run_without_its_points_has_no_curves() -> None:
    """run.json alone still makes a report."""
    keys = [s.key for s in outline_of(golden("run")).sections]

    assert "curves" not in keys
    assert "metrics" in keys


def test_skipped_steps_are_marked_where_they_happened() -> None:
    """Each is a cross on the loss curve and a row with its reason and parameters."""
    outline = outline_of(golden("run"), points())

    panel = chart(outline, "loss").panels[0]
    assert isinstance(panel, LinePanel)
    series = panel.series[0]
    assert [series.x[i] for i in series.flags] == [1, 2, 201, 202]
    table = next(b for b in blocks(outline, "skips") if isinstance(b, Table))
    assert [row[0] for row in table.rows] == ["1", "2", "201", "202"]


def test_a_memory_report_lists_every_line_and_the_total() -> None:
    """In the record's words and order; the total is the record's own."""
    record = golden("memory")

    table = next(b for b in blocks(outline_of(record), "memory") if isinstance(b, Table))

    assert [row[0].replace(" ", "_") for row in table.rows[:-1]] == [
        line.category for line in record.lines
    ]
    assert table.rows[-1][:2] == ("total", "55.9 MiB")


def test_a_memory_report_tells_what_fp32_takes() -> None:
    """Autocast can take more than fp32 at a small batch; the report says so in its first lines."""
    record = golden("memory")
    found = replace(record.break_even, fp32_peak_bytes=record.total_peak_bytes // 2)

    prose = blocks(outline_of(replace(record, break_even=found)), "memory")[0]

    assert "The same step in fp32 takes 28.0 MiB (+100.0%)." in prose.lines
    assert any("Break-even with fp32 at batch 9.4" in line for line in prose.lines)


def test_allocator_figures_appear_only_where_there_is_an_allocator() -> None:
    """CUDA's requested, allocated and reserved bytes; a CPU has none of them."""
    record = golden("memory")
    on_cuda = replace(record, requested_bytes=1024, allocated_bytes=2048, reserved_bytes=4096)

    def facts(r: Any) -> list[Facts]:
        return [b for b in blocks(outline_of(r), "memory") if isinstance(b, Facts)]

    assert facts(record) == []
    assert [size for _, size in facts(on_cuda)[0].pairs] == ["1.00 KiB", "2.00 KiB", "4.00 KiB"]


def step(i: int, loss: float = 1.0, *, applied: bool = True) -> StepPoint:
    return StepPoint(
        step=i, loss=loss, loss_scale=1.0, gradient_norm=1.0, applied=applied, seconds=0.1,
        learning_rate=0.1,
    )  # fmt: skip


def test_short_curves_are_drawn_whole() -> None:
    """Up to the limit nothing is left out."""
    steps = [step(i) for i in range(2000)]

    assert thinned(steps) == tuple(steps)


def test_thinning_keeps_every_spike_skip_and_nan() -> None:
    """Of 100,000 points about 2,000 remain, among them each that is out of the ordinary."""
    odd = {
        777: step(777, 50.0),
        5555: step(5555, -50.0),
        60001: step(60001, applied=False),
        70003: step(70003, math.nan),
        99999: step(99999, 2.0),
    }
    steps = [odd.get(i, step(i)) for i in range(100_000)]

    kept = thinned(steps)

    assert {p.step for p in kept} >= {0, *odd}
    assert len(kept) <= 2100
    assert [p.step for p in kept] == sorted(p.step for p in kept)
