"""What `conftest.cases` starts under torchrun: many small trainings on the same ranks.

Starting ranks takes seconds and such a training a tenth of one, so all of them run here, and each
test looks at what it is about. Every case meets anew, as if torchrun had started it again.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from narrowcast.errors import NarrowcastError
from narrowcast.parallel.meeting import Meeting
from narrowcast.parallel.peers import joined
from narrowcast.parallel.together import Together, together_in
from narrowcast.plan import Plan, plan_named
from narrowcast.policy import POLICIES
from narrowcast.recipes.load import load_recipe
from narrowcast.records.codec import to_json
from narrowcast.training.train import TrainOptions, train

RECIPE = str(Path(__file__).parent / "line.py")
CPU = torch.device("cpu")
PLANS = ("fp32", "bf16", "fp16", "bf16-true", "bf16-split", "lean")
QUICK = {"steps": 6, "evaluate_every": 2, "measure": False, "watch": 0}


def run(
    together: Together | None,
    directory: Path,
    plan: Plan | str = "fp32",
    *settings: str,
    resume: bool = False,
    stop_at: int | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Train, and return the record as JSON."""
    recipe = load_recipe(RECIPE, settings)
    chosen = plan_named(plan) if isinstance(plan, str) else plan
    asked = TrainOptions(**{**QUICK, **options})
    record = train(
        recipe,
        chosen,
        asked,
        directory,
        device=CPU,
        together=together,
        resume=resume,
        stop_at=stop_at,
    )
    found: dict[str, Any] = to_json(record)
    return found


def released() -> Plan:
    policy = replace(POLICIES["bf16"], name="released", param="bf16")
    return Plan(
        name="released", policy=policy, weights="split16", states="int8", gradients="release"
    )


def main(root: Path) -> None:
    """Run every case, and leave what each rank saw in ``rank-N.json``."""
    first = together_in("ddp", os.environ).meeting
    world, seen = first.world, {}

    def case(name: str, act: Callable[[Together], Any]) -> None:
        met = Meeting(replace(world, attempt=len(seen) + 1), first.store)
        try:
            with met.failing_together():
                seen[name] = act(Together(kind="ddp", meeting=met))
        except NarrowcastError as error:
            seen[name] = {"error": type(error).__name__, "message": error.message}

    for plan in PLANS:
        case(plan, lambda t, p=plan: run(t, root / p, p))  # type: ignore[misc]
        case(
            f"{plan}-accumulated",
            lambda t, p=plan: run(t, root / f"{p}-accumulated", p, accumulate=2, clip_norm=0.5),  # type: ignore[misc]
        )
    case("clipped", lambda t: run(t, root / "clipped", clip_norm=0.1))
    case("measured", lambda t: run(t, root / "measured", "bf16", measure=True, watch=2))
    case("sgd", lambda t: run(t, root / "sgd", "fp32", "plain_sgd=true", steps=1))
    case("buffers", lambda t: run(t, root / "buffers", "bf16-split", "buffers=true"))
    case("unused", lambda t: run(t, root / "unused", "fp32", "unused=true"))
    for name, kind in (("overflow", 1), ("infinite", 2)):
        settings = ("odd=7", f"kind={kind}")
        case(name, lambda t, n=name, s=settings: run(t, root / n, "fp16", *s))  # type: ignore[misc]
    case("whole", lambda t: run(t, root / "whole", "bf16-split", "dropout=0.3"))
    cut = root / "cut"
    case("cut", lambda t: run(t, cut, "bf16-split", "dropout=0.3", stop_at=3))
    case("resumed", lambda t: run(t, cut, "bf16-split", "dropout=0.3", resume=True))
    case("left", lambda t: run(t, root / "left", "fp32", stop_at=3))
    case("unseeded", lambda t: run(t, root / "unseeded", "fp32", "unseeded=true"))
    case("indivisible", lambda t: run(t, root / "indivisible", "fp32", "batch_size=7"))
    case("released", lambda t: run(t, root / "released", released()))
    own = "fp32" if world.rank == 0 else "bf16"
    case("mismatch", lambda t: run(t, root / "mismatch", own))
    case("collectives", collectives)
    (root / f"rank-{world.rank}.json").write_text(json.dumps(seen))


def collectives(together: Together) -> dict[str, Any]:
    """Ask every question once."""
    with joined(together.meeting, "ddp", CPU) as ranks:
        rank, size = ranks.rank, ranks.size
        parts = [torch.full((3,), float(rank + 1)), torch.full((2, 2), rank, dtype=torch.bfloat16)]
        ranks.add_up(parts)
        mine = torch.tensor([[rank, 1], [rank, 2]], dtype=torch.int16).t()
        ranks.take_from_main([mine])
        return {
            "any": [ranks.any(rank == size - 1), ranks.any(False)],
            "each": ranks.any_of_each([rank == 0, False, rank == 1]),
            "gather": ranks.gather(rank * 10),
            "mean": ranks.mean(float(rank)),
            "sums": [part.flatten().tolist() for part in parts],
            "dtypes": [str(part.dtype) for part in parts],
            "main's": mine.tolist(),
        }


if __name__ == "__main__":
    main(Path(sys.argv[1]))
