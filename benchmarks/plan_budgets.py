"""Twelve budgets from the fp32 peak down to the infeasible: is each kept, and is the choice fast?

    python benchmarks/plan_budgets.py [--steps 4]

For each budget the chosen plan is trained for a few steps, and the peak that the training measures
of itself is held against the budget. Then all chosen plans and single levers take whole steps in
turn: a larger budget must never be slower beyond the noise, and the choice at least as fast as the
best single lever that fits. The noise is what the planner counted as none, and what three passes
over the same plans differ by. Writes benchmarks/results/plan-budgets-cpu.json.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from provenance import write_results

from narrowcast.errors import UsageError
from narrowcast.plan import PLANS, Plan
from narrowcast.planning.axes import effects_of
from narrowcast.planning.planner import Planner
from narrowcast.planning.space import candidates
from narrowcast.planning.speeds import StepTimes
from narrowcast.profiling import first_batch
from narrowcast.recipes.load import Recipe, load_recipe
from narrowcast.records.codec import from_json
from narrowcast.training.train import TrainOptions, train
from narrowcast.units import format_bytes, format_duration

CPU = torch.device("cpu")
CASES = {"austen": [], "fashion": ["model=resnet"]}
BUDGETS = 12
PASSES = 3
# From one budget to the next; the last ones lie below everything that fits.
RATIO = 0.78


def peak_of_training(recipe: Recipe, plan: Plan, steps: int) -> int:
    """Train for some steps and return the peak that run.json tells."""
    with tempfile.TemporaryDirectory() as place:
        record = train(recipe, plan, TrainOptions(steps=steps), Path(place) / "run", device=CPU)
    assert record.peak_bytes is not None
    return record.peak_bytes


def planned(planner: Planner, recipe: Recipe, budget: int, steps: int) -> dict[str, Any]:
    """Plan for a budget, and train by the plan."""
    began = time.perf_counter()
    try:
        record = planner.plan(budget)
    except UsageError as error:
        return {"budget_bytes": budget, "infeasible": error.message}
    plan = from_json(Plan, record.chosen.plan)
    return {
        "budget_bytes": budget,
        "chosen": plan.name,
        "exact": record.chosen.exact,
        "why": record.why,
        "predicted_bytes": record.chosen.predicted_bytes,
        "trained_peak_bytes": peak_of_training(recipe, plan, steps),
        "planner_noise": record.noise,
        "planning_s": time.perf_counter() - began,
        "plan": plan,
    }


def single_levers(planner: Planner) -> list[Plan]:
    """Return the plans that change one axis of plain fp32 training, and that itself."""
    space = planner.ways[""].space
    return [
        plan
        for plan in candidates(space)
        if len(effects_of(plan, batch_norm=space.batch_norm)) <= 1
    ]


def timed(recipe: Recipe, plans: list[Plan]) -> dict[Plan, tuple[float, float]]:
    """Return each plan's seconds, the median of passes, and half their range as a share of it."""
    data, batch = first_batch(recipe, recipe.batch_size, 0)
    times = StepTimes(recipe, CPU, data, batch, say=lambda _: None)
    passes = [times.of_finalists(plans) for _ in range(PASSES)]
    found = {}
    for plan in plans:
        taken = [each[plan].seconds for each in passes]
        middle = statistics.median(taken)
        found[plan] = (middle, (max(taken) - min(taken)) / 2 / middle)
    return found


def case(name: str, options: list[str], steps: int) -> list[dict[str, Any]]:
    recipe = load_recipe(name, options)
    planner = Planner(recipe, device="cpu")
    top = planner.ways[""].peaks.need(PLANS["fp32"]).bytes
    rows = [planned(planner, recipe, int(top * RATIO**i), steps) for i in range(BUDGETS)]
    singles = single_levers(planner)
    chosen = [row["plan"] for row in rows if "plan" in row]
    times = timed(recipe, list(dict.fromkeys([*chosen, *singles])))
    needs = {plan: planner.ways[""].peaks.need(plan).bytes for plan in singles}
    for row in rows:
        judge(row, times, needs)
    for larger, smaller in pairwise(rows):
        if "seconds" in smaller:
            noise = larger["planner_noise"] + larger["spread"] + smaller["spread"]
            is_slower = larger["seconds"] > smaller["seconds"] * (1 + noise)
            smaller["larger_budget_is_no_slower"] = not is_slower
    return [{"case": name, "options": options, "fp32_bytes": top, **row} for row in rows]


def judge(
    row: dict[str, Any], times: dict[Plan, tuple[float, float]], needs: dict[Plan, int]
) -> None:
    """Add to a row how it did beside the single levers that fit into its budget."""
    if "plan" not in row:
        return
    row["seconds"], row["spread"] = times[row.pop("plan")]
    row["within_budget"] = row["trained_peak_bytes"] <= row["budget_bytes"]
    fitting = {plan: times[plan] for plan, size in needs.items() if size <= row["budget_bytes"]}
    if not fitting:
        return
    best = min(fitting, key=lambda plan: fitting[plan])
    seconds, spread = fitting[best]
    noise = row["planner_noise"] + row["spread"] + spread
    row["best_single_lever"] = best.name
    row["best_single_lever_seconds"] = seconds
    row["as_fast_as_single_levers"] = row["seconds"] <= seconds * (1 + noise)


def shown(row: dict[str, Any]) -> str:
    head = f"{row['case']:<8} {format_bytes(row['budget_bytes']):>9}"
    if "infeasible" in row:
        return f"{head}  {row['infeasible']}"
    marks = [
        row.get(key, True)
        for key in ("within_budget", "larger_budget_is_no_slower", "as_fast_as_single_levers")
    ]
    return (
        f"{head}  {format_bytes(row['trained_peak_bytes']):>9} "
        f"{format_duration(row['seconds']):>8}  {row['chosen']:<36} "
        f"{'ok' if all(marks) else 'FAILS ' + str(marks)}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=4, help="steps of each training")
    steps = parser.parse_args().steps
    rows = [row for name, options in CASES.items() for row in case(name, options, steps)]
    for row in rows:
        print(shown(row))
    write_results("plan-budgets-cpu", rows)


if __name__ == "__main__":
    main()
