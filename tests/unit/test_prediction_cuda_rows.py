"""The benchmark of measured peaks, where the rows that it predicts are not at hand."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "measured_peaks.py"


@pytest.mark.slow
def test_without_the_measured_rows_it_says_so_and_stops() -> None:
    """The rows lie outside of the repository; a clone without them gets one sentence."""
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--csv", "absent.csv"],
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0
    assert done.stdout == "skipped: no measured peaks at absent.csv; give their path with --csv\n"


@pytest.mark.slow
def test_each_setup_says_which_command_made_its_rows() -> None:
    """Rows that `--only` leaves as they are keep their origin, also from a record without it."""
    code = (
        "import json, measured_peaks as m\n"
        "old = {'command': 'old', 'date': 'd', 'commit': 'c', 'torch': 't', 'rows': []}\n"
        "first = m.made(old, ['vits'])\n"
        "second = m.made({**old, 'command': 'new', 'made': first}, ['gpts'])\n"
        "print(json.dumps([first, second]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=SCRIPT.parent,
    )

    first, second = json.loads(done.stdout)
    assert {setup for setup, origin in first.items() if origin["command"] != "old"} == {"vits"}
    assert {setup for setup, origin in second.items() if origin["command"] != "old"} == {
        "vits",
        "gpts",
    }
