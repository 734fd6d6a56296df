"""The report of a run leaves nothing of its record out."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from narrowcast.records.compilation import Compilation
from narrowcast.records.ranges import BorderRange
from narrowcast.records.run import RunRecord
from narrowcast.report.outline import outline_of
from narrowcast.report.shapes import Facts, Prose, Table
from report_records import golden

BORDER = BorderRange(
    module="blocks.0", phase="backward", dtype="fp16", numel=12, zeros=3, nonfinite=1, amax=2.0,
    amin=0.25, rms=1.0,
)  # fmt: skip
OTHER: dict[str, Any] = {
    "options": {"lr": 0.5},
    "plan": {"name": "mine", "policy": {"param": "bf16"}, "weights": "split16"},
    "clip_norm": 0.5,
    "parallel": "ddp",
    "rank_peak_bytes": (1 << 20, 3 << 20),
    "compiled": Compilation(backend="inductor", graphs=2),
    "deterministic": False,
    "status": "interrupted",
    "evaluations": (),
    "budget_bytes": 2 << 20,
    "memory": None,
    "skipped": (),
    "executed_dtypes": {"matmul": {"fp32": 3}},
    "precision_honoured": False,
    "precision_notes": ("attention ran in fp32",),
    "resumed_at": (7,),
    "watched": (BORDER,),
    "environment": None,
    "warnings": ("something",),
}
"""Values that the golden run does not have, for fields of other types than text and numbers."""
WITH: dict[str, dict[str, Any]] = {
    "ranks": {"parallel": "ddp"},
    "failure_hint": {"failure": "it broke"},
    "failure_kind": {"failure": "it broke"},
    "watched_at": {"watched": (BORDER,)},
    "precision_notes": {"precision_honoured": False},
}
"""What else a record has where the field means something."""
UNSAID = {"schema"}


def other(record: RunRecord, name: str) -> Any:
    if name == "environment":
        return dataclasses.replace(record.environment, device_name="another")
    if name in OTHER:
        return OTHER[name]
    value = getattr(record, name)
    return f"{value} and more" if isinstance(value, str) else (value or 0) + 17


@pytest.mark.parametrize("name", sorted(f.name for f in dataclasses.fields(RunRecord)))
def test_every_field_shows(name: str) -> None:
    """A record that differs in one field has another report; a new field has to be told."""
    if name in UNSAID:
        return
    record = dataclasses.replace(golden("run"), **WITH.get(name, {}))

    changed = dataclasses.replace(record, **{name: other(record, name)})

    assert outline_of(changed) != outline_of(record)


def test_a_failure_is_laid_out_with_its_hint() -> None:
    """The message is a warning, the user's lines stay lines, and what to do comes last."""
    record = dataclasses.replace(
        golden("run"), status="failed", failure="it broke\n  File x, line 1\n    x()",
        failure_kind="RecipeError", failure_hint="mend it",
    )  # fmt: skip

    result = next(s for s in outline_of(record).sections if s.key == "result")

    prose = [b for b in result.blocks if isinstance(b, Prose)][:3]
    assert [(b.kind, b.lines) for b in prose] == [
        ("warning", ("The run failed (RecipeError): it broke",)),
        ("code", ("  File x, line 1", "    x()")),
        ("paragraphs", ("hint: mend it",)),
    ]


def test_another_precision_than_asked_is_told_once() -> None:
    """What the training warned of is not said again; what no warning says is, note by note."""
    told = "precision fp16 was not carried out: matmul ran in fp32; conv ran in fp32"
    record = dataclasses.replace(
        golden("run"), precision_honoured=False, warnings=(told,),
        precision_notes=("matmul ran in fp32", "conv ran in fp32"),
    )  # fmt: skip
    untold = dataclasses.replace(record, warnings=())

    shown, by_itself = ([
        line
        for section in outline_of(each).sections if section.key == "result"
        for b in section.blocks if isinstance(b, Prose)
        for line in b.lines
    ] for each in (record, untold))  # fmt: skip

    assert shown == [told]
    assert [line.split(": ")[1] for line in by_itself] == ["matmul ran in fp32; conv ran in fp32"]


def test_ranks_and_budget_stand_beside_the_peak() -> None:
    """Peaks of all ranks, and what the plan was found for."""
    record = dataclasses.replace(
        golden("run"), parallel="fsdp2", ranks=2, rank_peak_bytes=(1 << 20, 3 << 20),
        budget_bytes=2 << 20,
    )  # fmt: skip
    blocks = [b for section in outline_of(record).sections for b in section.blocks]
    facts = {name: value for b in blocks if isinstance(b, Facts) for name, value in b.pairs}

    assert facts["memory budget"] == "2.00 MiB"
    assert facts["peak memory by rank"] == "1.00 MiB, 3.00 MiB"
    assert facts["processes"] == "2 ranks, fsdp2"


def test_the_watched_borders_are_a_table() -> None:
    """One row for each border and phase, with the step in the heading."""
    record = dataclasses.replace(golden("run"), watched_at=1200, watched=(BORDER,))
    section = next(s for s in outline_of(record).sections if s.key == "borders")
    table = section.blocks[0]

    assert section.title == "What crossed the borders of modules in step 1,200"
    assert isinstance(table, Table)
    assert table.rows[0][:4] == ("blocks.0", "backward", "fp16", "2.000")
    assert table.rows[0][-2:] == ("3 of 12", "1")
