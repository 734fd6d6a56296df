"""Speed and memory of whole training steps: torch.amp by hand, our precisions and plans, the peers.

First every arm alone, for its peaks; then all that ran, side by side in rounds of a random order,
so that clocks and heat affect them alike. A block is a few steps between two waits for the device.
Ratios are of the same round: speed over the hand-written bf16 loop, with its quartiles.
"""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from gpu_parts.arms import Arm, Step, Subject, hand, ours, peers
from gpu_parts.clock import ratios, spread
from gpu_parts.device import Peaks, empty, synchronize
from gpu_parts.sheet import Ask, Sheet, is_fatal
from narrowcast.plan import Plan
from narrowcast.precision.cast import numeric_settings
from narrowcast.profiling import first_batch
from narrowcast.recipes.load import Recipe, load_recipe
from narrowcast.records.codec import from_json, to_json

__all__ = ["BASELINE", "WORKLOADS", "run"]

RECIPE = Path(__file__).resolve().parents[1] / "gpu_workloads.py"
PLANS = Path(__file__).resolve().parents[1] / "results" / "gpu-plans.json"
BASELINE = "torch.amp bf16"
WORKLOADS: dict[str, dict[str, str | int | bool]] = {
    "gpt2-124m": {"batch_size": 8},
    "resnet50": {"batch_size": 128, "channels_last": True},
    "vit-b16": {"batch_size": 64},
    "gpt2-350m": {"batch_size": 8},
}
_TOKENS = {"gpt2-124m": 1024, "gpt2-350m": 1024}
_WARM_UP = 3
_BLOCK_S = 0.25
_MOST_STEPS = 20
_LEAST_ROUNDS, _MOST_ROUNDS = 3, 9
# Of the time of a workload, what peaks may take before the rounds have to begin.
_SHARE_OF_PEAKS = 0.5


def run(ask: Ask) -> None:
    name = ask.workload or "gpt2-124m"
    sheet = Sheet("training", ask, baseline=BASELINE, question="whole steps: seconds and peaks")
    subject = subject_of(workload_recipe(name, tiny=ask.rehearse), ask.device)
    arms = list(arms_of(name, rehearse=ask.rehearse))
    samples = subject.recipe.batch_size * _TOKENS.get(name, 1)
    unit = "tokens" if name in _TOKENS else "images"
    clock = ask.clock.share(_SHARE_OF_PEAKS)
    for arm in arms:
        key = {"workload": name, "arm": arm.name}
        if sheet.find(**key) is None:
            about = {"kind": arm.kind, "batch": subject.recipe.batch_size, "unit": unit,
                     "units_per_step": samples, "plan": arm.plan and to_json(arm.plan)}  # fmt: skip
            if clock.is_over():
                sheet.put(key, **about, not_run="out of time")
                continue
            with sheet.trying(**key) as found:
                found |= about
                found["peak"] = peaks_of(arm, subject)
    ready = [arm for arm in arms if "peak" in (sheet.find(workload=name, arm=arm.name) or {})]
    for seconds in rounds(ready, subject, ask, sheet, name):
        _note(sheet, name, seconds)


def workload_recipe(name: str, *, tiny: bool) -> Recipe:
    options = {**WORKLOADS[name], **({"tiny": True, "batch_size": 2} if tiny else {})}
    return load_recipe(RECIPE, [f"model={name}", *(f"{k}={v}" for k, v in options.items())])


def subject_of(recipe: Recipe, device: torch.device) -> Subject:
    """Build the model once, where that is fast, and keep its first weights on the CPU."""
    torch.manual_seed(0)
    data, batch = first_batch(recipe, recipe.batch_size, 0)
    with device:
        model = recipe.build_model()
    return Subject(recipe=recipe, model=model.cpu(), data=data, batch=batch, device=device)


def arms_of(name: str, *, rehearse: bool) -> Iterator[Arm]:
    """Yield the arms of a workload, those that matter most first."""
    yield hand("bf16")
    yield ours("bf16")
    yield from (ours(plan) for plan in ("bf16-split", "lean"))
    for share, plan in plans_for(name):
        yield ours(plan, name=f"plan within {share} of torch.amp")
    for precision in ("fp32", "fp16") if rehearse else ("tf32", "fp16", "fp32"):
        yield hand(precision)
        yield ours(precision)
    yield from peers()


