"""Where the peak of one training step goes, per recipe and precision, beside torch's MemTracker.

    python benchmarks/memory.py

Byte counts are exact, so there is no spread: n is 1, and MemTracker counts a repeat of the step.
Writes benchmarks/results/memory-cpu.json.
"""

from __future__ import annotations

from typing import Any

import torch
from provenance import write_results

from narrowcast.plan import plan_named
from narrowcast.profiling import measure_recipe
from narrowcast.recipes.load import load_recipe
from narrowcast.units import format_bytes

CASES = {
    "austen": ["size=small"],
    "fashion": ["model=vit"],
    "fashion, batch 8": ["model=mlp", "batch_size=8"],
    "fashion, resnet": ["model=resnet"],
    "tabular": [],
}
PRECISIONS = ("fp32", "bf16", "fp16", "bf16-true", "bf16-split", "lean")


def row(case: str, overrides: list[str], precision: str) -> dict[str, Any]:
    recipe = load_recipe(case.split(",", maxsplit=1)[0], overrides)
    record = measure_recipe(recipe, plan_named(precision), torch.device("cpu"), cross_check=True)
    lines = {line.category: line.bytes for line in record.lines}
    assert sum(lines.values()) == record.total_peak_bytes
    return {
        "case": case,
        "options": record.options,
        "precision": precision,
        "total_peak_bytes": record.total_peak_bytes,
        "memtracker_peak_bytes": record.memtracker_peak_bytes,
        "peak_phase": record.peak_phase,
        "lines": lines,
        "break_even_batch": record.break_even and record.break_even.batch_size,
        "break_even_why": record.break_even and record.break_even.why,
    }


def main() -> None:
    rows = [
        row(case, overrides, p)
        for case, overrides in CASES.items()
        for p in PRECISIONS
        # fp16 convolutions train hundreds of times slower than fp32 on some CPUs.
        if not ("resnet" in case and p == "fp16")
    ]
    for found in rows:
        same = found["memtracker_peak_bytes"] == found["total_peak_bytes"]
        size = format_bytes(found["total_peak_bytes"])
        print(f"{found['case']:<18} {found['precision']:<10} {size:>10}  "
              f"MemTracker {'equal' if same else found['memtracker_peak_bytes']}")  # fmt: skip
    write_results("memory-cpu", rows)


if __name__ == "__main__":
    main()
