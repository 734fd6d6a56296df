"""kill -9 at random moments of a run: nothing is lost, and the resumed run is the same run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "kill_resume.py"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="forks")
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "bf16-true"])
def test_twenty_killed_runs_end_as_the_undisturbed_one(precision: str) -> None:
    """Weights, metrics and record, bit for bit; the script exits 1 if a single run is not."""
    out = subprocess.run(
        [sys.executable, str(SCRIPT), "--precisions", precision, "--kills", "20"],
        capture_output=True,
        text=True,
        check=False,
    )

    words = out.stdout.splitlines()[-1].split()
    assert out.returncode == 0, out.stdout + out.stderr
    assert words[:5] == [precision, "20", "20", "0", "0"]  # killed, equal, different, lost