def plans_for(name: str) -> list[tuple[str, Plan]]:
    """Return the plans that were made for this workload without a GPU (``gpu_plans.py``)."""
    rows = json.loads(PLANS.read_text())["rows"] if PLANS.exists() else []
    return [
        (f"{row['share']:.2f}", from_json(Plan, row["plan"]))
        for row in rows
        if row["workload"] == name and "plan" in row
    ]


def peaks_of(arm: Arm, subject: Subject) -> dict[str, int]:
    """Return the peaks of two steady steps of an arm that has the device to itself."""
    with numeric_settings(arm.policy):
        peaks = Peaks(subject.device)
        step = arm.build(subject)
        for _ in range(_WARM_UP):
            step()
        peaks.steady()
        step()
        step()
        found = peaks.read()
    del step
    empty(subject.device)
    return found


def rounds(
    arms: list[Arm], subject: Subject, ask: Ask, sheet: Sheet, name: str
) -> Iterator[dict[str, list[float]]]:
    """Yield the seconds of a step of every arm, one number for each round so far."""
    steps: dict[str, Step] = {}
    lengths: dict[str, int] = {}
    for arm in arms:
        try:
            steps[arm.name] = arm.build(subject)
            lengths[arm.name] = _length(arm, steps[arm.name], ask)
        except Exception as error:
            if is_fatal(error):
                raise
            steps.pop(arm.name, None)
            why = f"not timed: {type(error).__name__}: {error}".split("\n", 1)[0][:300]
            sheet.put({"workload": name, "arm": arm.name}, not_timed=why)
            empty(subject.device)
    by_name = {arm.name: arm for arm in arms if arm.name in steps}
    seconds: dict[str, list[float]] = {arm: [] for arm in by_name}
    chance, order = random.Random(0), list(by_name)
    longest = 0.0
    for done in range(2 if ask.rehearse else _MOST_ROUNDS):
        if done >= _LEAST_ROUNDS and ask.clock.is_over(longest):
            break
        began = time.monotonic()
        chance.shuffle(order)
        for arm in order:
            with numeric_settings(by_name[arm].policy):
                seconds[arm].append(block(steps[arm], lengths[arm], subject.device))
        longest = max(longest, time.monotonic() - began)
        yield seconds


def _length(arm: Arm, step: Step, ask: Ask) -> int:
    """Return how many steps of an arm make a block of about a quarter of a second."""
    if ask.rehearse:
        step()
        return 1
    with numeric_settings(arm.policy):
        block(step, 1, ask.device)
        one = block(step, 2, ask.device)
    return min(_MOST_STEPS, max(2, math.ceil(_BLOCK_S / one)))


def block(step: Step, steps: int, device: torch.device) -> float:
    """Return seconds a step over some steps, after one that finds its memory again."""
    step()
    synchronize(device)
    began = time.perf_counter()
    for _ in range(steps):
        step()
    synchronize(device)
    return (time.perf_counter() - began) / steps


def _note(sheet: Sheet, name: str, seconds: dict[str, list[float]]) -> None:
    """Write what the rounds so far come to."""
    base = sheet.find(workload=name, arm=BASELINE) or {}
    for arm, taken in seconds.items():
        row = sheet.find(workload=name, arm=arm)
        assert row is not None, "its peaks were read"
        row["seconds"] = taken
        row["step_s"] = spread(taken)
        row["units_per_s"] = row["units_per_step"] / row["step_s"]["median"]
        if BASELINE in seconds:
            row["speed_over_baseline"] = ratios(seconds[BASELINE], taken)
        row |= _shares(row.get("peak", {}), base.get("peak", {}))
    sheet.write()


def _shares(peak: dict[str, int], base: dict[str, int]) -> dict[str, Any]:
    return {
        f"{kind}_over_baseline": peak[f"{kind}_bytes"] / base[f"{kind}_bytes"]
        for kind in ("allocated", "reserved")
        if peak and base
    }
