"""A record with gaps still has a report: what is missing or not finite breaks nothing."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import types
import typing
from collections.abc import Iterator
from typing import Any

import pytest
from rich.console import Console

from narrowcast.report.charts import figures_of
from narrowcast.report.outline import outline_of
from narrowcast.report.shapes import Chart
from narrowcast.report.terminal import render_terminal
from report_records import golden, points

# Fields that no run, arm or protocol can be without.
_NEEDED = {"arms", "seeds"}
# Records inside of others that are tried on their own.
_ELSEWHERE = {"memory"}


def variants(record: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the record with one field at a time emptied or made not finite, at every depth."""
    hints = typing.get_type_hints(type(record))
    for field in dataclasses.fields(record):
        value, name = getattr(record, field.name), f"{path}.{field.name}"
        for odd in odd_values(hints[field.name], value):
            if field.name not in _NEEDED:
                yield f"{name} = {odd!r}", dataclasses.replace(record, **{field.name: odd})
        first = value[0] if isinstance(value, tuple) and value else value
        if dataclasses.is_dataclass(first) and field.name not in _ELSEWHERE:
            for label, changed in variants(first, name):
                whole = (changed, *value[1:]) if isinstance(value, tuple) else changed
                yield label, dataclasses.replace(record, **{field.name: whole})


def odd_values(hint: Any, value: Any) -> list[Any]:
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    found: list[Any] = [None] if type(None) in kinds and value is not None else []
    found += [math.nan, math.inf] if float in kinds else []
    found += [0] if int in kinds else []
    found += [""] if hint is str else []
    found += [()] if any(Ellipsis in typing.get_args(kind) for kind in kinds) else []
    found += [{}] if dict in map(typing.get_origin, kinds) else []
    if isinstance(value, tuple) and value and all(isinstance(v, float) for v in value):
        found += [(math.nan,) * len(value), (math.inf,) * len(value)]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", ["comparison", "run", "memory"])
def test_no_gap_in_a_record_breaks_its_report(name: str) -> None:
    """Each field in turn is None, empty, zero, NaN or infinite; both renderings still work."""
    tried, steps = 0, points()[:20]
    for label, record in variants(golden(name)):
        tried += 1
        try:
            outline = outline_of(record, steps)
            charts = [b for s in outline.sections for b in s.blocks if isinstance(b, Chart)]
            json.dumps([figures_of(chart) for chart in charts], allow_nan=False)
            render_terminal(record, Console(file=io.StringIO(), width=80))
        except Exception as error:
            raise AssertionError(f"no report with {label}") from error

    assert tried > 20


@pytest.mark.parametrize("n", [0, 1, 2])
def test_a_run_that_has_just_begun_has_a_report(n: int) -> None:
    """run.json is written before the first step; curves may have no point, or one."""
    record = dataclasses.replace(
        golden("run"), status="running", completed_steps=n, applied_steps=n, evaluations=(),
        final_loss=None, peak_bytes=None, memory=None, step_seconds=None, samples_per_second=None,
        skipped=(), skipped_steps=0, executed_dtypes={}, precision_honoured=None, finished="",
    )  # fmt: skip
    out = io.StringIO()

    render_terminal(record, Console(file=out, width=80), points=points()[:n])

    assert "fashion in fp16: running" in out.getvalue()
    assert f"{n} of 400 steps" in out.getvalue()


def test_a_comparison_of_one_seed_claims_nothing() -> None:
    """One run an arm has a difference but no interval, and the report shows n=1."""
    record = golden("comparison")
    one = dataclasses.replace(
        record.verdicts[0], verdict="INCONCLUSIVE", interval=None, paired_interval=None,
        unpaired_interval=None, correlation=None, n=1, differences=(0.001,), smallest_margin=None,
    )  # fmt: skip
    record = dataclasses.replace(record, verdicts=(one, *record.verdicts[1:]))

    out = io.StringIO()
    render_terminal(record, Console(file=out, width=80))

    assert "-0.00068, no interval, n=1" in out.getvalue()
