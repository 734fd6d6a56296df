"""All tests that need a GPU, each with its outcome; tests of the allocator have a process to
themselves, since they ask for an empty device.
"""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from gpu_parts.sheet import Ask, Sheet

__all__ = ["outcomes", "run"]

ROOT = Path(__file__).resolve().parents[2]
# They need the device for themselves: an empty allocator, or the whole of its time.
ALONE = (
    "tests/gpu/test_allocator.py",
    "tests/gpu/test_benchmark.py",
    "tests/gpu/test_optim.py::test_a_step_is_not_slower_than_it_should_be",
)
_WORKERS = 6
_OUTCOME = "PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS"
# In one process the name comes first, with workers the outcome.
_LINE = re.compile(
    rf"^(?:(tests/\S+?::.+?) ({_OUTCOME})|\[gw\d+\] \[ *\d+%\] ({_OUTCOME}) (tests/\S+?::.+?))"
    r"\s*(?:\(.*\))?\s*(?:\[ *\d+%\])?$",
    re.MULTILINE,
)
_WHY = re.compile(r"^(?:FAILED|ERROR) (tests/\S+?(?:::.+?)?)(?: - (.*))?$", re.MULTILINE)


def run(ask: Ask) -> None:
    sheet = Sheet("tests", ask, question="do the tests that need a GPU pass?")
    log = ask.output / "gpu-tests.log"
    said = ""
    together = ["tests/gpu", *(f"--deselect={place}" for place in ALONE), *_workers()]
    for places in (together, list(ALONE)):
        out, ended = _pytest(places, limit_s=max(ask.clock.left_s, 1.0))
        said += out
        log.write_text(said)
        for row in outcomes(out):
            sheet.put({"test": row["test"]}, **row)
        if not ended:
            sheet.put({"test": "(the rest)"}, not_run="out of time")
    counts: dict[str, int] = {}
    for row in sheet.rows:
        outcome = row.get("outcome", "not run")
        counts[outcome] = counts.get(outcome, 0) + 1
    sheet.write(counts=counts)
    print(f"  {counts}", flush=True)
    if any(counts.get(outcome) for outcome in ("failed", "error", "not run")):
        sys.exit(1)


def _workers() -> list[str]:
    """Return how pytest is to run several tests at a time, where pytest-xdist is there."""
    return ["-n", str(_WORKERS), "--dist", "loadfile"] if find_spec("xdist") else []


def _pytest(places: list[str], *, limit_s: float) -> tuple[str, bool]:
    """Return what pytest printed, and whether it came to its end."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-v", "--tb=short"]
    command += ["-p", "no:benchmark"]  # beside workers it warns, and a warning is an error here
    process = subprocess.Popen(
        [*command, *places],
        cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        out, _ = process.communicate(timeout=limit_s)
        return out, True
    except subprocess.TimeoutExpired:
        process.kill()
        out, _ = process.communicate()
        return out, False


def outcomes(said: str) -> list[dict[str, str]]:
    """Read the lines of ``pytest -v``: one test each, with the reason of those that failed."""
    why = {test: reason or "" for test, reason in _WHY.findall(said)}
    found = {}
    for test, outcome, outcome_first, test_last in _LINE.findall(said):
        found[test or test_last] = (outcome or outcome_first).lower()
    for test in why:
        found.setdefault(test, "error")  # a file that could not be imported has no line of its own
    return [
        {"test": test, "outcome": outcome} | ({"why": why[test][:500]} if test in why else {})
        for test, outcome in found.items()
    ]
