"""Plans for shares of what torch.amp takes, chosen without a GPU from predicted peaks.

    python benchmarks/gpu_plans.py [--device h200] [--workloads gpt2-124m]

A ladder of plans is written down here, from the one that should be fastest to the leanest. For each
workload of the GPU benchmark and each share, the plan is the first whose predicted peaks, allocated
and reserved, stay within the share of those predicted for bf16 autocast with fused AdamW. What is
right of that is for the GPU to say: ``benchmarks/gpu.py`` trains these plans as they stand.
Writes benchmarks/results/gpu-plans.json.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from gpu_parts.training import WORKLOADS, workload_recipe
from provenance import RESULTS, write_results

from narrowcast.errors import NarrowcastError
from narrowcast.plan import AUTO_BLOCKS, EVERYWHERE, PLANS, ActivationRule, Plan
from narrowcast.planning.axes import named
from narrowcast.prediction.predict import predict_memory
from narrowcast.recipes.load import Recipe
from narrowcast.records.codec import to_json

SHARES = {
    "gpt2-124m": (0.34, 0.15, 0.10),
    "gpt2-350m": (0.34, 0.15, 0.10),
    "vit-b16": (0.34, 0.15, 0.10),
    # Its weights are small beside its activations, which autocast halves already.
    "resnet50": (0.60, 0.34, 0.15),
}
SPLIT, LEAN = PLANS["bf16-split"], PLANS["lean"]
# Some of the blocks: every second one of a transformer, and of ResNet-50 those of two stages,
# which hold the most and compute the least.
SOME = {
    name: tuple(ActivationRule(modules=glob, lever="checkpoint") for glob in globs)
    for name, globs in {
        "gpt2-124m": ("blocks.[13579]", "blocks.?[13579]"),
        "gpt2-350m": ("blocks.[13579]", "blocks.?[13579]"),
        "vit-b16": ("blocks.[13579]", "blocks.?[13579]"),
        "resnet50": ("stages.[01].?",),
    }.items()
}
REMAKE = ActivationRule(modules=EVERYWHERE, lever="remake")
CHECKPOINT = ActivationRule(modules=AUTO_BLOCKS, lever="checkpoint")
OFFLOAD = ActivationRule(modules=AUTO_BLOCKS, lever="offload")
_COUNTERS = ("allocated_bytes", "reserved_bytes")


def ladder(name: str) -> Iterator[Plan]:
    """Yield plans, the fastest first as far as one can tell without a GPU.

    Batches are split nowhere: summing bf16 gradients without loss takes six bytes a parameter,
    which is more than it saves of these activations.
    """
    chunked = replace(SPLIT, loss="auto")
    remade = replace(chunked, activations=(*SPLIT.activations, REMAKE))
    narrow = replace(remade, weights="split8", states="int4")
    released = replace(LEAN, gradients="release")
    offloaded = replace(released, activations=(*LEAN.activations, OFFLOAD))
    yield from (chunked, remade, replace(remade, gradients="release"))
    yield replace(narrow, gradients="release")
    yield replace(remade, activations=(*remade.activations, *SOME[name]), gradients="release")
    yield replace(remade, activations=(*remade.activations, CHECKPOINT), gradients="release")
    yield from (LEAN, released, offloaded)
    yield from (replace(plan, weights="stochastic") for plan in (released, offloaded))


def peaks(recipe: Recipe, plan: Plan, device: str) -> dict[str, int]:
    record = predict_memory(recipe, plan, device=device, break_even=False)
    return {name: getattr(record, name) for name in _COUNTERS}


def chosen(name: str, device: str) -> list[dict[str, Any]]:
    """Climb down the ladder for each share, predicting each plan once."""
    recipe = workload_recipe(name, tiny=False)
    whole = peaks(recipe, PLANS["bf16"], device)
    rungs = ladder(name)
    known: list[tuple[Plan, dict[str, int]]] = []
    rows = []
    for share in SHARES[name]:
        limit = {counter: share * size for counter, size in whole.items()}
        row: dict[str, Any] = {"workload": name, "share": share, "torch_amp": whole}
        found = next((k for k in known if fits(k[1], limit)), None)
        while found is None and (plan := next(rungs, None)) is not None:
            began = time.monotonic()
            try:
                known.append((named(plan), peaks(recipe, plan, device)))
            except NarrowcastError as error:
                print(f"{name}: left out: {error.message.splitlines()[0]}", flush=True)
                continue
            last = known[-1]
            shares = [f"{last[1][c] / whole[c]:.3f}" for c in _COUNTERS]
            print(f"{name}: {last[0].name} {shares} {time.monotonic() - began:.0f} s", flush=True)
            found = last if fits(last[1], limit) else None
        if found is None:
            least = min(known, key=lambda k: k[1]["reserved_bytes"])
            row["not_found"] = f"the least on the ladder is {least[0].name}"
            row["least"] = least[1]
        else:
            row |= {"name": found[0].name, "plan": to_json(found[0]), "predicted": found[1]}
        rows.append(row)
    return rows


def fits(peak: dict[str, int], limit: dict[str, float]) -> bool:
    return all(peak[counter] <= limit[counter] for counter in _COUNTERS)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="h200", help="the GPU to predict for")
    parser.add_argument("--workloads", default=",".join(WORKLOADS), help="which of them")
    asked = parser.parse_args()
    path: Path = RESULTS / "gpu-plans.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    for name in asked.workloads.split(","):
        rows = [r for r in rows if r["workload"] != name] + chosen(name, asked.device)
        write_results("gpu-plans", rows, predicted_for=asked.device, on_a_gpu=False)


if __name__ == "__main__":
    main()
