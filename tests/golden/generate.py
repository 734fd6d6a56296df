"""Make the records that the report's tests read: `python tests/golden/generate.py`.

Their numbers are invented, with the proportions of real runs; no claim rests on them.
"""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

from narrowcast.records.codec import dumps, to_json
from narrowcast.records.comparison import (
    ArmRecord,
    ComparisonRecord,
    ControlRecord,
    CurvePoint,
    Protocol,
    VerdictRecord,
)
from narrowcast.records.memory import (
    CATEGORIES,
    BreakEven,
    MemoryLine,
    MemoryRecord,
    ModuleMemory,
    TimelinePoint,
)
from narrowcast.records.run import Environment, Evaluation, RunRecord, SkippedStep, StepPoint

HERE = Path(__file__).parent
SEEDS = (11, 23, 42, 57, 91)
STEPS = 400
MIB = 1024 * 1024

ENVIRONMENT = Environment(
    device="cpu",
    device_name="Example CPU @ 2.0 GHz",
    threads=2,
    platform="Linux-6.1-x86_64",
    python="3.11.9",
    torch="2.13.0+cpu",
    narrowcast="0.1.0",
    commit="0123abc",
)
LINES = {
    "fp32": (6.1, 0, 6.1, 12.2, 41.0, 0, 0.2, 0.9, 7.5, 0),
    "fp16": (6.1, 0, 6.1, 12.2, 22.4, 3.05, 0.2, 0.9, 5.1, 0),
    "bf16": (6.1, 0, 6.1, 12.2, 22.4, 3.05, 0.2, 0.9, 5.0, 0),
    "bf16-true": (3.05, 0, 3.05, 6.1, 20.5, 0, 0.2, 0.5, 3.6, 0),
}
SECONDS = {"fp32": 0.0412, "fp16": 0.0468, "bf16": 0.0391, "bf16-true": 0.0335}


def memory_lines(precision: str) -> dict[str, int]:
    sizes = LINES[precision]
    return {c: int(v * MIB) for c, v in zip(CATEGORIES, sizes, strict=True) if v}


def timeline(precision: str) -> tuple[tuple[str, dict[str, int]], ...]:
    """Rise through forward, peak early in backward, fall, and a plateau in the optimizer."""
    full = memory_lines(precision)
    points = []
    for i in range(120):
        phase = "forward" if i < 48 else "backward" if i < 104 else "optimizer"
        up = min(i / 50, 1.0) if i <= 50 else max(1 - (i - 50) / 54, 0.0)
        grads = 0.0 if i < 50 else min((i - 50) / 54, 1.0)
        shares = {"activations": up, "autocast_casts": up, "gradients": grads}
        shares["temporaries"] = 0.15 if i < 48 else up if i < 104 else 0.05
        points.append((phase, {c: int(full[c] * shares.get(c, 1.0)) for c in full}))
    return tuple(points)


def curve(seed: int, precision: str, n: int = 60, diverges: bool = False) -> tuple[CurvePoint, ...]:
    shared, own = random.Random(seed), random.Random(f"{seed}{precision}")
    points = []
    for i in range(n):
        step = 1 + i * (STEPS - 1) // (n - 1)
        loss = 0.38 + 1.92 * math.exp(-step / 70) + shared.gauss(0, 0.05) + own.gauss(0, 0.008)
        broken = diverges and i > 35
        points.append(
            CurvePoint(
                step=step,
                loss=math.nan if broken else max(loss, 0.05),
                loss_scale=scale_at(precision, i, broken),
                applied=not (precision == "fp16" and i in (0, 1, 30)) and not broken,
            )
        )
    return tuple(points)


def scale_at(precision: str, i: int, broken: bool) -> float:
    if precision != "fp16":
        return 1.0
    if broken:
        return max(2.0**14 / 2 ** (i - 35), 1.0)
    return 2.0 ** (16 - min(i, 2) - (1 if i > 30 else 0))


