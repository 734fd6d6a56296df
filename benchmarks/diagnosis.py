"""The diagnosis against planted faults and healthy runs: what it says, and what is true.

    python benchmarks/diagnosis.py [CASE ...] [--verdicts-only]

The cases and the truth about each are in tests/faults/catalogue.py; that they are true is proved by
tests/numerics/test_faults_are_real.py, which trains them without the diagnosis. A case counts as
named when the verdict is one of those that are right and accuses a place that is right; its rank is
where such a finding stands among all. A set of operations counts as the set of their modules. That
what is to be kept in fp32 cures is told by one more training, without the diagnosis. Names of cases
select some; the others' rows stay in benchmarks/results/diagnosis-cpu.json, each with its date and
commit. With --verdicts-only nothing is written.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch
from provenance import RESULTS, provenance, write_results
from rich.console import Console
from rich.table import Table

import narrowcast
from narrowcast.records.diagnosis import DiagnosisRecord, Finding, MinimalFp32

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from faults.catalogue import CASES, FP32_TOO, Case
from faults.truth import shows, training

# What says nothing against a run: neither that it is well, nor that it is not.
UNDECIDED = ("inconclusive", "not reproducible")
ERROR = "error"
NAME = "diagnosis-cpu"


def is_right(case: Case, finding: Finding) -> bool:
    """Whether a finding is the truth about the case, or a part of it."""
    in_place = not case.modules or finding.module in case.modules
    return finding.kind in case.kinds and in_place


def rank_of(case: Case, record: DiagnosisRecord) -> int | None:
    """Return the place, from 1, of the first finding that is right."""
    findings = (record.finding, *record.others)
    return next((i for i, f in enumerate(findings, 1) if is_right(case, f)), None)


def kept(minimal: MinimalFp32) -> tuple[str, ...]:
    """Return the modules of a set, those of its operations included."""
    within = (operation.partition(":")[0] for operation in minimal.operations)
    return tuple(sorted({*minimal.modules, *within}))


def cures(case: Case, keep: tuple[str, ...]) -> bool:
    """Whether the training loses its symptom with these in fp32."""
    found, reference = training(case, case.precision, keep), training(case, "fp32")
    return not found.breaks and not shows(case, found, reference)


def searched(case: Case, minimal: MinimalFp32 | None) -> dict[str, Any]:
    """Say what the search for the smallest set gave, beside what is true."""
    if case.minimal is None:
        return {}
    row: dict[str, Any] = {"expected_set": sorted(case.minimal), "set_equal": False}
    if minimal is None:
        return row
    right = {tuple(sorted(names)) for names in (case.minimal, *case.as_small)}
    bound = 3 * (len(case.minimal) + 2) * math.log2(max(2, minimal.candidates))
    return row | {
        "set": kept(minimal),
        "operations": minimal.operations,
        "keep_fp32": minimal.keep_fp32,
        "cures": cures(case, minimal.keep_fp32),
        "set_equal": kept(minimal) in right,
        "unique": minimal.unique,
        "oracle_calls": minimal.oracle_calls,
        "candidates": minimal.candidates,
        "bound": bound,
        "within_bound": minimal.oracle_calls <= bound,
        "trainings_work": all(trial.works for trial in minimal.trainings),
        "dropped_fail": all(module.failed for module in minimal.dropped),
    }


def outcome(case: Case, *, sets: bool) -> dict[str, Any]:
    """Diagnose one case, and hold what is said against the catalogue."""
    row: dict[str, Any] = {
        "case": case.name,
        "precision": case.precision,
        "healthy": case.healthy,
        "fp32_too": case.kinds == FP32_TOO,
        "expected": case.kinds,
        "expected_modules": case.modules,
        "why": case.why,
    }
    wants_set = sets and case.minimal is not None
    began = time.perf_counter()
    try:
        record = narrowcast.diagnose(
            case.path, case.precision, case.options, steps=case.steps, minimal_fp32=wants_set
        )
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        said = f"{type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})"
        return row | {"verdict": ERROR, "error": said, "named": False, "rank": None}
    finding = record.finding
    return (
        row
        | {
            "verdict": record.verdict,
            "module": finding.module,
            "op": finding.op,
            "line": f"{Path(finding.file).name}:{finding.line}" if finding.file else "",
            "explanation": finding.explanation,
            "symptom": record.symptom,
            "others": [f"{other.kind} at {other.module}" for other in record.others],
            "rank": rank_of(case, record),
            "named": record.verdict in case.kinds and is_right(case, finding),
            "seconds": time.perf_counter() - began,
        }
        | (searched(case, record.minimal_fp32) if wants_set else {})
    )


def totals(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Count what the targets of issue 4 are about."""
    of_precision = [row for row in rows if not row["healthy"] and not row["fp32_too"]]
    healthy = [row for row in rows if row["healthy"]]
    fp32_too = [row for row in rows if row["fp32_too"]]
    sets = [row for row in rows if "expected_set" in row]
    faults = [*of_precision, *fp32_too]

    def blamed(row: dict[str, Any]) -> bool:
        return not row["named"] and row["verdict"] not in (*UNDECIDED, "fine", ERROR)

    return {
        "errors": sum(row["verdict"] == ERROR for row in rows),
        "faults": len(faults),
        "named_first": sum(row["named"] for row in faults),
        "named_among_all": sum(row["rank"] is not None for row in faults),
        "healthy": len(healthy),
        "healthy_accused": sum(blamed(row) for row in healthy),
        "healthy_undecided": sum(row["verdict"] in UNDECIDED for row in healthy),
        "fp32_failing": len(fp32_too),
        "fp32_failing_blamed_on_precision": sum(blamed(row) for row in fp32_too),
        "sets": len(sets),
        "sets_equal": sum(row["set_equal"] for row in sets),
        "sets_that_cure": sum(row.get("cures", False) for row in sets),
        "sets_within_bound": sum(row.get("within_bound", False) for row in sets),
    }


