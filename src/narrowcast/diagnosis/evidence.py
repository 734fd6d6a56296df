"""What is known of one step: how it was replayed, as asked and in fp32, and every operation of it.

Rules read evidence and nothing else, so that a verdict can be tested without a training, and a
trial of a remedy is judged by the same rules as the training was.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from narrowcast.formats import float_format
from narrowcast.records.diagnosis import ExecutedOp
from narrowcast.records.ranges import TensorRange
from narrowcast.replay.step import StepTrace

__all__ = [
    "Evidence",
    "ancestors",
    "gradient_errors",
    "is_product",
    "lost_share",
    "parent",
]

# They multiply and add up: what goes into them is no longer one tensor's own affair.
_PRODUCTS = (
    "aten.mm", "aten.addmm", "aten.bmm", "aten.baddbmm", "aten.addbmm", "aten.mv", "aten.addmv",
    "aten.dot", "aten.linear", "aten.matmul", "aten.convolution", "aten._convolution",
    "aten._scaled_dot_product", "aten.mkldnn",
)  # fmt: skip
# More than any formula takes from a constant to the operation that it spoils.
_MOST_STEPS = 6


@dataclass(frozen=True, kw_only=True, eq=False)
class Evidence:
    """One micro-batch of one step, replayed as asked and in fp32 from the same weights."""

    step: int
    compute: str
    """Format name of what the precision computes in."""
    floor: float
    """The lowest loss scale that the training would come down to; 1 without scaling."""
    scale: float
    """The loss scale that was in force; 1 without scaling."""
    low: StepTrace
    """At that scale; where it overflows, at the largest one below that does not, and where none
    serves, at the floor."""
    best: StepTrace | None = None
    """At the largest scale of all that does not overflow; None where none was looked for, or where
    the gradients overflow at every one from 1 on."""
    reference: StepTrace

    @property
    def is_loud(self) -> bool:
        """Whether loss or gradients are not finite at any scale that the training may use."""
        return not self.low.is_finite

    @property
    def has_short_range(self) -> bool:
        """Whether the format ends before fp32 does, so that gradients are lost below its end."""
        return float_format(self.compute).min_exponent > float_format("fp32").min_exponent


def lost_share(low: TensorRange, reference: TensorRange) -> float:
    """Return the share of the elements that are not 0 in fp32 and are 0 here: by their numbers."""
    there = reference.numel - reference.zeros
    return max(0, low.zeros - reference.zeros) / there if there else 0.0


def gradient_errors(low: StepTrace, reference: StepTrace) -> Mapping[str, float]:
    """Map each parameter to rms(gradient - that of fp32) / rms(that of fp32), from samples."""
    errors = {}
    for name, wanted in reference.gradient_samples.items():
        found = low.gradient_samples.get(name, torch.zeros_like(wanted))
        size = float(torch.linalg.vector_norm(wanted, dtype=torch.float64))
        error = float(torch.linalg.vector_norm(found - wanted, dtype=torch.float64))
        errors[name] = error / size if size else (math.inf if error else 0.0)
    return errors


def parent(parameter: str) -> str:
    """Return the module that holds a parameter or buffer."""
    return parameter.rpartition(".")[0]


def is_product(op: ExecutedOp) -> bool:
    """Whether an operation is a matrix product or a convolution, or the gradient of one."""
    return op.op.startswith(_PRODUCTS)


def ancestors(op: ExecutedOp, events: Sequence[ExecutedOp]) -> Iterator[ExecutedOp]:
    """Yield an operation and what fed it, nearest first, not beyond matrix products."""
    seen, level = {op.index}, [op]
    for _ in range(_MOST_STEPS):
        yield from level
        feeding = [i for each in level if not is_product(each) for i in each.fed_by if i >= 0]
        level = [events[i] for i in dict.fromkeys(feeding) if i not in seen]
        seen.update(each.index for each in level)
