"""Budgets of a rank, from what plain DDP takes down to what nothing fits into: is each kept?

    python benchmarks/plan_ranks.py [--precisions fp32] [--budgets 0 1 2 3 4 5]

The `austen` GPT on gloo processes of this machine. For each budget the plan's own command trains
for four steps under torchrun, and the peaks that the ranks measure of themselves are held against
the budget. Of a rank the ledger may see more than it needs, since gloo's threads let go of what was
sent when they find the time: the smallest of the ranks that hold as much as rank 0 is named too.
Writes benchmarks/results/plan-ranks-cpu.json; budgets that are not run again stay in it.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

from provenance import RESULTS, write_results

from narrowcast.errors import UsageError
from narrowcast.plan import PLANS
from narrowcast.planning.planner import Planner
from narrowcast.recipes.load import load_recipe
from narrowcast.records.codec import dumps
from narrowcast.records.plan import PlanRecord
from narrowcast.units import format_bytes, format_duration

NAME = "plan-ranks-cpu"
RATIO = 0.78
PLACE = ("world", "precisions", "budget_bytes")


def peaks_of_training(record: PlanRecord) -> list[int]:
    """Run the command of a plan for four steps and return the peak of each rank."""
    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / "plan.json"
        file.write_text(dumps(record))
        words = [str(file) if w == "plan.json" else w for w in shlex.split(record.command)]
        assert words[0] == "torchrun"
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", *words[1:]]
        subprocess.run(
            [*launcher, "--device", "cpu", "--steps", "4", "--output", f"{place}/run"],
            check=True,
            capture_output=True,
            timeout=200,
        )
        found = json.loads((Path(place) / "run" / "run.json").read_text())
    return list(found["rank_peak_bytes"])


def planned(planner: Planner, budget: int) -> dict[str, Any]:
    began = time.perf_counter()
    try:
        record = planner.plan(budget)
    except UsageError as error:
        return {"budget_bytes": budget, "infeasible": error.message}
    took = time.perf_counter() - began
    peaks = peaks_of_training(record)
    return {
        "budget_bytes": budget,
        "chosen": record.chosen.name,
        "parallel": record.chosen.parallel,
        "exact": record.chosen.exact,
        "seconds": record.chosen.seconds,
        "spread": record.chosen.spread,
        "noise": record.noise,
        "why": record.why,
        "predicted_bytes": record.chosen.predicted_bytes,
        "planner_measured_bytes": record.chosen.measured_bytes,
        "trained_peak_bytes": peaks,
        "within_budget": max(peaks) <= budget,
        "smallest_within_budget": min(peaks) <= budget,
        "planning_s": took,
    }


def shown(row: dict[str, Any]) -> str:
    head = f"{format_bytes(row['budget_bytes']):>9}"
    if "infeasible" in row:
        return f"{head}  {row['infeasible']}"
    peaks = ", ".join(map(format_bytes, row["trained_peak_bytes"]))
    return (
        f"{head}  {row['chosen']} by {row['parallel']}  {format_bytes(row['predicted_bytes'])}  "
        f"{peaks}  {format_duration(row['seconds'])}\n{'':11}{row['why']}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--world", type=int, default=2)
    parser.add_argument("--precisions", nargs="*", default=["auto"])
    parser.add_argument("--budgets", type=int, nargs="*", default=range(6), help="by number")
    asked = parser.parse_args()
    began = time.perf_counter()
    planner = Planner(
        load_recipe("austen"), device="cpu", world=asked.world, precisions=asked.precisions
    )
    top = planner.ways["ddp"].peaks.need(PLANS["fp32"]).bytes
    for number in asked.budgets:
        asked_for = {"world": asked.world, "precisions": asked.precisions}
        row = {**asked_for, **planned(planner, int(top * RATIO**number))}
        print(f"{time.perf_counter() - began:5.0f} s  {shown(row)}", flush=True)
        write({**row, "load": os.getloadavg()})


def write(row: dict[str, Any]) -> None:
    """Write a row, in the place of one for the same ranks, precisions and budget."""
    path = RESULTS / f"{NAME}.json"
    known = json.loads(path.read_text())["rows"] if path.exists() else []
    kept = [old for old in known if any(old[key] != row[key] for key in PLACE)]
    write_results(
        NAME,
        sorted([*kept, row], key=lambda r: (r["world"], r["precisions"], -r["budget_bytes"])),
        question="peak of each rank that a plan's own command trains, against the budget of a rank",
        model="austen, global batch of the recipe",
        backend="gloo",
    )


if __name__ == "__main__":
    main()
