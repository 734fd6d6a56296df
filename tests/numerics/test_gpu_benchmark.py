"""The GPU benchmark without a GPU: its rehearsal, what it refuses, and what survives a cut."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from recorded_traces import BENCHMARKS, import_benchmarks

import_benchmarks()
from gpu_parts.clock import Clock, ratios, spread  # noqa: E402
from gpu_parts.prediction import WORKLOADS, rows  # noqa: E402
from gpu_parts.sheet import Ask, Sheet, is_fatal  # noqa: E402
from gpu_parts.testing import outcomes  # noqa: E402

import gpu  # noqa: E402 -- the path is set above


def start(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def ask(output: Path, run: str = "one") -> Ask:
    return Ask(run=run, output=output, clock=Clock(0.0), rehearse=True, commit="abc")


def written(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return found


@pytest.mark.slow
def test_a_rehearsal_goes_through_every_part_and_says_that_it_is_one(tmp_path: Path) -> None:
    """All parts but the tests leave records marked as rehearsed, and none of them fails.

    On a busy machine a part is cut when its time is over: what it has by then is whole.
    """
    done = start(
        "--rehearse", "--minutes", "9", "--output", str(tmp_path), "--workloads", "gpt2-124m",
        "--parts", "training,optimizer,traces,convergence,prediction",
    )  # fmt: skip

    assert done.returncode == 0, done.stdout + done.stderr
    ended = {p["part"]: p["outcome"] for p in written(tmp_path / "gpu-run.json")["parts"]}
    assert set(ended.values()) <= {"done", "cut"}
    for part in ("training", "optimizer", "traces", "convergence", "prediction"):
        record = written(tmp_path / f"gpu-{part}.json")
        assert record["rehearsal"] is True
        assert record["rows"]
        why = [row["not_run"] for row in record["rows"] if "not_run" in row]
        absent = ("No module named", "is not installed")
        expected = (*absent, "out of time", "CUDA", "host's memory")
        assert all(any(word in said for word in expected) for said in why), why
    timed = {row["arm"] for row in written(tmp_path / "gpu-training.json")["rows"]}
    assert {"torch.amp bf16", "narrowcast bf16", "narrowcast lean"} <= timed
    learned = [r for r in written(tmp_path / "gpu-convergence.json")["rows"] if "losses" in r]
    assert len({row["data_order_hash"] for row in learned}) == 1
    guessed = [r for r in written(tmp_path / "gpu-prediction.json")["rows"] if "predicted" in r]
    assert all(row["predicted"]["reserved_bytes"] > 0 for row in guessed)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_refuses_and_names_the_rehearsal() -> None:
    done = start("--parts", "optimizer")

    assert done.returncode == 3
    assert done.stderr.startswith("error: no CUDA device here\nhint: --rehearse")


def test_an_unknown_part_is_answered_with_those_that_there_are() -> None:
    done = start("--parts", "trainig")

    assert done.returncode == 1
    assert "no part is called trainig" in done.stderr
    assert "convergence" in done.stderr


def test_a_package_that_cannot_be_imported_is_named_with_the_reason() -> None:
    """A part that needs it is left out, and no other."""
    found = gpu.missing(("json", "no_such_package"))

    assert list(found) == ["no_such_package"]
    assert found["no_such_package"].startswith("ModuleNotFoundError")


def test_a_share_of_what_is_left_is_never_all_of_it() -> None:
    """Weights of parts that are left decide, so that unused time goes to those that follow."""
    parts = gpu.chosen_parts(None, "")

    assert [part.module for part in parts[:2]] == ["testing", "training"]
    assert sum(p.workload != "" for p in gpu.chosen_parts("training", "resnet50")) == 1
    assert gpu.MINUTES * 60 + 30 < 600


def test_rows_are_on_the_disk_before_they_are_done(tmp_path: Path) -> None:
    """A row that took its process down is left out by the next one, and says so."""
    sheet = Sheet("training", ask(tmp_path))
    with sheet.trying(arm="a") as found:
        found["peak"] = 1
    sheet.put({"arm": "b"}, begun=True)

    again = Sheet("training", ask(tmp_path))

    assert again.find(arm="a") == {"arm": "a", "peak": 1}
    assert again.find(arm="b") == {"arm": "b", "not_run": "the process ended while it was tried"}
    assert written(again.path)["commit"] == "abc"


def test_another_run_starts_with_no_rows(tmp_path: Path) -> None:
    """What was measured before is not carried into it."""
    Sheet("training", ask(tmp_path)).put({"arm": "a"}, peak=1)

    assert Sheet("training", ask(tmp_path, "two")).rows == []


def test_a_failing_row_says_why_and_the_rest_goes_on(tmp_path: Path) -> None:
    """Out of memory is a row's own trouble; a lost context is raised, since all is lost with it."""
    sheet = Sheet("training", ask(tmp_path))
    with sheet.trying(arm="large"):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB\nand more")

    assert sheet.find(arm="large") == {
        "arm": "large",
        "not_run": "OutOfMemoryError: CUDA out of memory. Tried to allocate 1 GiB",
    }
    lost = RuntimeError("CUDA error: an illegal memory access was encountered")
    assert is_fatal(lost)
    with pytest.raises(RuntimeError), sheet.trying(arm="broken"):
        raise lost
    assert sheet.find(arm="broken") == {"arm": "broken", "not_run": f"RuntimeError: {lost}"}