def arm(precision: str, *, shift: float, noise: float, diverged: tuple[int, ...] = ()) -> ArmRecord:
    rng = random.Random(precision)
    accuracy: list[float | None] = []
    for seed in SEEDS:
        base = 0.8612 + random.Random(seed).gauss(0, 0.004)
        value = base + shift + rng.gauss(0, noise)
        accuracy.append(None if seed in diverged else round(value, 4))
    kept = [a for a in accuracy if a is not None]
    mean = sum(kept) / len(kept)
    sd = math.sqrt(sum((a - mean) ** 2 for a in kept) / (len(kept) - 1))
    lower = 0.0 if precision == "fp32" else 0.0004
    own = tuple(None if a is None else round(a - lower, 4) for a in accuracy)
    losses = tuple(None if a is None else round(1.24 - a, 4) for a in accuracy)
    low = "bf16" if precision.startswith("bf16") else precision
    memory = memory_lines(precision)
    return ArmRecord(
        precision=precision,
        seeds=SEEDS,
        metrics={"accuracy": tuple(accuracy), "loss": losses},
        training_precision_metrics={"accuracy": own, "loss": losses},
        final_losses=losses,
        diverged=diverged,
        failures=tuple(f"seed {s}: loss is NaN from step 241 on" for s in diverged),
        peak_bytes=sum(memory.values()),
        step_seconds=SECONDS[precision],
        step_seconds_per_seed=tuple(SECONDS[precision] * (1 + rng.gauss(0, 0.02)) for _ in SEEDS),
        skipped_steps=15 if precision == "fp16" else 0,
        total_steps=STEPS * len(SEEDS),
        skipped_steps_per_seed=tuple(3 if precision == "fp16" else 0 for _ in SEEDS),
        executed_dtypes={
            "matmul": {low: 18} if precision != "fp32" else {"fp32": 18},
            "convolution": {low: 27} if precision != "fp32" else {"fp32": 27},
            "normalisation": {"fp32": 12},
            "loss": {"fp32": 2},
        },
        precision_honoured=True,
        initial_weights_hashes=tuple(f"{s:064x}" for s in SEEDS),
        data_order_hashes=tuple(f"{s * 7919:064x}" for s in SEEDS),
        memory_lines=memory,
        memory_timeline=tuple((phase, sum(c.values())) for phase, c in timeline(precision)),
        curves=tuple(curve(s, precision, diverges=s in diverged) for s in SEEDS),
        run_directories=tuple(f"arms/{precision}/seed-{s}" for s in SEEDS),
        metric_means={"accuracy": mean, "loss": 1.24 - mean},
        metric_sds={"accuracy": sd, "loss": sd},
    )


def differences(a: ArmRecord, reference: ArmRecord) -> tuple[float | None, ...]:
    pairs = zip(a.metrics["accuracy"], reference.metrics["accuracy"], strict=True)
    return tuple(None if x is None or y is None else x - y for x, y in pairs)


def verdict(a: ArmRecord, reference: ArmRecord, word: str, why: str, **extra) -> VerdictRecord:
    d = differences(a, reference)
    kept = [x for x in d if x is not None]
    mean = sum(kept) / len(kept)
    sd = math.sqrt(sum((x - mean) ** 2 for x in kept) / (len(kept) - 1))
    half = 2.132 * sd / math.sqrt(len(kept))  # t quantile for n=5
    interval = (mean - half, mean + half)
    fields = {
        "margin": 0.01,
        "smallest_margin": max(-interval[0], 0.0),
        "detectable_harm": 1.4 * half,
        "correlation": 0.71,
        "unpaired_interval": (mean - 1.6 * half, mean + 1.6 * half),
        "training_precision_difference": mean - 0.0001,
        "training_precision_interval": (interval[0] - 0.0001, interval[1] - 0.0001),
    }
    return VerdictRecord(
        precision=a.precision, verdict=word, why=why, difference=mean, interval=interval,
        paired_interval=interval, n=len(kept), differences=d, **(fields | extra),
    )  # fmt: skip


def protocol(arms: tuple[str, ...]) -> Protocol:
    return Protocol(
        recipe="fashion",
        options={"model": "resnet", "batch_size": 64, "lr": 0.002},
        metric="accuracy",
        direction="higher",
        margin=0.01,
        margin_text="0.01",
        steps=STEPS,
        seeds=SEEDS,
        reference="fp32",
        arms=arms,
        evaluation_precision="fp32",
        confidence=0.95,
        device="cpu",
        written="2026-11-23T10:02:11+00:00",
        hash="7f3a91c2" * 8,
    )


