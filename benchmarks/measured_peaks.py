"""Predicted peaks beside peaks that others measured on real GPUs and published.

    python benchmarks/measured_peaks.py [--csv PATH] [--only decoder_xl,vits] [--all]

The rows lie outside of the repository (their sources are named there, row by row). The models and
loops behind them are rebuilt in benchmarks/peaks and traced on fake tensors; nothing is fitted to a
row. Prints each training peak and a summary, with `--all` the stages as well, and writes ids and
errors to benchmarks/results/measured-peaks.json, where `--only` keeps the rows of other set-ups.
Which command made the rows of a set-up, and when, is told there for each (`made`).
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from peaks import huggingface, rows
from provenance import RESULTS, provenance, write_results

CSV = Path(__file__).resolve().parents[2] / "shared" / "data" / "measured_gpu_peaks.csv"

SETUPS = {
    "huggingface": huggingface.predictions,
    "decoder_xl": rows.decoder_xl,
    "attention_modules": rows.attention_modules,
    "gpts": rows.gpts,
    "vits": rows.vits,
    "classifiers": rows.classifiers,
}


def measured(path: Path) -> dict[int, dict[str, str]]:
    with path.open(newline="") as file:
        return {int(row["id"]): row for row in csv.DictReader(file)}


def compared(found: dict[int, dict[str, str]], only: list[str]) -> Iterator[dict[str, Any]]:
    for setup in only:
        started = time.perf_counter()
        for identity, predicted in SETUPS[setup]():
            row = found[identity]
            value = int(row["value_bytes"])
            yield {
                "id": identity,
                "setup": setup,
                "grade": row["grade"],
                "row_type": row["row_type"],
                "counter": "allocated" if "allocated" in row["metric"] else "reserved",
                "predicted_bytes": predicted,
                "error_percent": round(100 * (predicted - value) / value, 4),
            }
        print(f"{setup}: {time.perf_counter() - started:.0f} s", file=sys.stderr)


def show(lines: list[dict[str, Any]], found: dict[int, dict[str, str]], *, stages: bool) -> None:
    for line in lines:
        if stages or line["row_type"] != "stage":
            row = found[line["id"]]
            print(
                f"{line['id']:>5} {line['grade']} {row['model'][:24]:<24} {row['phase'][:28]:<28} "
                f"{line['counter']:<9} {int(row['value_bytes']):>14,} "
                f"{line['predicted_bytes']:>14,} {line['error_percent']:>+8.3f} %"
            )


def summary(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Sum up by set-up, grade, kind of row and counter."""
    groups = defaultdict(list)
    for line in lines:
        kind = "stage" if line["row_type"] == "stage" else "peak"
        groups[line["setup"], line["grade"], kind, line["counter"]].append(
            abs(line["error_percent"])
        )
    return [
        {
            "setup": setup,
            "grade": grade,
            "kind": kind,
            "counter": counter,
            "rows": len(errors),
            "median_percent": round(statistics.median(errors), 4),
            "worst_percent": max(errors),
        }
        for (setup, grade, kind, counter), errors in groups.items()
    ]


def kept(known: dict[str, Any], only: list[str]) -> list[dict[str, Any]]:
    """Return the rows of the set-ups that this run leaves as they are."""
    return [line for line in known.get("rows", ()) if line["setup"] not in only]


def made(known: dict[str, Any], only: list[str]) -> dict[str, dict[str, str]]:
    """Say for each set-up which command made its rows, when, from which commit and torch."""
    here = provenance()
    return {
        setup: {key: origin[key] for key in ("command", "date", "commit", "torch")}
        for setup in SETUPS
        for origin in [here if setup in only else known.get("made", {}).get(setup, known)]
        if origin
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--csv", type=Path, default=CSV)
    parser.add_argument("--only", default=",".join(SETUPS))
    parser.add_argument("--all", action="store_true")
    options = parser.parse_args()
    if not options.csv.is_file():
        print(f"skipped: no measured peaks at {options.csv}; give their path with --csv")
        return
    found = measured(options.csv)
    only = options.only.split(",")
    lines = list(compared(found, only))
    show(lines, found, stages=options.all)
    totals = summary(lines)
    for total in totals:
        print(
            "{setup:<18} {grade} {kind:<5} {counter:<9} {rows:>4} rows   "
            "median {median_percent:.4f} %   worst {worst_percent:.4f} %".format(**total)
        )
    path = RESULTS / "measured-peaks.json"
    known = json.loads(path.read_text()) if path.is_file() else {}
    lines = sorted([*lines, *kept(known, only)], key=lambda line: line["id"])
    write_results(
        "measured-peaks", lines, made=made(known, only), summary=summary(lines),
        source=options.csv.name,
    )  # fmt: skip


if __name__ == "__main__":
    main()
