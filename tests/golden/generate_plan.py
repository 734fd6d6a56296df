"""Make the plan that the report's tests read: `python tests/golden/generate_plan.py`.

Its numbers are invented, with the proportions of real ones; no claim rests on them.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch

from narrowcast.optim.adamw import AdamW
from narrowcast.plan import AUTO_BLOCKS, PLANS, ActivationRule, Plan
from narrowcast.planning.axes import effects_of, is_exact, named
from narrowcast.planning.code import code_of
from narrowcast.policy import Policy
from narrowcast.records.codec import dumps, to_json
from narrowcast.records.plan import PlanPoint, PlanRecord, SpeedSource
from narrowcast.records.run import Environment

HERE = Path(__file__).parent
MIB = 1024 * 1024
SPLIT = Plan(
    name="p", policy=Policy(name="p", param="bf16", compute="bf16"), weights="split16",
    states="int8",
)  # fmt: skip
CHECKPOINT = (ActivationRule(modules=AUTO_BLOCKS, lever="checkpoint"),)

# Plan, MiB at the peak, milliseconds a step, where the speed comes from.
POINTS: tuple[tuple[Plan, float, float, SpeedSource], ...] = (
    (PLANS["bf16"], 312.4, 391.0, "measured"),
    (named(replace(SPLIT, states="fp32")), 254.9, 402.0, "measured"),
    (PLANS["bf16-split"], 196.1, 409.0, "measured"),
    (named(replace(SPLIT, activations=CHECKPOINT)), 121.7, 468.0, "measured"),
    (named(replace(SPLIT, activations=CHECKPOINT, loss="chunked")), 104.2, 489.0, "estimated"),
    (
        named(
            replace(SPLIT, weights="split8", states="int4", activations=CHECKPOINT, micro_batches=4)
        ),
        71.5,
        537.0,
        "estimated",
    ),
)
CHOSEN = 3


def _optimizer(plan: Plan) -> AdamW:
    weight = torch.nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
    return AdamW([weight], lr=3e-4, betas=(0.9, 0.95), weights=plan.weights, states=plan.states)


def point(plan: Plan, mib: float, milliseconds: float, speed: SpeedSource) -> PlanPoint:
    size = int(mib * MIB)
    return PlanPoint(
        name=plan.name,
        plan=to_json(plan),
        exact=is_exact(plan, batch_norm=False),
        predicted_bytes=size,
        traced=speed == "measured",
        seconds=milliseconds / 1e3,
        speed=speed,
        spread=0.021 if speed == "measured" else 0.0,
        measured_bytes=size if speed == "measured" else None,
    )


def plan() -> PlanRecord:
    """Return the plan of a GPT for 150 MiB."""
    points = tuple(point(*each) for each in POINTS)
    chosen = POINTS[CHOSEN][0]
    return PlanRecord(
        recipe="austen",
        options={"size": "small", "batch_size": 8, "dropout": 0.0},
        batch_size=8,
        budget_bytes=150 * MIB,
        precisions=("auto",),
        chosen=points[CHOSEN],
        why="the fastest of 5 that fit and were compared: 468 ms a step (measured), 122 MiB at "
        "the peak",
        effects=effects_of(chosen, batch_norm=False),
        frontier=points,
        considered=520,
        traced=31,
        measured=4,
        noise=0.05,
        notes=("chunked loss saves nothing here: the logits are a small part",),
        command="narrowcast train austen --set size=small --plan plan.json",
        code=code_of(chosen, _optimizer(chosen)),
        device="cpu",
        seconds=94.0,
        environment=Environment(
            device="cpu",
            device_name="Example CPU @ 2.0 GHz",
            threads=2,
            platform="Linux-6.1-x86_64",
            python="3.11.9",
            torch="2.13.0+cpu",
            narrowcast="0.1.0",
            commit="0123abc",
        ),
    )


if __name__ == "__main__":
    text = json.dumps(json.loads(dumps(plan())), separators=(",", ":"))
    (HERE / "plan.json").write_text(text + "\n")
