"""Memory of a rank and what it sends a step, for 1 to 1,024 ranks and 124M to 70B parameters.

    python benchmarks/scaling.py compute [SHAPE ...]   into the record, shape by shape
    python benchmarks/scaling.py check                 against predictions, and ranks that are run
    python benchmarks/scaling.py render                docs/scaling.md and its chart

Computed, not measured: torch's own DDP and FSDP2 on tensors without contents (`narrowcast predict
--world --parallel`). DDP is traced whole, FSDP2 on models of four and of five blocks. Their steps
are cut into stretches: before the blocks, in each of the first two and of the last two, after them;
in forward, backward and update. The highest moment of each grows by the same amount with every
block, since all blocks that have two neighbours do alike, but for small gradients that are sent
together with those of the next. The peak of the whole model is the highest of the stretches so
extended. That is held against predictions of all twelve blocks of GPT-2, and predictions against
ranks that were run. The record is benchmarks/results/scaling.json.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from provenance import RESULTS, provenance
from scaling_page import page
from torch._subclasses.fake_tensor import FakeTensorMode

import narrowcast.memory.measure as ledger
from narrowcast.files import write_atomically
from narrowcast.optim.sizes import bytes_for
from narrowcast.parallel.meeting import Meeting
from narrowcast.parallel.together import Together, together_in
from narrowcast.plan import plan_named
from narrowcast.prediction.predict import predict_memory
from narrowcast.recipes.load import load_recipe
from narrowcast.records.memory import MemoryRecord
from narrowcast.training.early_steps import MEMORY_AT
from narrowcast.training.train import TrainOptions, train

RECIPE = Path(__file__).parent / "gpt_shapes.py"
RECORD = RESULTS / "scaling.json"
ROOT = Path(__file__).parents[1]
PLANS = ("fp32", "bf16", "bf16-split", "lean")
KINDS = ("ddp", "fsdp2")
RANKS = (1, 4, 16, 64, 256, 1024)
GPU = "h200"
_HELD = ("parameters", "master_weights", "optimizer_state", "gradients")


class Shape(NamedTuple):
    layers: int
    width: int
    heads: int
    context: int
    vocabulary: int = 50_304

    def options(self, *, batch_size: int, layers: int | None = None) -> list[str]:
        values = self._replace(layers=layers or self.layers)._asdict()
        return [*(f"{name}={value}" for name, value in values.items()), f"batch_size={batch_size}"]

    @property
    def parameters(self) -> int:
        """Of a GPT with a tied head, learned positions and biases."""
        block = 12 * self.width**2 + 13 * self.width
        rest = (self.vocabulary + self.context + 2) * self.width
        return self.layers * block + rest


SHAPES = {
    "124M": Shape(12, 768, 12, 1024),
    "354M": Shape(24, 1024, 16, 1024),
    "1.3B": Shape(24, 2048, 16, 2048),
    "6.7B": Shape(32, 4096, 32, 2048),
    "13B": Shape(40, 5120, 40, 2048),
    "70B": Shape(86, 8192, 64, 2048),
}


class Step(NamedTuple):
    """What one rank holds and sends, of a model with some number of blocks."""

    stretches: dict[str, int]
    """The highest total within each stretch of the step."""
    held: int
    """What lies there when a step begins: weights, masters, states, buckets."""
    sent: dict[str, int]

    @property
    def peak(self) -> int:
        return max(self.stretches.values())

    def extended(self, other: Step, blocks: int) -> Step:
        """Return the step with so many blocks more; `other` has one more than this."""

        def grown(few: int, more: int) -> int:
            return few + blocks * (more - few)

        return Step(
            {name: grown(size, other.stretches[name]) for name, size in self.stretches.items()},
            grown(self.held, other.held),
            {name: grown(size, other.sent[name]) for name, size in self.sent.items()},
        )


def predicted(
    shape: Shape, plan: str, kind: str, ranks: int, *, layers: int | None = None, device: str = GPU
) -> MemoryRecord:
    """Predict a rank of a model with one sequence on each rank."""
    options = shape.options(batch_size=ranks, layers=layers)
    return predict_memory(
        RECIPE, plan, options=options, device=device, world=ranks, parallel=kind, break_even=False
    )


def step_of(record: MemoryRecord, layers: int) -> Step:
    found: dict[str, int] = {}
    for name, size in _stretches(record, layers):
        found[name] = max(found.get(name, 0), size)
    start = record.timeline[0].categories
    held = sum(start.get(name, 0) for name in _HELD)
    return Step(found, held, record.sent_bytes)


def _stretches(record: MemoryRecord, layers: int) -> Iterator[tuple[str, int]]:
    """Yield each moment's stretch: what lies between two blocks belongs to the one before."""
    phase, where = "", "before"
    for point in record.timeline:
        if point.phase != phase:
            phase, where = point.phase, "before"
        head, _, rest = point.module.partition(".")
        if head == "blocks" and rest:
            number = int(rest.partition(".")[0])
            ends = {0: "first", 1: "second", layers - 2: "last but one", layers - 1: "last"}
            where = ends.get(number, "middle")
        elif not point.module.startswith("(") and where in ("first", "last"):
            ended = "last" if phase == "forward" else "first"
            where = "after" if where == ended else where
        # What grows evenly from the second block to the last but one is highest in one of them.
        if where != "middle":
            yield f"{phase} {where}", point.bytes


