"""What each activation lever alone makes of one training step: bytes at the peak, and held.

    python benchmarks/activation_levers.py

Forward and backward of the second step, without an optimizer: byte counts are exact, so there is no
spread. `offload` is simulated on fake tensors, as the host of a CPU has nowhere to send bytes.
Writes benchmarks/results/activation-levers-cpu.json.
"""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from provenance import write_results
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.utils._pytree import tree_map_only

from narrowcast.activations.rules import apply_rules
from narrowcast.data import BatchStream
from narrowcast.errors import UsageError
from narrowcast.memory.measure import MemoryLedger
from narrowcast.plan import LEVERS, ActivationRule
from narrowcast.policy import Policy, policy_named
from narrowcast.precision.cast import backward_context, forward_context, prepare_model
from narrowcast.recipes.load import Recipe, load_recipe
from narrowcast.units import format_bytes

CASES = {
    "austen, small": ["size=small"],
    "fashion, resnet": ["model=resnet"],
    "fashion, vit": ["model=vit"],
}
PRECISIONS = ("bf16", "bf16-true")


def row(case: str, overrides: list[str], precision: str, lever: str | None) -> dict[str, Any]:
    recipe, policy = load_recipe(case.split(",", maxsplit=1)[0], overrides), policy_named(precision)
    torch.manual_seed(0)
    data, _ = recipe.load_data()
    _, batch = next(BatchStream(data, recipe.batch_size, seed=0, collate=recipe.collate))
    found: dict[str, Any] = {"case": case, "precision": precision, "lever": lever or "none"}
    model = recipe.build_model().train()
    prepare_model(model, policy, "cpu")
    mode: AbstractContextManager[Any] = nullcontext()
    if lever == "offload":
        mode = fake = FakeTensorMode()
        batch = tree_map_only(Tensor, fake.from_tensor, batch)
        with FakeCopyMode(fake):
            model = copy.deepcopy(model)
    with mode:
        try:
            if lever is not None:
                apply_rules(model, [ActivationRule(modules="auto", lever=lever)], policy)  # type: ignore[arg-type]
        except UsageError as error:
            return {**found, "error": error.message}
        step(recipe, model, batch, policy)
        with MemoryLedger(model) as ledger:
            ledger.inputs(batch)
            step(recipe, model, batch, policy)
    record = ledger.record()
    return {
        **found,
        "peak_bytes": record.total_peak_bytes,
        "peak_phase": record.peak_phase,
        "held_activation_bytes": ledger.first_lines("backward")["activations"],
    }


def step(recipe: Recipe, model: nn.Module, batch: Any, policy: Policy) -> None:
    with forward_context(policy, "cpu"):
        loss = recipe.compute_loss(model, batch)
    with backward_context(policy, "cpu"):
        loss.backward()
    for parameter in model.parameters():
        parameter.grad = None


def main() -> None:
    rows = []
    for case, overrides in CASES.items():
        for precision in PRECISIONS:
            for lever in (None, *LEVERS):
                found = row(case, overrides, precision, lever)
                rows.append(found)
                if "error" in found:
                    print(f"{case:<16} {precision:<10} {found['lever']:<12} {found['error']}")
                    continue
                print(f"{case:<16} {precision:<10} {found['lever']:<12} "
                      f"peak {format_bytes(found['peak_bytes']):>10} in {found['peak_phase']:<9} "
                      f"held {format_bytes(found['held_activation_bytes']):>10}",
                      flush=True)  # fmt: skip
    write_results("activation-levers-cpu", rows)


if __name__ == "__main__":
    main()
