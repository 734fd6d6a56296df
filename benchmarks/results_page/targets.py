"""What was set out to be reached on a GPU, and how a record tells whether it was."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from results_page.page import NOT_MEASURED, Records

__all__ = ["TARGETS", "Target"]

_CNNS = ("resnet50", "convnext-t")
Met = tuple[str, bool | None]


@dataclass(frozen=True)
class Target:
    """A target in words; `judge` returns the figure, and whether it is met (None: not measured)."""

    says: str
    judge: Callable[[Records], Met]


def _timed(records: Records, workload: str) -> list[dict[str, Any]]:
    return [
        row
        for row in records.rows("gpu-training")
        if row.get("workload") == workload and "speed_over_baseline" in row
    ]


def _plan_within(workload: str, share: float, speed: float) -> Callable[[Records], Met]:
    """Judge the fastest plan of ours whose peak stays within a share of torch.amp's."""

    def judge(records: Records) -> Met:
        rows = [
            row
            for row in _timed(records, workload)
            if row["kind"] == "narrowcast" and row.get("allocated_over_baseline", 9) <= share
        ]
        if not _timed(records, workload):
            return NOT_MEASURED, None
        if not rows:
            return "no plan of ours stays within it", False
        best = max(rows, key=lambda r: r["speed_over_baseline"]["median"])
        ratio = best["speed_over_baseline"]
        found = f"{ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f}"
        where = f"at {best['allocated_over_baseline']:.3f}, with {best['arm']}"
        return f"{found}, n = {ratio['n']}) {where}", ratio["median"] >= speed

    return judge


def _step_within(model: str, most: float) -> Callable[[Records], Met]:
    def judge(records: Records) -> Met:
        for row in records.rows("gpu-optimizer"):
            wanted = (row.get("model"), row.get("optimizer"))
            if wanted == (model, "narrowcast split16+int8") and "over_fused" in row:
                over = row["over_fused"]
                says = f"{over['median']:.2f} ({over['low']:.2f} to {over['high']:.2f}"
                limit = f"{row['over_limit']:.2f} of the bandwidth's limit"
                return f"{says}, n = {over['n']}); {limit}", over["median"] <= most
        return NOT_MEASURED, None

    return judge


def _predicts(
    counter: str, *, cnns: bool, median: float | None = None, p95: float | None = None
) -> Callable[[Records], Met]:
    def judge(records: Records) -> Met:
        errors = _errors(records, counter, cnns=cnns)
        if not errors:
            return NOT_MEASURED, None
        middle, high = statistics.median(errors), _quantile95(errors)
        met = (median is None or middle <= median) and (p95 is None or high <= p95)
        says = (
            f"{middle:.2f} % median, {high:.2f} % at the 95th percentile, {max(errors):.2f} % worst"
        )
        return f"{says}, n = {len(errors)}", met

    return judge


def _errors(records: Records, counter: str, *, cnns: bool) -> list[float]:
    return [
        abs(row[f"{counter}_error_percent"])
        for row in records.rows("gpu-prediction")
        if f"{counter}_error_percent" in row and (row["model"] in _CNNS) == cnns
    ]


def _quantile95(values: list[float]) -> float:
    """Return the least value that 95 of 100 do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, -(-95 * len(ordered) // 100) - 1)]


def _pass(records: Records) -> Met:
    record = records.get("gpu-tests")
    if record is None:
        return NOT_MEASURED, None
    counts = record.get("counts", {})
    says = ", ".join(f"{count} {what}" for what, count in sorted(counts.items()))
    bad = sum(counts.get(what, 0) for what in ("failed", "error", "not run"))
    return says, bad == 0


TARGETS = (
    Target("all tests that need a GPU pass", _pass),
    *(
        Target(
            f"GPT-2 124M: at most {share} of torch.amp's peak at no less than {speed} of its speed",
            _plan_within("gpt2-124m", share, speed),
        )
        for share, speed in ((0.34, 1.0), (0.15, 0.7), (0.10, 0.5))
    ),
    Target(
        "ResNet-50: at most 0.6 of torch.amp's peak at no less than 0.9 of its speed",
        _plan_within("resnet50", 0.6, 0.9),
    ),
    *(
        Target(
            f"a step of split16+int8 takes at most {most} of fused fp32 AdamW, {says}",
            _step_within(model, most),
        )
        for model, says, most in (
            ("gpt2-124M", "124M parameters", 0.6),
            ("gpt2-774M", "774M parameters", 0.6),
            ("small", "500 small tensors", 1.0),
        )
    ),
    Target(
        "transformers: allocated predicted within 0.5 % median, 2 % at the 95th percentile",
        _predicts("allocated", cnns=False, median=0.5, p95=2.0),
    ),
    Target(
        "transformers: reserved predicted within 1 % median",
        _predicts("reserved", cnns=False, median=1.0),
    ),
    Target(
        "CNNs: allocated predicted within 5 % at the 95th percentile",
        _predicts("allocated", cnns=True, p95=5.0),
    ),
)