def computed(shape: Shape, plan: str, kind: str, ranks: int, *, device: str = GPU) -> Step:
    """Extend four blocks by what the fifth one adds; with DDP all of them are traced.

    Its buckets are filled without regard to blocks, so that nothing repeats.
    """
    if kind == "ddp":
        return step_of(predicted(shape, plan, kind, ranks, device=device), shape.layers)
    four, five = (
        step_of(predicted(shape, plan, kind, ranks, layers=n, device=device), n) for n in (4, 5)
    )
    return four.extended(five, shape.layers - 4)


def rows_of(name: str) -> list[dict[str, Any]]:
    """Compute every plan, kind and number of ranks of one shape."""
    shape, rows = SHAPES[name], []
    for plan in PLANS:
        for kind in KINDS:
            for ranks in RANKS if kind == "fsdp2" else (4,):
                step = computed(shape, plan, kind, ranks)
                row = {
                    "shape": name, "plan": plan, "parallel": kind, "ranks": ranks,
                    "peak_bytes": step.peak, "held_bytes": step.held, "sent_bytes": step.sent,
                }  # fmt: skip
                rows += [row] if kind == "fsdp2" else list(_replicas(row))
                print(name, plan, kind, ranks, f"{step.peak / 2**30:.2f} GiB", flush=True)
    return rows