UNTESTED = (
    "a longer horizon than 400 steps: harm that builds up later would not show",
    "other data than fashion and other models than resnet",
    "another device than Example CPU @ 2.0 GHz",
    "other hyperparameters: a learning rate that suits fp32 was used in every arm",
)


def comparison(
    arms: tuple[ArmRecord, ...], verdicts: tuple[VerdictRecord, ...], warnings: tuple[str, ...] = ()
) -> ComparisonRecord:
    reference = arms[0]
    control = arm("fp32", shift=0.0003, noise=0.0011)
    return ComparisonRecord(
        protocol=protocol(tuple(a.precision for a in arms)),
        arms=arms,
        control=ControlRecord(
            arm=control,
            perturbation="1 ulp added to one weight of conv1, chosen where the gradient is largest",
            loss_changed=tuple(True for _ in SEEDS),
            sd_of_difference=0.0011,
            differences=tuple(d and d * 0.2 for d in differences(control, reference)),
        ),
        verdicts=verdicts,
        untested=UNTESTED,
        warnings=warnings,
        environment=ENVIRONMENT,
        started="2026-11-23T10:02:12+00:00",
        finished="2026-11-23T10:09:40+00:00",
        command="narrowcast compare fashion --precisions fp32,fp16,bf16 --seeds 5 --margin 0.01",
    )


def good() -> ComparisonRecord:
    fp32 = arm("fp32", shift=0, noise=0.001)
    fp16 = arm("fp16", shift=-0.0006, noise=0.0016)
    bf16 = arm("bf16", shift=-0.0015, noise=0.0042)
    return comparison(
        (fp32, fp16, bf16),
        (
            verdict(
                fp16, fp32, "NON-INFERIOR",
                "With 95 % confidence fp16 loses at most 0.0024 accuracy, less than the margin of "
                "0.01 that was fixed beforehand.",
            ),
            verdict(
                bf16, fp32, "NON-INFERIOR",
                "With 95 % confidence bf16 loses at most 0.0061 accuracy, less than the margin of "
                "0.01 that was fixed beforehand.",
                correlation=0.12,
            ),
        ),
        ("fp16 convolutions have no fast kernel on this CPU: the step takes longer than in fp32.",),
    )  # fmt: skip


def bad() -> ComparisonRecord:
    fp32 = arm("fp32", shift=0, noise=0.001)
    fp16 = arm("fp16", shift=-0.004, noise=0.003, diverged=(23, 57))
    bf16 = arm("bf16", shift=-0.024, noise=0.004)
    true = arm("bf16-true", shift=-0.008, noise=0.009)
    return comparison(
        (fp32, fp16, bf16, true),
        (
            verdict(
                fp16, fp32, "FAILED", "2 of 5 runs in fp16 diverged; all 5 in fp32 did not.",
                failed_runs=2, failure_rate_upper=0.811,
            ),
            verdict(
                bf16, fp32, "WORSE",
                "bf16 is worse by 0.024 accuracy, more than the margin of 0.01, and the interval "
                "excludes zero.",
                failure_rate_upper=0.451,
            ),
            verdict(
                true, fp32, "INCONCLUSIVE",
                "The harm could be as large as 0.017, above the margin of 0.01, or none at all; "
                "about 11 seeds would be needed.",
                n_needed=11, failure_rate_upper=0.451,
            ),
        ),
        ("bf16-true: 2 of 18 matrix products ran in fp32.",),
    )  # fmt: skip


