"""How far a replay in low precision has come from the same step in fp32, operation by operation.

The local error (`ExecutedOp.local_error`) says what an operation did itself. The accumulated error
says how far its result is from what fp32 would have had by then, and needs both runs: each is
recorded with `samples`, and operations are matched by where they stand.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from narrowcast.errors import UsageError
from narrowcast.records.diagnosis import ExecutedOp
from narrowcast.replay.step import StepTrace

__all__ = ["FAR", "OpDifference", "differences", "first_difference", "gradient_errors"]

FAR = 2.0**-4
"""About what a thousand independent roundings to bf16 come to: sqrt(1000) * 2^-9 = 0.062."""

_Key = tuple[object, ...]


@dataclass(frozen=True, kw_only=True)
class OpDifference:
    """One operation in both runs."""

    op: ExecutedOp
    reference: ExecutedOp
    accumulated: float
    """rms(low - reference) / rms(reference) over the sampled elements; of gradients, unscaled.
    Infinite where only the low one is not finite."""

    @property
    def local(self) -> float | None:
        """What the operation did itself."""
        return self.op.local_error


def differences(low: StepTrace, reference: StepTrace) -> tuple[OpDifference, ...]:
    """Match the operations of two replays of one moment, in the order of the low one.

    Casts are left out, and what only one of them executed. An operation is matched with the one
    of the same name at the same place (phase, module, line), the n-th there with the n-th. Raises
    UsageError for traces without samples.
    """
    for trace in (low, reference):
        if trace.events and not trace.samples:
            raise UsageError(
                f"the replay in {trace.precision} kept no elements to compare",
                hint="replay_step(..., samples=4096), with the same number for both",
            )
    others = dict(_keyed(reference))
    return tuple(
        OpDifference(
            op=op,
            reference=others[key],
            accumulated=_relative(
                low.samples[op.index],
                reference.samples[others[key].index],
                factor=reference.scale / low.scale if op.phase == "backward" else 1.0,
            ),
        )
        for key, op in _keyed(low)
        if key in others
    )


def first_difference(
    low: StepTrace, reference: StepTrace, *, beyond: float = FAR
) -> OpDifference | None:
    """Return the first operation whose result is farther than `beyond` from that in fp32."""
    return next((d for d in differences(low, reference) if not d.accumulated <= beyond), None)


def gradient_errors(low: StepTrace, reference: StepTrace) -> dict[str, float]:
    """Return rms(low - reference) / rms(reference) of each parameter's unscaled gradient.

    Its negative logarithm, 20 log10, is the gradient's signal to quantisation noise in dB.
    """
    return {
        name: _relative(low.gradient_samples[name], values)
        for name, values in reference.gradient_samples.items()
        if name in low.gradient_samples
    }


def _keyed(trace: StepTrace) -> Iterator[tuple[_Key, ExecutedOp]]:
    """Yield the operations that are no casts, with their names for the place that they stand at."""
    met: Counter[_Key] = Counter()
    for op in trace.events:
        if op.op.startswith("aten._to_copy"):
            continue
        place = (op.phase, op.recomputed, op.module, op.file, op.line, op.op)
        met[place] += 1
        yield (*place, met[place]), op


def _relative(low: Tensor, high: Tensor, *, factor: float = 1.0) -> float:
    if low.shape != high.shape:
        return float("nan")
    counted = torch.isfinite(high)
    high = high.double()[counted]
    difference = low.double()[counted].mul_(factor).sub_(high)
    size = torch.linalg.vector_norm(high).item()
    error = torch.linalg.vector_norm(difference).nan_to_num(torch.inf).item()
    return error / size if size else (float("inf") if error else 0.0)
