"""Starting ranks from a test: under torchrun, with a limit after which all of them are killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]

# Ten times what the slowest takes on two idle cores: it ends what hangs, and measures nothing.
LIMIT_S = 150


@dataclass(frozen=True)
class Ended:
    """How a group of processes ended."""

    code: int
    stdout: str
    stderr: str

    def errors(self) -> list[str]:
        """List the lines that say "error:", which is how the command line does."""
        return [line for line in self.stderr.splitlines() if line.startswith("error:")]


def torchrun(ranks: int, *words: str, **environment: str) -> Ended:
    """Run ``torchrun --nproc-per-node RANKS WORDS`` on this machine."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return ended([*launcher, f"--nproc-per-node={ranks}", *words], environment)


def ended(command: list[str], environment: Mapping[str, str]) -> Ended:
    """Run a command in a session of its own, and kill all of it at the limit."""
    process = start(command, environment)
    try:
        out, err = process.communicate(timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        raise AssertionError(f"{command} did not end within {LIMIT_S} s:\n{err[-3000:]}") from None
    return Ended(process.returncode, out, err)


def start(command: list[str], environment: Mapping[str, str]) -> subprocess.Popen[str]:
    """Start a command with one thread a process, and our sources to import."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("RANK", "WORLD", "MASTER"))}
    paths = os.pathsep.join([str(ROOT / "src"), str(HERE)])
    own = {**clean, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths, **environment}
    return subprocess.Popen(
        command,
        env=own,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
