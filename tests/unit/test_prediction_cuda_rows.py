"""The benchmark of measured peaks, where the rows that it predicts are not at hand."""

from __future__ import annotations

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
