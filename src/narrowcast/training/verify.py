"""Whether a run of a user's recipe, stopped and resumed, is the run that was never stopped.

    A   all steps                     in this process
    B   all steps again               in this process, the recipe loaded anew
    C   the first half                in this process
        the rest, resumed             in a process of its own, as after a crash

If A and B differ, the recipe is not deterministic and nothing can be said of C. Otherwise every
weight, buffer, optimizer state, counter, random state and metric of C is held against A, bit for
bit. The second process matters: what a recipe keeps in global variables survives in the first.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from narrowcast import errors
from narrowcast.errors import NarrowcastError, RecipeError
from narrowcast.plan import Plan
from narrowcast.precision.device import environment
from narrowcast.recipes.load import load_recipe, option_values
from narrowcast.records.codec import from_json, to_json
from narrowcast.records.run import StepPoint
from narrowcast.records.verify import Difference, Verdict, VerifyRecord
from narrowcast.training import checkpoint
from narrowcast.training.assembly import TrainOptions, steps_of
from narrowcast.training.events import Hearing, Observer, ignore
from narrowcast.training.run_directory import RunDirectory
from narrowcast.training.state_tree import leaves
from narrowcast.training.train import train

__all__ = ["resume_from_request", "verify_resume"]

# Enough for a scale to move and an epoch to end in most recipes, and over in seconds.
_DEFAULT_STEPS = 20
# Where a run's own story is kept: times differ, and the rest is compared as metrics.
_STORY = ("record", "metrics_bytes")


def verify_resume(
    recipe: str,
    overrides: Sequence[str],
    plan: Plan,
    options: TrainOptions,
    directory: Path,
    *,
    device: torch.device,
    observe: Observer = ignore,
) -> VerifyRecord:
    """Run, run again, stop and resume; compare. The three runs stay in `directory`.

    Without `options.steps` the run has at most 20 steps. Raises what `train` raises, and
    KeyboardInterrupt if one of the runs was interrupted.
    """
    started = _now()
    loaded = load_recipe(recipe, overrides)
    steps = options.steps or min(_DEFAULT_STEPS, steps_of(loaded, options))
    half = steps // 2
    case = _Case(
        recipe=recipe,
        overrides=tuple(overrides),
        plan=plan,
        options=replace(options, steps=steps, measure=False),
        device=device,
    )
    whole = case.run(directory / "whole", observe)
    difference = _first_difference(whole, case.run(directory / "again", observe))
    verdict: Verdict = "NOT DETERMINISTIC"
    if difference is None:
        case.run(directory / "resumed", observe, stop_at=half)
        difference = _first_difference(whole, case.resume_elsewhere(directory / "resumed"))
        verdict = "NOT EXACT" if difference else "EXACT"
    tensors = [value for value in whole.state.values() if isinstance(value, Tensor)]
    return VerifyRecord(
        recipe=loaded.name,
        options=option_values(loaded),
        precision=plan.name,
        seed=options.seed,
        steps=steps,
        interrupted_at=half,
        verdict=verdict,
        why=_WHY[verdict],
        difference=difference,
        tensors=len(tensors),
        bytes=sum(t.nbytes for t in tensors),
        values=len(whole.state) - len(tensors) + len(whole.points),
        environment=environment(device),
        started=started,
        finished=_now(),
    )


_WHY: dict[Verdict, str] = {
    "EXACT": "the resumed run equals the uninterrupted one in every bit",
    "NOT EXACT": "two uninterrupted runs agree, and the resumed one differs: the recipe keeps "
    "state that is in no state_dict(), no buffer and no random generator of Python, numpy or torch",
    "NOT DETERMINISTIC": "two uninterrupted runs of the same seed differ already, so that no "
    "resume can be exact: look for the clock, the order of files or sets, or a random generator "
    "that is seeded from outside",
}


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


@dataclass(frozen=True, kw_only=True)
class _Ending:
    """What a run left: its final state, leaf by leaf, and its points without durations."""

    state: dict[str, Any]
    points: list[Any]

    @classmethod
    def of(cls, directory: Path) -> _Ending:
        place = RunDirectory(directory)
        state = checkpoint.load_latest(place.checkpoints)
        points = place.read_metrics()
        return cls(
            state=leaves({name: part for name, part in state.items() if name not in _STORY}),
            points=[replace(p, seconds=0) if isinstance(p, StepPoint) else p for p in points],
        )


def _first_difference(a: _Ending, b: _Ending) -> Difference | None:
    step = next(
        (p.step for p, q in zip(a.points, b.points, strict=False) if repr(p) != repr(q)), None
    )
    for name, value in a.state.items():
        what = _how_they_differ(value, b.state.get(name))
        if what:
            return Difference(name=name, what=what, step=step)
    extra = sorted(set(b.state) - set(a.state))
    if extra:
        return Difference(name=extra[0], what="there only after the second run", step=step)
    if step is not None or len(a.points) != len(b.points):
        return Difference(
            name="metrics", what=f"{len(a.points)} and {len(b.points)} points", step=step
        )
    return None


def _how_they_differ(a: Any, b: Any) -> str:
    """Describe a difference in any bit; empty if there is none."""
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        return _how_they_differ(torch.from_numpy(a), torch.from_numpy(b))
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return "" if repr(a) == repr(b) else f"{a!r:.60} and {b!r:.60}"
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return f"{a.dtype} {tuple(a.shape)} and {b.dtype} {tuple(b.shape)}"
    if a.numel() == 0:  # has no bytes that could be viewed
        return ""
    left, right = (t.reshape(-1).view(torch.uint8).view(t.numel(), -1) for t in (a, b))
    places = (left != right).any(dim=1)
    if not places.any():
        return ""
    wide = torch.complex128 if a.is_complex() else torch.float64
    gap = (a.reshape(-1)[places].to(wide) - b.reshape(-1)[places].to(wide)).abs().max()
    return f"{int(places.sum())} of {a.numel()} elements, by {float(gap):.3g} at most"


_CHILD = (
    "import json, sys; request = json.load(sys.stdin); sys.path[:] = request['path']; "
    "from narrowcast.training.verify import resume_from_request; resume_from_request(request)"
)


@dataclass(frozen=True, kw_only=True)
class _Case:
    """The training that is run several times."""

    recipe: str
    overrides: tuple[str, ...]
    plan: Plan
    options: TrainOptions
    device: torch.device

    def run(self, directory: Path, observe: Observer, *, stop_at: int | None = None) -> _Ending:
        hearing = Hearing(observe)
        train(
            load_recipe(self.recipe, self.overrides),
            self.plan,
            self.options,
            directory,
            device=self.device,
            observe=hearing,
            stop_at=stop_at,
        )
        if hearing.stop_asked:
            raise KeyboardInterrupt
        return _Ending.of(directory)

    def resume_elsewhere(self, directory: Path) -> _Ending:
        """Resume in a process of its own; raises the error that it raised there."""
        request = {
            "path": sys.path,
            "recipe": self.recipe,
            "overrides": self.overrides,
            "plan": to_json(self.plan),
            "options": to_json(self.options),
            "directory": str(directory),
            "device": str(self.device),
        }
        child = subprocess.run(
            [sys.executable, "-c", _CHILD],
            input=json.dumps(request),
            capture_output=True,
            text=True,
            check=False,
        )
        if child.returncode:
            raise _error_of(child)
        return _Ending.of(directory)


def _error_of(child: subprocess.CompletedProcess[str]) -> NarrowcastError:
    told = child.stdout.strip().splitlines()
    if told and told[-1].startswith("{"):
        error = json.loads(told[-1])
        kind: type[NarrowcastError] = getattr(errors, error["kind"])
        return kind(f"resuming failed: {error['message']}", hint=error["hint"])
    return RecipeError(
        f"the process that resumed ended with code {child.returncode}: {child.stderr[-500:]}",
        hint="the same recipe trained in the first process: what does it keep from it?",
    )


def resume_from_request(request: dict[str, Any]) -> None:
    """Resume a run as another process asked; an error of ours leaves as JSON on stdout."""
    try:
        train(
            load_recipe(request["recipe"], request["overrides"]),
            from_json(Plan, request["plan"]),
            from_json(TrainOptions, request["options"]),
            request["directory"],
            device=torch.device(request["device"]),
            resume=True,
        )
    except NarrowcastError as error:
        told = {"kind": type(error).__name__, "message": error.message, "hint": error.hint}
        sys.stdout.write(json.dumps(told) + "\n")
        sys.exit(error.exit_code)
