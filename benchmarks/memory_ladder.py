"""Predicted and measured peak of a training step: every precision, and every lever alone.

    python benchmarks/memory_ladder.py

For each recipe: the named precisions; on top of fp32 one lever at a time; and plain PyTorch loops,
with the optimizers of the peers that are installed, measured by the same ledger. Byte counts are
exact, so there is no spread: n is 1. CPU only: a figure here says nothing of a GPU.
Writes benchmarks/results/memory-ladder-cpu.json.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from provenance import write_results
from torch import nn

from narrowcast.data import BatchStream, batch_len
from narrowcast.errors import NarrowcastError
from narrowcast.memory.measure import MemoryLedger
from narrowcast.plan import PLANS, ActivationRule, Plan
from narrowcast.prediction.predict import predict_memory
from narrowcast.profiling import measure_recipe
from narrowcast.recipes.load import Recipe, load_recipe
from narrowcast.records.memory import MemoryRecord
from narrowcast.units import format_bytes

# fp16 convolutions train some 290 times slower than fp32 on CPUs: the ResNet gets a small batch.
CASES = {
    "austen small": ("austen", ["size=small"]),
    "fashion mlp": ("fashion", ["model=mlp"]),
    "fashion vit": ("fashion", ["model=vit"]),
    "fashion resnet": ("fashion", ["model=resnet", "batch_size=32"]),
    "tabular": ("tabular", []),
}
FP32, BF16 = PLANS["fp32"], PLANS["bf16"]


def lever(name: str, base: Plan = FP32, **changes: Any) -> Plan:
    return replace(base, name=name, **changes)


def on_blocks(name: str) -> dict[str, Any]:
    return {"activations": (ActivationRule(modules="auto", lever=name),)}  # type: ignore[arg-type]


LEVERS = (
    lever("fp32 + int8 states", weights="fp32", states="int8"),
    lever("fp32 + release", weights="fp32", states="fp32", gradients="release"),
    lever("fp32 + checkpoint", **on_blocks("checkpoint")),
    lever("fp32 + int8 activations", **on_blocks("int8")),
    lever("fp32 + chunked loss", loss="auto"),
    lever("fp32 + 4 micro-batches", micro_batches=4),
    lever("bf16 + checkpoint", BF16, **on_blocks("checkpoint")),
)


def row(case: str, recipe: Recipe, plan: Plan) -> dict[str, Any]:
    found: dict[str, Any] = {"case": case, "plan": plan.name}
    try:
        measured = measure_recipe(recipe, plan, torch.device("cpu"), break_even=False)
        predicted = predict_memory(recipe, plan, break_even=False)
    except NarrowcastError as error:
        return {**found, "absent": error.message}
    return {
        **found,
        "measured_bytes": measured.total_peak_bytes,
        "predicted_bytes": predicted.total_peak_bytes,
        "lines": lines_of(measured),
        "predicted_lines": lines_of(predicted),
    }


def lines_of(record: MemoryRecord) -> dict[str, int]:
    return {line.category: line.bytes for line in record.lines if line.bytes}


def peer_row(case: str, recipe: Recipe, name: str, build: Callable[..., Any]) -> dict[str, Any]:
    """Measure the third step of a loop that anybody would write with this optimizer."""
    found: dict[str, Any] = {"case": case, "plan": name}
    data, _ = recipe.load_data()
    _, batch = next(BatchStream(data, recipe.batch_size, seed=0, collate=recipe.collate))
    torch.manual_seed(0)
    model = recipe.build_model()
    try:
        optimizer, surroundings = build(model)
        for step in range(3):
            ledger = MemoryLedger(model, optimizer) if step == 2 else None
            with ledger or nullcontext():
                if ledger:
                    ledger.inputs(batch)
                with surroundings():
                    loss = recipe.compute_loss(model, batch)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
    except Exception as error:
        return {**found, "absent": f"{type(error).__name__}: {str(error).splitlines()[0]:.120}"}
    assert ledger is not None
    record = ledger.record(batch_size=batch_len(batch))
    return {**found, "measured_bytes": record.total_peak_bytes, "lines": lines_of(record)}


def peers() -> Iterator[tuple[str, Callable[[nn.Module], Any]]]:
    def autocast() -> Any:
        return torch.autocast("cpu", dtype=torch.bfloat16)

    def torch_amp(model: nn.Module) -> Any:
        return torch.optim.AdamW(model.parameters(), fused=True), autocast

    def torchao(kind: str) -> Callable[[nn.Module], Any]:
        def build(model: nn.Module) -> Any:
            import torchao.optim as optim

            return getattr(optim, kind)(model.parameters()), autocast

        return build

    def bitsandbytes(model: nn.Module) -> Any:
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(model.parameters()), autocast

    def optimi(model: nn.Module) -> Any:
        from optimi import AdamW

        narrow = model.to(torch.bfloat16)
        narrow.register_forward_pre_hook(
            lambda _, args: tuple(a.bfloat16() if a.is_floating_point() else a for a in args)
        )
        return AdamW(narrow.parameters(), lr=1e-3, kahan_sum=True), nullcontext

    yield "torch.amp bf16, AdamW fused", torch_amp
    yield f"torch.amp bf16, torchao {version('torchao')} AdamW8bit", torchao("AdamW8bit")
    yield f"torch.amp bf16, torchao {version('torchao')} AdamW4bit", torchao("AdamW4bit")
    yield f"torch.amp bf16, bitsandbytes {version('bitsandbytes')} AdamW8bit", bitsandbytes
    yield f"bf16 weights, optimi {version('torch-optimi')} AdamW with Kahan sums", optimi


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


def print_row(found: dict[str, Any], fp32: int) -> None:
    if "absent" in found:
        print(f"  {found['plan']:<50} absent: {found['absent']}")
        return
    measured, predicted = found["measured_bytes"], found.get("predicted_bytes")
    gap = "" if predicted is None else f"  predicted {predicted - measured:+,} B"
    print(f"  {found['plan']:<50} {format_bytes(measured):>10} {measured / fp32:6.2f}{gap}")


def main() -> None:
    rows = []
    for case, (name, overrides) in CASES.items():
        recipe = load_recipe(name, overrides)
        plans = [PLANS[n] for n in PLANS if n != "tf32"]
        found = [row(case, recipe, plan) for plan in (*plans, *LEVERS)]
        found += [peer_row(case, recipe, peer, build) for peer, build in peers()]
        fp32 = next(r["measured_bytes"] for r in found if r["plan"] == "fp32")
        print(f"{case}: bytes, share of fp32")
        for one in found:
            print_row(one, fp32)
        rows += found
    write_results("memory-ladder-cpu", rows)


if __name__ == "__main__":
    main()
