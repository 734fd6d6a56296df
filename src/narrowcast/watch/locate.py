"""Where a failing step first goes wrong, by module: one pass taken again with its borders watched.

The operation and its source line are the diagnosis' to find; this is what an error can say at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from narrowcast.engine.engine import Engine
from narrowcast.records.diagnosis import ModuleRange
from narrowcast.replay.moment import Moment
from narrowcast.replay.step import replay_step
from narrowcast.watch.boundaries import Boundaries

__all__ = ["BadBorder", "first_bad_border"]


@dataclass(frozen=True, kw_only=True)
class BadBorder:
    """The module border at which numbers stopped being finite."""

    crossed: ModuleRange

    @property
    def words(self) -> str:
        whose = f"module {self.crossed.module!r}" if self.crossed.module else "the model"
        what = "output" if self.crossed.phase == "forward" else "gradient of the output"
        held = self.crossed.values
        counts = [f"{held.infs} infinite"] if held.infs else []
        counts += [f"{held.nans} NaN"] if held.nans else []
        return (
            f"the {what} of {whose} is the first that is not finite "
            f"({' and '.join(counts)} of {held.numel} elements, in {held.dtype})"
        )


def first_bad_border(
    engine: Engine, compute_loss: Callable[[nn.Module, Any], Tensor], moment: Moment
) -> BadBorder | None:
    """Take one micro-batch again, forward and backward, and return where it first went wrong.

    None if all borders are finite this time, or compiled code hides them. The live model is what
    failed, since a skipped step leaves the weights alone; nothing is left of the pass afterwards.
    Where the loss is finite, what is infinite in forward does no harm: it is looked for in
    backward. Whatever `compute_loss` raises passes through.
    """
    scale = max(moment.scales.values(), default=1.0)
    with Boundaries(engine.model, scale) as borders:
        trace = replay_step(engine, compute_loss, moment, scale=scale, ranges=None)
    phase = "backward" if math.isfinite(trace.loss) else "forward"
    bad = [one for one in borders.ranges() if one.phase == phase and not one.values.is_finite]
    if not bad:
        return None
    # A mask of minus infinity is so in fp32 too; where fp32 fails itself, nothing is excused.
    with Boundaries(engine.model, 1.0) as borders:
        replay_step(engine, compute_loss, moment, policy_reference=True, ranges=None)
    meant = {o.module for o in borders.ranges() if o.phase == phase and not o.values.is_finite}
    return BadBorder(crossed=next((one for one in bad if one.module not in meant), bad[0]))