def _replicas(row: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the rows of all numbers of ranks: with DDP a rank holds the same, and sends more."""
    whole = row["sent_bytes"]["all_reduce"] * row["ranks"] / (row["ranks"] - 1)
    for ranks in RANKS:
        sent = {"all_reduce": round(whole * (ranks - 1) / ranks)}
        yield {**row, "ranks": ranks, "sent_bytes": sent}


def depth_checks() -> list[dict[str, Any]]:
    """Hold the extension by blocks against predictions of all blocks of GPT-2 124M."""
    shape, rows = SHAPES["124M"], []
    for plan in PLANS:
        whole = predicted(shape, plan, "fsdp2", 4).total_peak_bytes
        peak = computed(shape, plan, "fsdp2", 4).peak
        rows.append({"plan": plan, "parallel": "fsdp2", "extended": peak, "whole": whole})
        print("depth", plan, peak, whole, f"{peak / whole - 1:+.3%}", flush=True)
    return rows


SMALL = Shape(6, 256, 4, 128, 512)
"""What gloo ranks on two cores can train."""


def rank_checks() -> list[dict[str, Any]]:
    """Train on 2 and 4 gloo ranks, and compare what their ledgers measured."""
    rows = []
    for ranks in (2, 4):
        with tempfile.TemporaryDirectory() as place:
            command = [
                sys.executable, "-m", "torch.distributed.run", "--standalone",
                f"--nproc-per-node={ranks}", __file__, "_rank", place,
            ]  # fmt: skip
            env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}
            subprocess.run(command, env=env, check=True, timeout=600, stderr=subprocess.DEVNULL)
            seen = [json.loads((Path(place) / f"{rank}.json").read_text()) for rank in range(ranks)]
        for kind in KINDS:
            for plan in PLANS:
                peaks = [rank[f"{kind} {plan}"] for rank in seen]
                record = predicted_small(plan, kind, ranks)
                row = {
                    "plan": plan, "parallel": kind, "ranks": ranks, "measured": peaks,
                    "predicted": record.total_peak_bytes,
                    "computed": computed(SMALL, plan, kind, ranks, device="cpu").peak,
                }  # fmt: skip
                rows.append(row)
                print(row, flush=True)
    return rows


def predicted_small(plan: str, kind: str, ranks: int) -> MemoryRecord:
    return predicted(SMALL, plan, kind, ranks, device="cpu")


def one_rank_of_a_check(place: Path) -> None:
    """Be one rank: train every plan both ways, and leave the peaks."""
    first = together_in("ddp", os.environ).meeting
    world, seen = first.world, {}
    options = SMALL.options(batch_size=world.size)
    for number, (kind, plan) in enumerate((k, p) for k in KINDS for p in PLANS):
        met = Meeting(replace(world, attempt=number + 1), first.store)
        with met.failing_together():
            record = train(
                load_recipe(str(RECIPE), options),
                plan_named(plan),
                TrainOptions(steps=100, watch=0, checkpoint_every=100),
                place / f"{kind}-{plan}",
                stop_at=MEMORY_AT,
                device=torch.device("cpu"),
                together=Together(kind=kind, meeting=met),
            )
        assert record.memory is not None
        seen[f"{kind} {plan}"] = record.memory.total_peak_bytes
    (place / f"{world.rank}.json").write_text(json.dumps(seen))


def quarters(checks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Hold four ranks of FSDP2 with `lean` against a quarter of the state, and the activations.

    The state is what one process holds that FSDP2 divides: weights, remainders and moments, by the
    stores, and gradients. Activations are all that its peak holds beside it, with one rank's part
    of the batch.
    """
    rows = []
    for name, shape in {"six blocks": SMALL, **SHAPES}.items():
        if shape.layers > 24:
            continue
        options = shape.options(batch_size=1)
        alone = predict_memory(RECIPE, "lean", options=options, break_even=False)
        lines = {line.category: line.bytes for line in alone.lines}
        held = sum(lines[name] for name in _HELD) - lines["gradients"]
        assert held == _held_by_stores(options), "a prediction allocates what the stores announce"
        rest = alone.total_peak_bytes - held - lines["gradients"]
        row = {
            "shape": name,
            "state_bytes": held + lines["gradients"],
            "activation_bytes": rest,
            "expected_bytes": (held + lines["gradients"]) // 4 + rest,
            "predicted_bytes": predicted(shape, "lean", "fsdp2", 4, device="cpu").total_peak_bytes,
        }
        if shape is SMALL:
            asked = ("lean", "fsdp2", 4)
            run = next(c for c in checks if (c["plan"], c["parallel"], c["ranks"]) == asked)
            row["measured_bytes"] = min(run["measured"])
        print(row, flush=True)
        rows.append(row)
    return rows


def _held_by_stores(options: list[str]) -> int:
    plan = plan_named("lean")
    model = load_recipe(str(RECIPE), options).build_model
    with FakeTensorMode():
        numels = [p.numel() for p in model().parameters()]
    return bytes_for(numels, rule="adamw", weights=plan.weights, states=plan.states).total


def update(**parts: Any) -> None:
    """Put parts into the record, and say of each where and when it was made."""
    record = json.loads(RECORD.read_text()) if RECORD.exists() else {"rows": [], "made": {}}
    record = {**record, **provenance(), **parts}
    record["made"] = {**record["made"], **dict.fromkeys(parts, provenance()["date"])}
    write_atomically(RECORD, json.dumps(record, indent=1) + "\n")


def main(verb: str, *words: str) -> None:
    ledger._MOST_POINTS = 1_000_000  # type: ignore[misc] -- every moment, for the stretches
    if verb == "compute":
        for name in words or SHAPES:
            known = json.loads(RECORD.read_text())["rows"] if RECORD.exists() else []
            update(rows=[row for row in known if row["shape"] != name] + rows_of(name))
    elif verb == "check":
        update(depth=depth_checks())
        checks = rank_checks()
        update(checks=checks, quarters=quarters(checks))
    elif verb == "_rank":
        one_rank_of_a_check(Path(words[0]))
    else:
        shapes = {name: {**s._asdict(), "parameters": s.parameters} for name, s in SHAPES.items()}
        page(json.loads(RECORD.read_text()), shapes, ROOT / "docs")


if __name__ == "__main__":
    main(*(sys.argv[1:] or ["render"]))