def run() -> RunRecord:
    return RunRecord(
        recipe="fashion",
        options={"model": "resnet", "batch_size": 64, "lr": 0.002},
        precision="fp16",
        plan={
            "name": "fp16",
            "policy": {
                "name": "fp16", "param": "fp32", "compute": "fp16", "keep_fp32": ["BatchNorm2d"]
            },
        },
        seed=42,
        planned_steps=STEPS,
        completed_steps=STEPS,
        applied_steps=STEPS - 4,
        batch_size=64,
        status="finished",
        evaluations=tuple(
            Evaluation(
                step=step, precision=p, examples=2000,
                metrics={"accuracy": a - (0.0004 if p == "fp16" else 0), "loss": 1.24 - a},
            )
            for step, a in ((100, 0.781), (200, 0.832), (300, 0.853), (400, 0.8625))
            for p in ("fp32", "fp16")
        ),
        final_loss=0.3841,
        peak_bytes=sum(memory_lines("fp16").values()),
        memory=memory("fp16"),
        step_seconds=0.0468,
        samples_per_second=1367.5,
        skipped=tuple(
            SkippedStep(
                step=s, reason="gradient overflow", loss_scale=scale,
                parameters=("stem.weight", "stages.0.conv1.weight"),
            )
            for s, scale in ((1, 65536.0), (2, 32768.0), (201, 16384.0), (202, 8192.0))
        ),
        skipped_steps=4,
        executed_dtypes=arm("fp16", shift=0, noise=0.001).executed_dtypes,
        precision_honoured=True,
        initial_weights_hash="ab" * 32,
        data_order_hash="cd" * 32,
        environment=ENVIRONMENT,
        started="2026-11-23T10:02:12+00:00",
        finished="2026-11-23T10:02:31+00:00",
        warnings=("fp16 convolutions have no fast kernel on this CPU.",),
        command="narrowcast train fashion --precision fp16 --seed 42",
    )  # fmt: skip


def points() -> list[StepPoint]:
    rng = random.Random(42)
    skipped = {1: 65536.0, 2: 32768.0, 201: 16384.0, 202: 8192.0}
    out = []
    for step in range(1, STEPS + 1):
        scale = 16384.0 if step < 201 else 4096.0
        out.append(
            StepPoint(
                step=step,
                loss=max(0.05, 0.38 + 1.92 * math.exp(-step / 70) + rng.gauss(0, 0.07)),
                loss_scale=skipped.get(step, scale),
                gradient_norm=math.inf if step in skipped else abs(rng.gauss(1.2, 0.3)),
                applied=step not in skipped,
                reason="gradient overflow" if step in skipped else "",
                seconds=0.0468 * (1 + abs(rng.gauss(0, 0.06))) + (0.3 if step == 1 else 0),
                learning_rate=0.002 * (0.5 + 0.5 * math.cos(math.pi * step / STEPS)),
            )
        )
    return out


def memory(precision: str) -> MemoryRecord:
    lines = memory_lines(precision)
    modules = ["", "stem", *(f"stages.{i}.conv{j}" for i in range(3) for j in (1, 2)), "head"]
    names = [f"ResNet.{m}" if m else "ResNet" for m in modules]
    return MemoryRecord(
        recipe="fashion",
        precision=precision,
        device="cpu",
        batch_size=64,
        total_peak_bytes=sum(lines.values()),
        peak_phase="backward",
        peak_module="ResNet.stages.0.conv2",
        lines=tuple(MemoryLine(category=c, bytes=b) for c, b in lines.items()),
        modules=tuple(
            ModuleMemory(
                name=name,
                bytes=lines["activations"] // (i + 2) + 4096,
                categories={"activations": lines["activations"] // (i + 2), "parameters": 4096},
            )
            for i, name in enumerate(names)
        ),
        timeline=tuple(
            TimelinePoint(
                index=i * 7, phase=phase, module=names[i * len(names) // 120],
                bytes=sum(cats.values()), categories=cats,
            )
            for i, (phase, cats) in enumerate(timeline(precision))
        ),
        break_even=BreakEven(
            batch_size=9.4,
            cast_bytes=int(3.05 * MIB),
            saved_bytes_per_sample=0.324 * MIB,
            why="autocast keeps a half-size copy of every weight until backward, and saves half of "
            "each activation: it takes less from batch 10 on",
        ),
        notes=("the step measured is the third, with optimizer state in place",),
        options={"model": "resnet", "batch_size": 64, "lr": 0.002},
    )  # fmt: skip


def main() -> None:
    for name, record in {
        "comparison": good(), "comparison_bad": bad(), "run": run(), "memory": memory("bf16"),
    }.items():  # fmt: skip
        text = json.dumps(json.loads(dumps(record)), separators=(",", ":"))
        (HERE / f"{name}.json").write_text(text + "\n")
    lines = [json.dumps(to_json(p)) for p in points()]
    evaluations = [json.dumps(to_json(e)) for e in run().evaluations]
    (HERE / "metrics.jsonl").write_text("\n".join(lines + evaluations) + "\n")


if __name__ == "__main__":
    main()