def mark(row: dict[str, Any]) -> str:
    is_good = row["named"] and row.get("set_equal", True) and row.get("cures", True)
    return "ok" if is_good else "MISS"


def table(rows: list[dict[str, Any]]) -> Table:
    """Return one line a case."""
    shown = Table(title="Diagnosis of planted faults and healthy runs")
    for heading in ("", "case", "expected", "verdict", "module", "rank", "set", "calls", "s"):
        shown.add_column(heading, justify="right" if heading in ("rank", "calls", "s") else "left")
    for row in rows:
        bound = row.get("bound")
        shown.add_row(
            mark(row),
            row["case"],
            f"{row['expected'][0]} {' | '.join(row['expected_modules'])}".strip(),
            row["verdict"],
            row.get("module", row.get("error", "")),
            str(row["rank"] or "-"),
            ", ".join(row.get("set", ())),
            f"{row['oracle_calls']} of {bound:.0f}" if bound else "",
            f"{row.get('seconds', 0):.1f}",
        )
    return shown


def merged(new: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return all rows of the record, with the new ones in the place of those of their cases."""
    path = RESULTS / f"{NAME}.json"
    old = json.loads(path.read_text())["rows"] if path.exists() else []
    here = provenance()
    when = f"{here['date']} at {here['commit']}"
    rows = {row["case"]: row for row in old}
    rows |= {row["case"]: {**row, "measured": when} for row in new}
    return [rows[case.name] for case in CASES if case.name in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*", help="names of cases; none: all")
    parser.add_argument("--verdicts-only", action="store_true", help="search for no minimal sets")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    console = Console(width=None if sys.stdout.isatty() else 200)
    rows = []
    for case in CASES:
        if not asked.cases or case.name in asked.cases:
            rows.append(outcome(case, sets=not asked.verdicts_only))
            said = rows[-1].get("error") or f"{rows[-1]['verdict']} {rows[-1]['module']}"
            console.print(f"{mark(rows[-1])} {case.name}: {said}", highlight=False)
    console.print(table(rows))
    found = totals(rows)
    for name, value in found.items():
        console.print(f"{name.replace('_', ' ')}: {value}", highlight=False)
    if not asked.verdicts_only:
        whole = merged(rows)
        write_results(NAME, whole, totals=totals(whole))


if __name__ == "__main__":
    main()
