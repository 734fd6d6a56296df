"""The GPU's part of the page: every target with its figure, or with "not yet measured"."""

from __future__ import annotations

from collections.abc import Iterator

from narrowcast.units import format_bytes
from results_page.page import NOT_MEASURED, Page, Records, table
from results_page.svg import Bar, Point, Series, bars, lines, scatter
from results_page.targets import TARGETS

__all__ = ["gpu_pages"]

_WORKLOADS = {
    "gpt2-124m": "GPT-2 124M, 8 x 1024 tokens",
    "gpt2-350m": "GPT-2 350M, 8 x 1024 tokens",
    "resnet50": "ResNet-50, 128 images of 224 px",
    "vit-b16": "ViT-B/16, 64 images of 224 px",
}
_GROUPS = {"narrowcast": 0, "torch.amp": 1, "peer": 2}


def gpu_pages(records: Records, page: Page) -> None:
    page.say("## On a GPU")
    if records.get("gpu-training") is None:
        page.say(
            "No GPU was at hand when this page was written: everything below that says "
            f"*{NOT_MEASURED}* is code that has been rehearsed on a CPU (`python benchmarks/gpu.py "
            "--rehearse`) and has never run on CUDA. `make gpu` measures it, within ten minutes by "
            "its own clock, and `make results` writes this page again."
        )
    page.say("### Targets", table(("target", "measured", "met"), _targets(records)))
    _planned(records, page)
    for name in _WORKLOADS:
        _training(records, page, name)
    _optimizer(records, page)
    _prediction(records, page)
    _convergence(records, page)
    _tests(records, page)


def _targets(records: Records) -> Iterator[tuple[str, str, str]]:
    for target in TARGETS:
        value, met = target.judge(records)
        yield target.says, value, "-" if met is None else "yes" if met else "**no**"


def _planned(records: Records, page: Page) -> None:
    """Show the plans that were chosen before any GPU was there, with what was predicted of them."""
    record = records.get("gpu-plans")
    if record is None:
        return
    page.say(
        "### Plans chosen without a GPU",
        f"Chosen from peaks predicted for `{record['predicted_for']}`, none of it measured: the "
        "first plan of a ladder, from the fastest to the leanest, whose predicted peaks stay "
        "within a share of what is predicted for `torch.amp` with fused AdamW.",
    )
    rows = []
    for row in record["rows"]:
        whole, found = row["torch_amp"], row.get("predicted")
        peak = "-" if found is None else format_bytes(found["allocated_bytes"])
        part = (
            "-" if found is None else f"{found['allocated_bytes'] / whole['allocated_bytes']:.3f}"
        )
        rows.append((_WORKLOADS[row["workload"]], row["share"],
                     f"`{row['name']}`" if "name" in row else row["not_found"],
                     format_bytes(whole["allocated_bytes"]), peak, part))  # fmt: skip
    head = (
        "workload",
        "share",
        "plan",
        "torch.amp, predicted",
        "plan, predicted",
        "share, predicted",
    )
    page.say(table(head, rows))
    page.source("gpu-plans", record)


def _training(records: Records, page: Page, name: str) -> None:
    page.say(f"### {_WORKLOADS[name]}")
    rows = [r for r in records.rows("gpu-training") if r.get("workload") == name]
    timed = [r for r in rows if "step_s" in r]
    record = records.get("gpu-training")
    if not timed or record is None:
        page.say(f"Speed and memory: *{NOT_MEASURED}*.")
        return
    body = []
    for row in timed:
        step, speed = row["step_s"], row.get("speed_over_baseline")
        body.append(
            (
                row["arm"],
                f"{step['median'] * 1e3:.2f} ({step['low'] * 1e3:.2f} to {step['high'] * 1e3:.2f})",
                f"{row['units_per_s']:,.0f}",
                f"{speed['median']:.3f}" if speed else "-",
                format_bytes(row["peak"]["allocated_bytes"]) if row.get("peak") else "-",
                f"{row['allocated_over_baseline']:.3f}"
                if "allocated_over_baseline" in row
                else "-",
                format_bytes(row["peak"]["reserved_bytes"]) if row.get("peak") else "-",
            )
        )
    unit = timed[0]["unit"]
    head = ("loop", "ms a step", f"{unit}/s", "speed over torch.amp bf16", "allocated", "share",
            "reserved")  # fmt: skip
    page.say(table(head, body))
    for row in rows:
        why = row.get("not_run") or row.get("not_timed")
        if why:
            page.say(f"Not run: {row['arm']}: {why}.")
    points = [
        Point(label=r["arm"], x=r["allocated_over_baseline"], y=r["speed_over_baseline"]["median"],
              group=_GROUPS[r["kind"]])
        for r in timed
        if "allocated_over_baseline" in r and "speed_over_baseline" in r
    ]  # fmt: skip
    if points:
        title = f"{_WORKLOADS[name]}: memory and speed"
        axes = {"x_axis": "peak allocated over torch.amp bf16's",
                "y_axis": "speed over torch.amp bf16's"}  # fmt: skip
        page.chart(f"gpu-{name}", scatter(title, points, marks=(1.0, 1.0), **axes), title)
    rounds = timed[0]["step_s"]["n"]
    page.source("gpu-training", record, n=f"{rounds} interleaved rounds, median and quartiles")


