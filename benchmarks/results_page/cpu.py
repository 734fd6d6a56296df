"""The CPU's part of the page: quality, memory, predictions, robustness, each from a record."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable
from typing import Any

from narrowcast.units import format_bytes, format_duration
from results_page.page import Page, Records, table
from results_page.svg import Bar, bars

__all__ = ["cpu_pages"]


def cpu_pages(records: Records, page: Page) -> None:
    page.say(
        "## On a CPU",
        "A CPU shows bytes, quality and exactness; it shows no speed of a GPU. Under each table: "
        "the record, the machine, the version of torch, the commit, the date and the command.",
    )
    for section in SECTIONS:
        section(records, page)


def _comparisons(records: Records, page: Page) -> None:
    names = [name for name, r in records.by_name.items() if "protocol" in r and "arms" in r]
    if not names:
        return
    page.say(
        "### Quality: each precision against fp32",
        "The verdict is a statistical test with the stated margin, on the recipe's metric over "
        "seeds that all arms share ([how](comparison.md)). Harm is how much worse than fp32; its "
        "interval is at 95 %.",
    )
    for name in names:
        record = records.by_name[name]
        protocol = record["protocol"]
        arms = {arm["precision"]: arm for arm in record["arms"]}
        verdicts = {v["precision"]: v for v in record["verdicts"]}
        body = []
        for precision, arm in arms.items():
            verdict = verdicts.get(precision)
            metric = protocol["metric"]
            mean, sd = arm["metric_means"][metric], arm["metric_sds"][metric]
            low, high = verdict["interval"] if verdict else (None, None)
            body.append(
                (
                    precision,
                    f"{mean:.4f} ± {sd:.4f}",
                    "-" if low is None else f"{low:+.2g} to {high:+.2g}",
                    verdict["verdict"] if verdict else "reference",
                    format_bytes(arm["peak_bytes"]) if arm.get("peak_bytes") else "-",
                    format_duration(arm["step_seconds"]) if arm.get("step_seconds") else "-",
                    arm["skipped_steps"],
                )
            )
        page.say(
            f"**{name.removeprefix('compare-')}**: {protocol['steps']} steps, "
            f"{len(protocol['seeds'])} seeds, margin {protocol['margin_text']} of "
            f"{protocol['metric']}.",
            table(
                ("precision", f"{protocol['metric']}, mean ± sd", "harm", "verdict", "peak",
                 "a step", "skipped steps"), body,
            ),
        )  # fmt: skip
        page.source(name, record, n=f"n = {len(protocol['seeds'])} seeds an arm")


def _peaks(records: Records, page: Page) -> None:
    record = records.get("memory-cpu")
    if record is None:
        return
    page.say(
        "### Peak of one training step", "Byte counts are exact: n is 1, and there is no spread."
    )
    cases = dict.fromkeys(row["case"] for row in record["rows"])
    precisions = list(dict.fromkeys(row["precision"] for row in record["rows"]))
    found = {(r["case"], r["precision"]): r["total_peak_bytes"] for r in record["rows"]}
    body = [
        (case, *(format_bytes(found[case, p]) if (case, p) in found else "-" for p in precisions))
        for case in cases
    ]
    page.say(table(("recipe", *precisions), body))
    first = next(iter(cases))
    whole = found[first, "bf16"]
    shown = [
        Bar(label=p, value=found[first, p] / 2**20, group=0 if p in ("bf16-split", "lean") else 1,
            says=f"{found[first, p] / 2**20:.0f} ({found[first, p] / whole:.2f} of bf16)")
        for p in precisions if (first, p) in found
    ]  # fmt: skip
    title = f"Peak of one step of {first} (size small)"
    page.chart("cpu-peaks", bars(title, shown, axis="MiB"), title)
    equal = sum(r["total_peak_bytes"] == r["memtracker_peak_bytes"] for r in record["rows"])
    same = f"torch's MemTracker counts the same in {equal} of {len(record['rows'])}"
    page.source("memory-cpu", record, n=same)


def _ladder(records: Records, page: Page) -> None:
    record = records.get("memory-ladder-cpu")
    if record is None:
        return
    page.say("### Every precision and lever: predicted against measured")
    rows = [r for r in record["rows"] if "predicted_bytes" in r]
    exact = sum(r["predicted_bytes"] == r["measured_bytes"] for r in rows)
    worst = max(rows, key=lambda r: abs(r["predicted_bytes"] / r["measured_bytes"] - 1))
    off = worst["predicted_bytes"] / worst["measured_bytes"] - 1
    farthest = f"; the farthest away is {worst['case']} in {worst['plan']}, by {off:+.3%}"
    page.say(
        f"Of {len(rows)} pairs of a recipe and a plan the predicted peak equals the measured one "
        f"to the byte in {exact}{farthest if exact < len(rows) else ''}."
    )
    case = next(iter(dict.fromkeys(r["case"] for r in rows)))
    all_of = [r for r in record["rows"] if r["case"] == case and "measured_bytes" in r]
    whole = next(r["measured_bytes"] for r in all_of if r["plan"] == "fp32")
    shown = [
        Bar(label=r["plan"], value=r["measured_bytes"] / whole,
            group=0 if "predicted_bytes" in r else 2)
        for r in sorted(all_of, key=lambda r: -r["measured_bytes"])
    ]  # fmt: skip
    title = f"Measured peak over fp32's, {case}: ours (blue), others' optimizers in plain loops"
    page.chart("cpu-ladder", bars(title, shown, axis="share of fp32", mark=1.0), title)
    page.source("memory-ladder-cpu", record, n="n = 1, exact bytes")


def _published_peaks(records: Records, page: Page) -> None:
    record = records.get("measured-peaks")
    if record is None:
        return
    page.say(
        "### GPU peaks that others published",
        "Predicted on this CPU without a GPU; nothing is fitted to a row. Errors are absolute, "
        "in percent of the published figure ([how](allocator.md)).",
    )
    body = [
        (
            row["setup"],
            f"{row['grade']}, {row['kind']}",
            row["counter"],
            row["rows"],
            f"{row['median_percent']:.4g} %",
            f"{row['worst_percent']:.4g} %",
        )
        for row in record["summary"]
    ]
    page.say(table(("set-up", "grade", "counter", "rows", "median", "worst"), body))
    page.source("measured-peaks", record, n=f"{len(record['rows'])} rows in all")


def _optimizer(records: Records, page: Page) -> None:
    record = records.get("optimizer-step-cpu")
    if record is None:
        return
    page.say("### One optimizer step", "Bytes held without gradients; the fp32 master included.")
    models = dict.fromkeys(row["model"] for row in record["rows"])
    model = list(models)[-1]
    rows = [r for r in record["rows"] if r["model"] == model]
    body = [
        (
            r["optimizer"],
            f"{r['bytes_per_parameter']:.3f}" if r["bytes_per_parameter"] else "-",
            format_bytes(r["temporary_bytes"]) if r["temporary_bytes"] is not None else "-",
            f"{r['median_ms']:.1f} ({r['quartiles_ms'][0]:.1f} to {r['quartiles_ms'][1]:.1f})"
            if r["median_ms"]
            else "-",
            r["note"] or "",
        )
        for r in rows
    ]
    head = ("optimizer", "bytes a parameter", "temporaries", "ms", "note")
    page.say(f"Model: {model}, {rows[0]['parameters']:,} parameters.", table(head, body))
    shown = [
        Bar(label=r["optimizer"], value=r["bytes_per_parameter"],
            group=0 if r["optimizer"].startswith("narrowcast") else 1)
        for r in rows if r["bytes_per_parameter"]
    ]  # fmt: skip
    title = "Bytes held for a parameter: ours (blue) and others"
    page.chart("cpu-optimizer-bytes", bars(title, shown, axis="bytes"), title)
    page.source("optimizer-step-cpu", record, n=f"n = {record['rounds']} rounds")


def _overhead(records: Records, page: Page) -> None:
    record = records.get("overhead-cpu")
    if record is None:
        return
    page.say(
        "### What the engine costs",
        "Microseconds a step over the same loop written by hand, on the smallest model that "
        "anybody trains: medians of paired rounds, with quartiles.",
    )

    def cost(row: dict[str, Any]) -> str:
        if row["overhead_us"] is None:
            return "-"
        low, high = row["quartiles_us"]
        return f"{row['overhead_us']:+.1f} ({low:+.1f} to {high:+.1f})"

    rows = [r for r in record["rows"] if r["loop"] != "hand"]
    body = [(r["loop"], r["precision"], cost(r), r["n"], r["note"]) for r in rows]
    page.say(table(("loop", "precision", "us a step", "n", "note"), body))
    page.source("overhead-cpu", record)


def _adapters(records: Records, page: Page) -> None:
    record = records.get("adapters-cpu")
    if record is None:
        return
    page.say(
        "### What the adapters cost",
        "Microseconds a step over the trainer's own precision handling, same smallest model. The "
        "control is the trainer's own over itself, measured in the same way.",
    )
    body = []
    for row in record["rows"]:
        low, high = row["quartiles_us"]
        cost = f"{row['overhead_us']:+.1f} ({low:+.1f} to {high:+.1f})"
        control = f"{row['control_us']:+.1f}" if "control_us" in row else "not measured"
        own = f"{row['own_us']:.0f}"
        body.append((row["host"], row["precision"], own, cost, control, row["n"]))
    head = ("trainer", "precision", "its own step, us", "ours on top, us", "control, us", "n")
    page.say(table(head, body))
    page.source("adapters-cpu", record)


def _budgets(records: Records, page: Page) -> None:
    record = records.get("plan-budgets-cpu")
    if record is None:
        return
    rows = [r for r in record["rows"] if "within_budget" in r]
    counts = {
        what: sum(bool(r.get(key, True)) for r in rows)
        for what, key in (
            ("stay within the budget", "within_budget"),
            ("are no slower than at a smaller budget", "larger_budget_is_no_slower"),
            ("are as fast as the best single lever that fits", "as_fast_as_single_levers"),
        )
    }
    says = "; ".join(f"{count} of {len(rows)} {what}" for what, count in counts.items())
    page.say(
        "### Fitting a budget", f"Of {len(record['rows'])} budgets {len(rows)} can be met: {says}."
    )
    body = [
        (r["case"], format_bytes(r["budget_bytes"]), f"`{r['chosen']}`",
         format_bytes(r["trained_peak_bytes"]), format_duration(r["seconds"]))
        for r in rows
    ]  # fmt: skip
    page.say(table(("recipe", "budget", "plan", "measured peak", "a step"), body))
    page.source("plan-budgets-cpu", record)


def _robustness(records: Records, page: Page) -> None:
    if (record := records.get("kill-resume")) is not None:
        kills = [r for r in record["rows"] if r["outcome"] != "finished before"]
        equal = Counter(r["precision"] for r in kills if r["outcome"] == "equal")
        says = ", ".join(f"{p} {n}" for p, n in equal.items())
        page.say("### kill -9 and resume",
                 f"{sum(equal.values())} of {len(kills)} killed runs end with the bits of the run "
                 f"that was left alone ({says}).")  # fmt: skip
        page.source("kill-resume", record)
    if (record := records.get("diagnosis-cpu")) is not None:
        totals = record["totals"]
        page.say("### Diagnosis",
                 f"{totals['named_first']} of {totals['faults']} planted faults are named first; "
                 f"{totals['fp32_failing']} of them fail in fp32 too, of which "
                 f"{totals['fp32_failing_blamed_on_precision']} are blamed on precision; "
                 f"{totals['healthy_accused']} of {totals['healthy']} healthy trainings are "
                 "accused.")  # fmt: skip
        page.source("diagnosis-cpu", record)
    if (record := records.get("check-corpus")) is not None:
        totals = record["totals"]
        page.say("### Checks on other people's scripts",
                 f"{totals['scripts']} scripts of {totals['projects']} projects: "
                 f"{totals['expected'] - totals['missed']} of {totals['expected']} known mistakes "
                 f"found, {totals['accused_wrongly']} places accused wrongly.")  # fmt: skip
        page.source("check-corpus", record)


def _watching(records: Records, page: Page) -> None:
    if (record := records.get("watch-overhead-cpu")) is not None:
        rows = [r for r in record["rows"] if r["ratio"] is not None]
        body = [
            (r["case"], r["loop"],
             f"{r['ratio']:.3f} ({r['quartiles'][0]:.3f} to {r['quartiles'][1]:.3f})", r["n"])
            for r in rows
        ]  # fmt: skip
        page.say("### What watching costs", "Time of a watched step over that of a plain one.",
                 table(("training", "loop", "ratio", "n"), body))  # fmt: skip
        page.source("watch-overhead-cpu", record)
    if (record := records.get("replay-cost-cpu")) is not None:
        by_kind: dict[str, list[float]] = {}
        for row in record["rows"]:
            by_kind.setdefault(row["kind"], []).append(row["plain_steps"])
        body = [
            (kind, f"{statistics.median(v):.2f}", f"{max(v):.2f}", len(v))
            for kind, v in by_kind.items()
        ]
        page.say("### What a replay costs", "In plain steps of the same training.",
                 table(("replay", "median", "most", "trainings"), body))  # fmt: skip
        page.source("replay-cost-cpu", record)


def _levers(records: Records, page: Page) -> None:
    if (record := records.get("activation-levers-cpu")) is not None:
        cases = dict.fromkeys((r["case"], r["precision"]) for r in record["rows"])
        levers = list(dict.fromkeys(r["lever"] for r in record["rows"]))
        found = {
            (r["case"], r["precision"], r["lever"]): r["peak_bytes"]
            for r in record["rows"]
            if "peak_bytes" in r
        }
        body = [
            (f"{case}, {precision}",
             *(format_bytes(found[case, precision, k]) if (case, precision, k) in found else "-"
               for k in levers))
            for case, precision in cases
        ]  # fmt: skip
        page.say("### Activation levers, one at a time", "Peak of a step; exact bytes.",
                 table(("training", *levers), body))  # fmt: skip
        page.source("activation-levers-cpu", record)
    if (record := records.get("chunked-loss-cpu")) is not None:
        body = [
            (r["variant"], r["formats"], format_bytes(r["peak_bytes"]) if r["peak_bytes"] else "-",
             f"{r['forward_s'] + r['backward_s']:.2f}" if r.get("forward_s") else "-", r["note"])
            for r in record["rows"]
        ]  # fmt: skip
        page.say("### The loss without its logits",
                 table(("variant", "formats", "peak", "seconds", "note"), body))  # fmt: skip
        page.source("chunked-loss-cpu", record, n=f"n = {record['rounds']}")


SECTIONS: tuple[Callable[[Records, Page], Any], ...] = (
    _comparisons,
    _peaks,
    _ladder,
    _levers,
    _published_peaks,
    _optimizer,
    _overhead,
    _adapters,
    _budgets,
    _robustness,
    _watching,
)
