"""What passed the borders of the modules in the judged step, with the line that called each.

It is what the display of a diagnosis is made of: the model's own source with values beside it.
"""

from __future__ import annotations

import linecache
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import nn

from narrowcast.diagnosis.gather import on_its_own
from narrowcast.diagnosis.snapshot import Snapshot
from narrowcast.diagnosis.subject import Subject
from narrowcast.plan import Plan
from narrowcast.records.diagnosis import ModuleRange
from narrowcast.replay.places import innermost_line
from narrowcast.replay.step import replay_step
from narrowcast.watch.boundaries import Boundaries

__all__ = ["boundary_ranges"]


def boundary_ranges(subject: Subject, plan: Plan, snapshot: Snapshot) -> tuple[ModuleRange, ...]:
    """Take the step's first micro-batch once more and return what crossed each module's border."""
    engine = on_its_own(subject, plan, snapshot).engine
    factor = 1.0 / plan.micro_batches
    with _callers(engine.model) as called, Boundaries(engine.model, factor) as borders:
        replay_step(engine, subject.compute_loss, snapshot.moments[0], scale=1.0, ranges=None)
    return tuple(_placed(each, called) for each in borders.ranges())


@contextmanager
def _callers(model: nn.Module) -> Iterator[dict[str, tuple[str, int]]]:
    """Note from which line of the user's each module is called first."""
    called: dict[str, tuple[str, int]] = {}

    def note(name: str) -> Any:
        def hook(module: nn.Module, args: Any) -> None:
            if name not in called:
                called[name] = innermost_line(sys._getframe(1))

        return hook

    hooks = [module.register_forward_pre_hook(note(name)) for name, module in model.named_modules()]
    try:
        yield called
    finally:
        for hook in hooks:
            hook.remove()


def _placed(found: ModuleRange, called: dict[str, tuple[str, int]]) -> ModuleRange:
    file, line = called.get(found.module, ("", 0))
    code = linecache.getline(file, line).strip() if line else ""
    return replace(found, file=file, line=line, code=code)