def _optimizer(records: Records, page: Page) -> None:
    page.say("### One optimizer step")
    record = records.get("gpu-optimizer")
    rows = [r for r in records.rows("gpu-optimizer") if "ms" in r]
    if record is None or not rows:
        page.say(f"Time of a step and the limit of the memory's bandwidth: *{NOT_MEASURED}*.")
        return
    body = [
        (
            row["model"],
            row["optimizer"],
            f"{row['bytes_per_parameter']:.2f}",
            f"{row['ms']['median']:.3f} ({row['ms']['low']:.3f} to {row['ms']['high']:.3f})",
            f"{row['limit_ms']:.3f}",
            f"{row['over_fused']['median']:.2f}" if "over_fused" in row else "-",
        )
        for row in rows
    ]
    head = ("model", "optimizer", "bytes a parameter", "ms", "limit, ms", "over fused fp32")
    page.say(table(head, body))
    for model in dict.fromkeys(r["model"] for r in rows):
        shown = [
            Bar(label=r["optimizer"], value=r["ms"]["median"], low=r["ms"]["low"],
                high=r["ms"]["high"], group=0 if "narrowcast" in r["optimizer"] else 1)
            for r in rows if r["model"] == model
        ]  # fmt: skip
        title = f"One step, {model}"
        page.chart(f"gpu-optimizer-{model.lower()}", bars(title, shown, axis="ms"), title)
    speed = record.get("copy_bytes_per_s", 0) / 1e12
    page.source(
        "gpu-optimizer",
        record,
        n=f"{rows[0]['ms']['n']} interleaved rounds; a copy moves {speed:.2f} TB/s",
    )


def _prediction(records: Records, page: Page) -> None:
    page.say("### Predicted against measured peaks")
    record = records.get("gpu-prediction")
    rows = [r for r in records.rows("gpu-prediction") if r.get("measured")]
    if record is None or not rows or "allocated_error_percent" not in rows[-1]:
        page.say(
            f"24 workloads on a GPU at hand: *{NOT_MEASURED}*. Peaks that others published are in "
            "[the CPU part](#gpu-peaks-that-others-published) of this page."
        )
        return
    body = [
        (
            f"{row['model']}, batch {row['batch']}, {row['precision']}",
            format_bytes(row["measured"]["allocated_bytes"]),
            f"{row['allocated_error_percent']:+.2f} %",
            format_bytes(row["measured"]["reserved_bytes"]),
            f"{row['reserved_error_percent']:+.2f} %",
        )
        for row in rows
        if "allocated_error_percent" in row
    ]
    page.say(table(("workload", "allocated", "predicted", "reserved", "predicted"), body))
    page.source("gpu-prediction", record, n=f"{len(body)} rows, one measurement each")


def _convergence(records: Records, page: Page) -> None:
    page.say("### Learning at the size of GPT-2 124M")
    record = records.get("gpu-convergence")
    rows = [r for r in records.rows("gpu-convergence") if r.get("losses")]
    if record is None or not rows:
        page.say(f"300 steps of `austen`, the same data in the same order: *{NOT_MEASURED}*.")
        return
    body = [
        (
            row["precision"],
            f"{row['held_out'].get('loss', float('nan')):.4f}",
            f"{row['final_loss']:.4f}",
            row["skipped_steps"],
            f"{row['step_s'] * 1e3:.1f}" if row["step_s"] else "-",
        )
        for row in rows
    ]
    head = (
        "precision",
        "held-out loss (fp32)",
        "training loss, last tenth",
        "skipped",
        "ms a step",
    )
    page.say(table(head, body))
    orders = {row["data_order_hash"] for row in rows}
    series = [Series(label=r["precision"], values=r["losses"]) for r in rows]
    title = f"Training loss of austen at GPT-2 124M, {record['steps']} steps"
    page.chart("gpu-convergence", lines(title, series, x_axis="step", y_axis="loss"), title)
    same = "one data order" if len(orders) == 1 else f"**{len(orders)} data orders**"
    page.source("gpu-convergence", record, n=f"one seed, {same}")


def _tests(records: Records, page: Page) -> None:
    page.say("### Tests that need a GPU, and recorded allocations")
    record = records.get("gpu-tests")
    if record is None:
        page.say(f"Outcomes of `pytest -m gpu tests/gpu`: *{NOT_MEASURED}*.")
    else:
        bad = [r for r in record["rows"] if r.get("outcome") in ("failed", "error")]
        counts = ", ".join(f"{n} {what}" for what, n in sorted(record.get("counts", {}).items()))
        page.say(f"{counts}.", *(f"- `{r['test']}`: {r.get('why', '')}" for r in bad))
        page.source("gpu-tests", record)
    traces = records.get("gpu-traces")
    if traces is None:
        page.say(f"Traces of CUDA's allocator for the test of its simulator: *{NOT_MEASURED}*.")
    else:
        kept = [r for r in traces["rows"] if r.get("events")]
        page.say(
            f"{len(kept)} recorded traces, which a test replays without a GPU "
            "(`tests/numerics/test_recorded_allocator_traces.py`)."
        )
        page.source("gpu-traces", traces)