def test_a_process_that_loses_its_gpu_is_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice more at most, and not at all if it failed for a reason of its own."""
    asked = argparse.Namespace(run="r", output=tmp_path, commit="", rehearse=True)
    part = gpu.Part(module="optimizer", weight=1)
    for code, tries in ((75, 3), (-6, 3), (1, 1), (0, 1)):
        script = tmp_path / "ends.py"
        script.write_text(f"import os, signal\nos.kill(os.getpid(), {-code})" if code < 0
                          else f"raise SystemExit({code})")  # fmt: skip
        monkeypatch.setattr(gpu, "__file__", str(script))
        found = gpu.process(part, asked, 2.0**40)

        assert found["tries"] == tries
        assert found["outcome"] == ("done" if code == 0 else "failed")


def test_24_workloads_have_every_model_in_three_batches_and_every_precision() -> None:
    """The rest of the rows come after them, none twice."""
    everything = list(rows())
    first = everything[:WORKLOADS]
    models = {row["model"] for row in first}

    assert len(models) == 8
    assert len({(r["model"], r["batch"]) for r in first}) == WORKLOADS
    assert {r["precision"] for r in first} == {"fp32", "bf16", "fp16", "bf16-split", "lean"}
    assert {r["model"] for r in first[:8]} == models
    keys = [tuple(row.values()) for row in everything]
    assert len(keys) == len(set(keys))


def test_ratios_are_taken_round_by_round() -> None:
    """A slow round slows both, and the ratio stays."""
    assert ratios([2.0, 20.0, 4.0], [1.0, 10.0, 2.0]) == {"median": 2, "low": 2, "high": 2, "n": 3}
    assert spread([3.0, 1.0]) == {"median": 2.0, "low": 1.0, "high": 3.0, "n": 2}


SERIAL = """
tests/gpu/test_a.py::test_one PASSED                                     [ 33%]
tests/gpu/test_a.py::test_two[a b-1] FAILED                              [ 66%]
tests/gpu/test_b.py::test_three SKIPPED (needs more)                     [100%]
FAILED tests/gpu/test_a.py::test_two[a b-1] - assert 1 == 2
ERROR tests/gpu/test_c.py - ModuleNotFoundError: No module named 'x'
"""
PARALLEL = """
[gw0] [  3%] PASSED tests/gpu/test_a.py::test_one
[gw5] [100%] FAILED tests/gpu/test_a.py::test_two[a b-1]
FAILED tests/gpu/test_a.py::test_two[a b-1] - assert 1 == 2
"""


def test_outcomes_are_read_from_what_pytest_prints() -> None:
    """In one process and in several; a file that cannot be imported is an error of its own."""
    serial = {row["test"]: row for row in outcomes(SERIAL)}
    parallel = outcomes(PARALLEL)

    assert serial["tests/gpu/test_a.py::test_one"]["outcome"] == "passed"
    assert serial["tests/gpu/test_a.py::test_two[a b-1]"]["why"] == "assert 1 == 2"
    assert serial["tests/gpu/test_b.py::test_three"]["outcome"] == "skipped"
    assert serial["tests/gpu/test_c.py"]["outcome"] == "error"
    assert [row["outcome"] for row in parallel] == ["passed", "failed"]
