"""The page of results: what it says with a GPU's records, without them, and of a rehearsal."""

from __future__ import annotations

import itertools
import json
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from recorded_traces import BENCHMARKS, import_benchmarks

import_benchmarks()
from render_results import rendered  # noqa: E402 -- the path is set above
from results_page.page import NOT_MEASURED, Page, Records, table  # noqa: E402
from results_page.svg import Bar, Point, Series, bars, lines, scatter  # noqa: E402

FROM = {
    "device": "cuda:0", "device_name": "an invented GPU", "threads": 8, "torch": "2.11.0",
    "commit": "0123456789ab", "date": "2026-01-01 00:00 UTC", "command": "python gpu.py",
}  # fmt: skip
GIB = 2**30


def spread(median: float) -> dict[str, Any]:
    return {"median": median, "low": 0.9 * median, "high": 1.1 * median, "n": 7}


def trained(arm: str, kind: str, *, speed: float, share: float) -> dict[str, Any]:
    size = int(8 * GIB * share)
    return {
        "workload": "gpt2-124m", "arm": arm, "kind": kind, "unit": "tokens",
        "units_per_step": 8192, "units_per_s": 8192 / 0.03, "step_s": spread(0.03 / speed),
        "speed_over_baseline": spread(speed), "allocated_over_baseline": share,
        "peak": {"allocated_bytes": size, "reserved_bytes": size},
    }  # fmt: skip


def records(folder: Path, **more: Any) -> Records:
    """Write invented records of a GPU and read the folder."""
    training = [
        trained("torch.amp bf16", "torch.amp", speed=1.0, share=1.0),
        trained("narrowcast lean", "narrowcast", speed=0.8, share=0.12),
        trained("plan within 0.34", "narrowcast", speed=0.9, share=0.3),
        {"workload": "gpt2-124m", "arm": "torchao", "not_run": "absent"},
    ]
    optimizer = [
        {"model": "gpt2-124M", "optimizer": "narrowcast split16+int8", "ms": spread(0.5),
         "bytes_per_parameter": 6.1, "limit_ms": 0.4, "over_limit": 1.25,
         "over_fused": spread(0.55)},
    ]  # fmt: skip
    prediction = [
        {"model": "gpt2-124m", "batch": 8, "precision": "bf16", "allocated_error_percent": -0.2,
         "reserved_error_percent": 0.1,
         "measured": {"allocated_bytes": 8 * GIB, "reserved_bytes": 9 * GIB}},
        {"model": "resnet50", "batch": 64, "precision": "bf16", "allocated_error_percent": 9.0,
         "reserved_error_percent": 0.1,
         "measured": {"allocated_bytes": 8 * GIB, "reserved_bytes": 9 * GIB}},
    ]  # fmt: skip
    convergence = [
        {"precision": p, "losses": [5.0, 4.0, 3.5 + k / 10], "held_out": {"loss": 3.4},
         "final_loss": 3.5, "skipped_steps": 0, "step_s": 0.1, "data_order_hash": "a"}
        for k, p in enumerate(("tf32", "bf16"))
    ]  # fmt: skip
    tests = [{"test": "tests/gpu/a.py::b", "outcome": "failed", "why": "no"}]
    for name, rows in (
        ("training", training), ("optimizer", optimizer), ("prediction", prediction),
        ("convergence", convergence), ("tests", tests),
    ):  # fmt: skip
        about = {**FROM, "steps": 3, "counts": {"failed": 1}, "copy_bytes_per_s": 4e12, **more}
        path = folder / f"gpu-{name}.json"
        path.write_text(json.dumps({**about, "rows": rows}))
    return Records.read(folder)


def page_of(found: Records) -> Page:
    return rendered(found, links="../records", pictures="pictures")


def test_without_a_gpu_every_target_is_not_yet_measured(tmp_path: Path) -> None:
    """No record, no figure: targets, workloads, step, prediction, learning, tests and traces."""
    text = "\n".join(page_of(Records.read(tmp_path)).text)

    assert text.count(NOT_MEASURED) >= 18
    assert "| yes |" not in text
    assert "| **no** |" not in text


def test_a_rehearsal_is_no_result(tmp_path: Path) -> None:
    """Its records are left out, unless somebody wants to look at the page."""
    found = records(tmp_path, rehearsal=True)

    assert not found.by_name
    assert Records.read(tmp_path, rehearsals=True).rows("gpu-training")


