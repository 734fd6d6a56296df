"""Predicted and measured peak of a training step: every precision, and every lever alone.

    python benchmarks/memory_ladder.py

For each recipe: the named precisions; on fp32 each store alone, and on bf16 autocast each lever
alone; and plain PyTorch loops, with the optimizers of the peers that are installed, measured by the
same ledger. Byte counts are exact, so there is no spread: n is 1. Batches are small because fp16
products take thirty times as long as fp32 on a CPU without fp16 instructions, and no precision is
left out. CPU only: a figure here says nothing of a GPU.
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
from narrowcast.plan import AUTO_BLOCKS, LEVERS, PLANS, STATES, WEIGHTS, ActivationRule, Plan
from narrowcast.prediction.predict import predict_memory
from narrowcast.profiling import measure_recipe
from narrowcast.recipes.load import Recipe, load_recipe
from narrowcast.records.memory import MemoryRecord
from narrowcast.units import format_bytes

CASES = {
    "austen": ["size=small", "batch_size=2"],
    "fashion mlp": ["model=mlp"],
    "fashion vit": ["model=vit", "batch_size=64"],
    "fashion resnet": ["model=resnet", "batch_size=32"],
    "tabular": [],
}
FP32, BF16, SPLIT = PLANS["fp32"], PLANS["bf16"], PLANS["bf16-split"]


def levers() -> Iterator[Plan]:
    """Yield plans that change one thing each."""
    yield replace(FP32, name="fp32, narrowcast.AdamW", weights="fp32", states="fp32")
    for states in STATES[2:]:
        yield replace(FP32, name=f"fp32 + {states} states", weights="fp32", states=states)
    for weights in WEIGHTS[2:]:
        name = f"bf16 weights as {weights}, fp32 states"
        yield replace(SPLIT, name=name, weights=weights, states="fp32")
    released = {"weights": "fp32", "states": "fp32", "gradients": "release"}
    yield replace(FP32, name="fp32 + gradient release", **released)
    for lever in LEVERS:
        rule = ActivationRule(modules=AUTO_BLOCKS, lever=lever)  # type: ignore[arg-type]
        yield replace(BF16, name=f"bf16 + {lever}", activations=(rule,))
    yield replace(BF16, name="bf16 + chunked loss", loss="auto")
    yield replace(BF16, name="bf16 + 2 micro-batches", micro_batches=2)


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
        "peak_phase": measured.peak_phase,
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
            # torchao compiles its step, which nothing that watches operations can look into.
            with ledger or nullcontext(), torch.compiler.set_stance("force_eager"):
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
    return {
        **found,
        "measured_bytes": record.total_peak_bytes,
        "peak_phase": record.peak_phase,
        "lines": lines_of(record),
    }


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
    for case, overrides in CASES.items():
        recipe = load_recipe(case.split()[0], overrides)
        named = [PLANS[name] for name in PLANS if name != "tf32"]  # a GPU's alone
        found = [row(case, recipe, plan) for plan in (*named, *levers())]
        found += [peer_row(case, recipe, peer, build) for peer, build in peers()]
        fp32 = next(r["measured_bytes"] for r in found if r["plan"] == "fp32")
        print(f"{case}, batch {recipe.batch_size}: bytes, share of fp32")
        for one in found:
            print_row(one, fp32)
        rows += found
    write_results("memory-ladder-cpu", rows, cases=CASES)


if __name__ == "__main__":
    main()
