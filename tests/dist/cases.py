"""What `conftest.cases` starts under torchrun: many small trainings on the same ranks.

Starting ranks takes seconds and such a training a tenth of one, so all of them run here, and each
test looks at what it is about. Every case meets anew, as if torchrun had started it again.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from narrowcast.errors import NarrowcastError
from narrowcast.parallel.meeting import Meeting
from narrowcast.parallel.peers import joined
from narrowcast.parallel.together import KINDS, Together, together_in
from narrowcast.plan import Plan, plan_named
from narrowcast.policy import POLICIES
from narrowcast.recipes.load import load_recipe
from narrowcast.records.codec import to_json
from narrowcast.records.run import StepPoint
from narrowcast.training.train import TrainOptions, train

RECIPE = str(Path(__file__).parent / "line.py")
PARTS = str(Path(__file__).parent / "parts.py")
CPU = torch.device("cpu")
PLANS = ("fp32", "bf16", "fp16", "bf16-true", "bf16-split", "lean")
QUICK = {"steps": 6, "evaluate_every": 2, "measure": False, "watch": 0}


def run(
    together: Together | None,
    directory: Path,
    plan: Plan | str = "fp32",
    *words: str,
    settings: tuple[str, ...] = (),
    recipe: str = RECIPE,
    resume: bool = False,
    stop_at: int | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Train, and return the record as JSON."""
    loaded = load_recipe(recipe, (*words, *settings))
    chosen = plan_named(plan) if isinstance(plan, str) else plan
    asked = TrainOptions(**{**QUICK, **options})
    record = train(
        loaded,
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


def islands() -> Plan:
    """Keep a whole block, and two layers that share a weight, in fp32."""
    plan = plan_named("bf16-split")
    policy = plan.policy.keeping_fp32("blocks.1", "head", "again")
    return replace(plan, name="islands", policy=policy)


def tied_islands() -> Plan:
    """Keep two layers in fp32 that share a weight large enough to be cut, one inside a block."""
    plan = plan_named("bf16-split")
    policy = plan.policy.keeping_fp32("blocks.1.layer", "outer")
    return replace(plan, name="tied-islands", policy=policy)


Act = Callable[[Together], Any]


class Cases:
    """Runs one case after another, and keeps what this rank saw of each."""

    def __init__(self) -> None:
        self._first = together_in("ddp", os.environ).meeting
        self.world = self._first.world
        self.seen: dict[str, Any] = {}

    def __call__(self, name: str, act: Act, *, kind: str = "ddp") -> None:
        met = Meeting(replace(self.world, attempt=len(self.seen) + 1), self._first.store)
        try:
            with met.failing_together():
                self.seen[name] = act(Together(kind=kind, meeting=met))
        except NarrowcastError as error:
            self.seen[name] = {"error": type(error).__name__, "message": error.message}


def main(root: Path, other: Path | None) -> None:
    """Run every case, and leave what each rank saw in ``rank-N.json``.

    `other` is where the cases of another number of ranks left their runs.
    """
    case = Cases()
    whole_models(case, root)
    sharded(case, root, other)
    (root / f"rank-{case.world.rank}.json").write_text(json.dumps(case.seen))


def whole_models(case: Cases, root: Path) -> None:
    """DDP."""
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
    resumed(case, root, "", "bf16-split", "dropout=0.3")
    for plan in ("fp32", "bf16-split"):
        resumed(case, root, f"felt-{plan}-", plan, "buffers=true", "felt=true", accumulate=2)
    case("left", lambda t: run(t, root / "left", "fp32", stop_at=3))
    case("unseeded", lambda t: run(t, root / "unseeded", "fp32", "unseeded=true"))
    case("indivisible", lambda t: run(t, root / "indivisible", "fp32", "batch_size=7"))
    case("released", lambda t: run(t, root / "released", released()))
    own = "fp32" if case.world.rank == 0 else "bf16"
    case("mismatch", lambda t: run(t, root / "mismatch", own))
    case("messages", lambda t: messages(t, root / "messages"))
    case("collectives", collectives)


def resumed(case: Cases, root: Path, name: str, plan: str, *words: str, **options: Any) -> None:
    """Train a whole, train a part of it, and go on."""
    whole, cut, on = (root / f"{name}{which}" for which in ("whole", "cut", "resumed"))
    act = partial(run, plan=plan, settings=words, **options)
    case(whole.name, partial(act, directory=whole))
    case(cut.name, partial(act, directory=cut, stop_at=3))
    case(on.name, partial(resumed_copy, cut, on, act))


def sharded(case: Cases, root: Path, other: Path | None) -> None:
    """FSDP2; its runs lie in folders that begin with fsdp2."""
    is_pair = case.world.size == 2

    def cut(name: str, *words: Any, kind: str = "fsdp2", **options: Any) -> None:
        where = root / f"{kind}-{name}"
        case(where.name, lambda t: run(t, where, *words, **options), kind=kind)

    for plan in PLANS if is_pair else ("fp32", "lean"):
        cut(plan, plan)
        cut(f"{plan}-clipped", plan, accumulate=2, clip_norm=0.5)
        for kind in KINDS if is_pair else ():
            cut(f"{plan}-summed", plan, kind=kind, accumulate=2)
    cut("sgd", "fp32", "plain_sgd=true", steps=1)
    cut("buffers", "bf16-split", "buffers=true")
    for name, what in (("overflow", 1), ("infinite", 2)):
        cut(name, "fp16", "odd=7", f"kind={what}")
    for plan in ("fp32", "bf16-split", "lean"):
        for kind in KINDS:
            cut(f"odd-{plan}", plan, kind=kind, recipe=PARTS, steps=1)
            if is_pair:
                cut(f"even-{plan}", plan, "even=true", "norms=true", kind=kind, recipe=PARTS)
                cut(f"frozen-{plan}", plan, "even=true", "frozen=true", kind=kind, recipe=PARTS)
    for kind in KINDS if is_pair else ():
        words = ("lean", "even=true", "norms=true")
        cut("uncut-summed", *words, kind=kind, recipe=PARTS, accumulate=2)
        cut("islands", islands(), "even=true", kind=kind, recipe=PARTS)
        cut("tied", "bf16-split", "even=true", "tied=true", kind=kind, recipe=PARTS)
        cut("tied-islands", tied_islands(), "even=true", "tied=true", kind=kind, recipe=PARTS)
    if is_pair:
        cut("measured", "bf16", measure=True, watch=2)
        cut("unused", "fp32", "unused=true")
        cut("adafactor", "fp32", "adafactor=true", recipe=PARTS)
        cut("strided", "fp32", "strided=true", recipe=PARTS)
        cut("fickle", "fp32", "fickle=true", recipe=PARTS)
        cut("crossed", "fp32", "crossed=true", recipe=PARTS)
        cut("thawing", "fp32", "frozen=true", "thawing=true", recipe=PARTS)
        cut("leaving", "fp32", "leaving=true", recipe=PARTS, accumulate=2)
        cut("shadow", "bf16", watch=2, shadow=True)
        case("fsdp2-released", lambda t: run(t, root / "no", released()), kind="fsdp2")
        going_on(case, root)
    cut("still", "bf16-split", "still=true", recipe=PARTS, stop_at=3 if is_pair else None)
    if other is not None:
        left, where = other / "fsdp2-still", root / "grown"
        act = partial(run, plan="bf16-split", settings=("still=true",), recipe=PARTS)
        case("grown", partial(resumed_copy, left, where, act), kind="fsdp2")


def going_on(case: Cases, root: Path) -> None:
    """Checkpoints of each kind, continued by each."""
    for plan in ("bf16-split", "lean"):
        act = partial(run, plan=plan, settings=("dropout=0.3",))
        whole = root / f"fsdp2-whole-{plan}"
        case(whole.name, partial(act, directory=whole), kind="fsdp2")
        for saved in (*KINDS, "one"):
            left = root / f"left-by-{saved}-{plan}"
            if saved != "one":
                case(left.name, partial(act, directory=left, stop_at=3), kind=saved)
            elif case.world.rank == 0:
                act(None, directory=left, stop_at=3)
            for kind in KINDS:
                where = root / f"{saved}-to-{kind}-{plan}"
                case(where.name, partial(resumed_copy, left, where, act), kind=kind)


def resumed_copy(left: Path, where: Path, act: Any, together: Together) -> Any:
    """Go on with a copy of a run."""
    together.meeting.from_main("copied", lambda: str(shutil.copytree(left, where)))
    return act(together, directory=where, resume=True)


def messages(together: Together, directory: Path) -> dict[str, int]:
    """Count what a training asks of the other ranks in two steps, beside gradients."""
    asked: Counter[str] = Counter()
    seen: list[Counter[str]] = []

    def observe(event: object) -> None:
        if isinstance(event, StepPoint):
            seen.append(asked.copy())

    with pytest.MonkeyPatch.context() as patched:
        for name in ("all_reduce", "all_gather", "all_gather_object", "broadcast"):
            patched.setattr(dist, name, counting(asked, name))
        options = TrainOptions(steps=6, accumulate=2, checkpoint_every=6, measure=False, watch=0)
        named = {"device": CPU, "together": together, "observe": observe}
        train(load_recipe(RECIPE), plan_named("fp16"), options, directory, **named)
    return dict(seen[4] - seen[2])


def counting(asked: Counter[str], name: str) -> Callable[..., Any]:
    real = getattr(dist, name)

    def count(*args: Any, **named: Any) -> Any:
        asked[name] += 1
        return real(*args, **named)

    return count


def collectives(together: Together) -> dict[str, Any]:
    """Ask every question once."""
    with joined(together.meeting, "ddp", CPU) as ranks:
        rank, size = ranks.rank, ranks.size
        parts = [torch.full((3,), float(rank + 1)), torch.full((2, 2), rank, dtype=torch.bfloat16)]
        ranks.add_up(parts)
        odd = torch.tensor([rank == 0, True, rank == 0])
        mine = torch.tensor([[rank, 1], [rank, 2]], dtype=torch.int16).t()
        nothing, point = torch.ones(0, 2), torch.tensor(rank + 0.5, dtype=torch.float64)
        ranks.take_from_main([odd, mine, nothing, point])
        return {
            "any": [ranks.any(rank == size - 1), ranks.any(False)],
            "each": ranks.any_of_each([rank == 0, False, rank == 1]),
            "gather": ranks.gather(rank * 10),
            "means": ranks.means_and_any([float(rank), 0.1], rank == size - 1),
            "sums": [part.flatten().tolist() for part in parts],
            "dtypes": [str(part.dtype) for part in parts],
            "main's": [odd.tolist(), mine.tolist(), nothing.tolist(), point.item()],
        }


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else None)