def test_targets_are_judged_by_the_fastest_plan_that_fits(tmp_path: Path) -> None:
    """Reached and missed ones; what was not measured stays so."""
    text = "\n".join(page_of(records(tmp_path)).text)
    lines_of = {line.split("|")[1].strip(): line for line in text.splitlines() if "|" in line}

    best = "GPT-2 124M: at most 0.34 of torch.amp's peak at no less than 1.0 of its speed"
    assert "0.90 (0.81 to 0.99, n = 7) at 0.300, with plan within 0.34" in lines_of[best]
    assert lines_of[best].endswith("**no** |")
    half = "GPT-2 124M: at most 0.15 of torch.amp's peak at no less than 0.7 of its speed"
    assert lines_of[half].endswith("yes |")
    tenth = "GPT-2 124M: at most 0.1 of torch.amp's peak at no less than 0.5 of its speed"
    assert "no plan of ours stays within it" in lines_of[tenth]
    step = "a step of split16+int8 takes at most 0.6 of fused fp32 AdamW, 124M parameters"
    assert lines_of[step].endswith("yes |")
    cnns = "CNNs: allocated predicted within 5 % at the 95th percentile"
    assert lines_of[cnns].endswith("**no** |")
    resnet = "ResNet-50: at most 0.6 of torch.amp's peak at no less than 0.9 of its speed"
    assert NOT_MEASURED in lines_of[resnet]


def test_every_figure_names_its_record_machine_and_command(tmp_path: Path) -> None:
    """And what did not run is told by name."""
    text = "\n".join(page_of(records(tmp_path)).text)

    assert "an invented GPU; torch 2.11.0; commit 0123456789ab; 2026-01-01 00:00" in text
    assert "`python gpu.py`" in text
    assert "Not run: torchao: absent." in text
    assert "- `tests/gpu/a.py::b`: no" in text


def test_charts_are_well_formed_and_shown(tmp_path: Path) -> None:
    """Every chart that is drawn is an XML document, and the page shows it."""
    page = page_of(records(tmp_path))

    assert set(page.charts) >= {"gpu-gpt2-124m.svg", "gpu-convergence.svg"}
    for name, svg in page.charts.items():
        assert ET.fromstring(svg).tag.endswith("svg")
        assert f"(pictures/{name})" in "\n".join(page.text)


def test_the_records_of_this_repository_make_a_page() -> None:
    """Whatever is in benchmarks/results can be rendered, and every record is listed."""
    found = Records.read(BENCHMARKS / "results")
    text = "\n".join(page_of(found).text)

    for name in found.by_name:
        assert f"[{name}](../records/{name}.json)" in text


@pytest.mark.parametrize("value", [0.0, 1e-9, 0.999, 1.0, 123.4, 2.5e9])
def test_a_bar_ends_within_the_chart(value: float) -> None:
    """Whatever the size of the largest value; its own text stands beside it."""
    svg = bars("b", [Bar(label="<a & b>", value=value, low=value, high=value)], axis="x")
    root = ET.fromstring(svg)
    (bar,) = root.iter("{http://www.w3.org/2000/svg}rect")

    assert float(bar.get("x")) + float(bar.get("width")) <= 840 - 130 + 1
    assert "<a & b>" in "".join(root.itertext())


def test_points_and_lines_stay_within_the_chart() -> None:
    """Also a single point at the origin, and a constant line."""
    for svg in (
        scatter("s", [Point(label="o", x=0.0, y=0.0)], x_axis="x", y_axis="y"),
        lines("l", [Series(label="flat", values=[1.0, 1.0])], x_axis="x", y_axis="y"),
    ):
        assert ET.fromstring(svg).get("width") == "840"
        assert "nan" not in svg


def test_labels_of_points_at_one_place_do_not_cover_each_other() -> None:
    """Ten of them: no two closer than a line is high."""
    points = [Point(label=f"loop {k}", x=1.0, y=1.0) for k in range(10)]
    root = ET.fromstring(scatter("s", points, x_axis="x", y_axis="y"))
    texts = root.iter("{http://www.w3.org/2000/svg}text")
    levels = sorted(float(t.get("y")) for t in texts if (t.text or "").startswith("loop"))

    assert len(levels) == 10
    assert all(b - a >= 13 for a, b in itertools.pairwise(levels))


def test_numbers_read_right_and_words_left() -> None:
    """By what a column holds, and a bar in a cell does not end it."""
    made = table(("name", "ms", "note"), [("a", "1.5", "x|y"), ("b", "-", "")])

    assert made.splitlines()[1] == "|---|---:|---|"
    assert "x\\|y" in made
