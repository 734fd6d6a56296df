"""The proof on a GPU, in one command and under ten minutes: tests, speed, memory, prediction, loss.

    make gpu                                     # on a machine with a CUDA device
    python benchmarks/gpu.py --parts training --minutes 4
    python benchmarks/gpu.py --rehearse          # the same code on tiny models and the CPU

Nothing is installed or fetched: each part says which packages it needs, and is left out by name
where one cannot be imported. Parts run in processes of their own, those that matter most first,
each within its share of what time is left; they write benchmarks/results/gpu-<part>.json row by
row, so that a run that is cut loses little. A process that dies is started again without what
killed it.
A rehearsal writes elsewhere: its figures mean nothing, and its records say so.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
MINUTES = 9.0
_CORE = ("torch", "numpy")
_RESTARTS = 2
_GPU_LOST = 75
"""Exit code of a process that lost its CUDA context (EX_TEMPFAIL: worth another try)."""
# A process that loads torch and CUDA needs this much before it can do anything.
_LEAST_S = 12.0
# Rows are on the disk by then; what still runs is ended.
_GRACE_S = 8.0


@dataclass(frozen=True, kw_only=True)
class Part:
    """One process: which module of ``gpu_parts`` it runs, and its share of the whole time."""

    module: str
    weight: float
    workload: str = ""
    needs: tuple[str, ...] = _CORE

    @property
    def name(self) -> str:
        return f"{self.module} {self.workload}".strip()


_TRAINS = (*_CORE, "triton")
PARTS = (
    Part(module="testing", weight=110, needs=(*_TRAINS, "pytest", "pytest_timeout")),
    Part(module="training", workload="gpt2-124m", weight=90, needs=_TRAINS),
    Part(module="optimizer", weight=45, needs=_TRAINS),
    Part(module="prediction", weight=90, needs=_TRAINS),
    Part(module="convergence", weight=75, needs=(*_TRAINS, "safetensors", "scipy")),
    Part(module="training", workload="resnet50", weight=45, needs=_TRAINS),
    Part(module="traces", weight=20, needs=_TRAINS),
    Part(module="training", workload="vit-b16", weight=40, needs=_TRAINS),
    Part(module="training", workload="gpt2-350m", weight=60, needs=_TRAINS),
)


def main() -> None:
    asked = arguments()
    if asked.part:
        sys.exit(run_part(asked))
    sys.exit(run_all(asked))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=MINUTES, help="end within this time")
    parser.add_argument("--parts", help=f"of {', '.join(dict.fromkeys(p.module for p in PARTS))}")
    parser.add_argument("--workloads", default="", help="to train, such as gpt2-124m,resnet50")
    parser.add_argument("--rehearse", action="store_true", help="tiny models on the CPU")
    parser.add_argument("--output", type=Path, help="where records go (benchmarks/results)")
    parser.add_argument("--commit", default="", help="of the tree, where git cannot tell")
    for hidden in ("--part", "--workload", "--run"):
        parser.add_argument(hidden, default="", help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, default=0.0, help=argparse.SUPPRESS)
    return parser.parse_args()


def missing(names: tuple[str, ...]) -> dict[str, str]:
    """Return the packages that cannot be imported, and why."""
    found = {}
    for name in names:
        try:
            importlib.import_module(name)
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}".split("\n", 1)[0]
    return found


def run_all(asked: argparse.Namespace) -> int:
    began = time.time()
    chosen = chosen_parts(asked.parts, asked.workloads)
    needs = tuple(dict.fromkeys(name for part in chosen for name in part.needs))
    absent = missing(needs)
    if any(name in absent for name in _CORE):
        print(f"error: nothing runs without {', '.join(_CORE)}: {absent}", file=sys.stderr)
        return 3
    import torch

    if not asked.rehearse and not torch.cuda.is_available():
        print("error: no CUDA device here", file=sys.stderr)
        print("hint: --rehearse runs the same code on tiny models and the CPU", file=sys.stderr)
        return 3
    asked.run = datetime.now(UTC).isoformat(timespec="seconds")
    if asked.output is None:
        asked.output = Path(tempfile.mkdtemp()) if asked.rehearse else HERE / "results"
    asked.output.mkdir(parents=True, exist_ok=True)
    until = began + 60 * asked.minutes
    done: list[dict[str, Any]] = []
    for number, part in enumerate(chosen):
        lacking = {name: absent[name] for name in part.needs if name in absent}
        if lacking:
            outcome = {"outcome": "left out", "why": f"cannot import {lacking}"}
        else:
            share = part.weight / sum(p.weight for p in chosen[number:])
            outcome = process(part, asked, time.time() + share * (until - time.time()))
        done.append({"part": part.name, **outcome})
        print(f"{part.name}: {outcome}", flush=True)
        summary = {"run": asked.run, "rehearsal": asked.rehearse, "minutes": asked.minutes,
                   "absent": absent, "seconds": time.time() - began, "parts": done}  # fmt: skip
        (asked.output / "gpu-run.json").write_text(json.dumps(summary, indent=1) + "\n")
    print(f"records in {asked.output}, {time.time() - began:.0f} s")
    return int(any(part["outcome"] == "failed" for part in done))


def chosen_parts(names: str | None, workloads: str) -> list[Part]:
    """Return the parts of these modules, in their own order; raises SystemExit for another name.

    `workloads` are those to train, by default all.
    """
    wanted = names.split(",") if names else [part.module for part in PARTS]
    unknown = set(wanted) - {part.module for part in PARTS}
    if unknown:
        known = ", ".join(dict.fromkeys(part.module for part in PARTS))
        raise SystemExit(f"error: no part is called {', '.join(sorted(unknown))}\nhint: {known}")
    trained = workloads.split(",") if workloads else [part.workload for part in PARTS]
    return [p for p in PARTS if p.module in wanted and (not p.workload or p.workload in trained)]


def process(part: Part, asked: argparse.Namespace, until: float) -> dict[str, Any]:
    """Run a part in a process of its own, again if it dies, until its time is over."""
    began = time.time()
    command = [
        sys.executable, str(Path(__file__)), "--part", part.module, "--workload", part.workload,
        "--run", asked.run, "--output", str(asked.output), "--until", str(until),
        "--commit", asked.commit, *(["--rehearse"] if asked.rehearse else []),
    ]  # fmt: skip
    code, tries = None, 0
    while tries <= _RESTARTS and until - time.time() > _LEAST_S:
        tries += 1
        print(f"--- {part.name}, {until - time.time():.0f} s", flush=True)
        child = subprocess.Popen(command, env={**os.environ, "PYTHONUNBUFFERED": "1"})
        try:
            code = child.wait(timeout=until + _GRACE_S - time.time())
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
            return {"outcome": "cut", "seconds": time.time() - began, "tries": tries}
        if code == 0:
            return {"outcome": "done", "seconds": time.time() - began, "tries": tries}
        if code > 0 and code != _GPU_LOST:
            break
    if not tries:
        return {"outcome": "left out", "why": "no time was left"}
    return {"outcome": "failed", "code": code, "seconds": time.time() - began, "tries": tries}


def _rehearsing() -> Any:
    """Let nothing be compiled: a peer's step would take longer to compile than all the rest."""
    import torch

    return torch.compiler.set_stance("force_eager")


def run_part(asked: argparse.Namespace) -> int:
    """Run one part here."""
    from gpu_parts.clock import Clock
    from gpu_parts.sheet import Ask, is_fatal

    module = importlib.import_module(f"gpu_parts.{asked.part}")
    ask = Ask(
        run=asked.run,
        output=asked.output,
        clock=Clock(asked.until),
        rehearse=asked.rehearse,
        workload=asked.workload or None,
        commit=asked.commit,
    )
    try:
        with _rehearsing() if asked.rehearse else nullcontext():
            module.run(ask)
    except Exception as error:
        traceback.print_exc()
        return _GPU_LOST if is_fatal(error) else 1
    return 0


if __name__ == "__main__":
    main()
