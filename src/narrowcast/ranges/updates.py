"""How much of an update a weight in few bits takes: what is too small for it is rounded away.

A bf16 number is 2^-8 of itself from the next one, and nearest rounding loses whatever is less than
half of that. Adam moves each weight by about the learning rate, so that at 1e-5 most weights of
size 0.02 never move at all. The same holds of all that is added to a number that is stored: weight
decay, an average of weights, a moment.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from narrowcast.errors import UsageError
from narrowcast.precision.cast import torch_dtype

__all__ = ["UpdateLoss", "averaging", "compare_updates", "lost_updates", "with_decay"]

# Elements that are rounded at once: temporaries of 4 MiB, whatever the weight.
_CHUNK = 1 << 20


@dataclass(frozen=True, kw_only=True)
class UpdateLoss:
    """What became of an update, element by element."""

    elements: int
    """Elements that were looked at."""
    updated: int
    """Those of them with an update that is not 0 in fp32."""
    lost: int
    """Updated elements whose stored number stayed the same."""
    ratio: float
    """Root mean square of the updates over that of the weights; infinite for weights of 0."""
    carried: float | None
    """How much of the update arrived, as <change, update> / <update, update>: 1 where it is stored
    exactly, near 1 where it is rounded at random, since what is lost here arrives elsewhere. None
    where the update is not known, only that there was one, or is 0."""

    @property
    def share(self) -> float:
        """Lost updates over updates; 0 where there are none."""
        return self.lost / self.updated if self.updated else 0.0


@torch.no_grad()
def lost_updates(before: Tensor, update: Tensor, into: str) -> UpdateLoss:
    """Add `update` to weights stored in format `into`, rounding to nearest, and count what is lost.

    `before` is rounded to the format first; the sum is taken in fp32, as optimizers take it. Reads
    the device a few times for each million elements.
    """
    if before.shape != update.shape:
        raise UsageError(
            f"an update of shape {tuple(update.shape)} for weights of {tuple(before.shape)}",
            hint="pass the weights, and what an optimizer would add to each",
        )
    if into == "tf32":
        raise UsageError("weights are not stored in tf32", hint="it is a way to multiply fp32")
    dtype = torch_dtype(into)
    sums = _Sums()
    for weight, change in zip(_flat(before), _flat(update), strict=True):
        stored = weight.to(dtype).float()
        wanted = stored + change.float()
        sums.add(stored, wanted, wanted.to(dtype).float())
    return sums.result()


def with_decay(update: Tensor, weight: Tensor, *, lr: float, weight_decay: float) -> Tensor:
    """Return an update in fp32 with that of decoupled weight decay, -lr * weight_decay * w."""
    return update.float() - (lr * weight_decay) * weight.float()


def averaging(average: Tensor, weight: Tensor, *, decay: float) -> Tensor:
    """Return the update in fp32 of an exponential moving average: (1 - decay) * (w - average)."""
    return (1 - decay) * (weight.float() - average.float())


def compare_updates(before: Tensor, wanted: Tensor, after: Tensor) -> UpdateLoss:
    """Count, of fp32 numbers before an update, after it as it should be, and as it is stored."""
    sums = _Sums()
    sums.add(before, wanted, after)
    return sums.result()


class _Sums:
    """Counts and sums of squares over the parts of a tensor."""

    def __init__(self) -> None:
        self.elements = self.updated = self.lost = 0
        self.weights = self.updates = self.changes = 0.0

    def add(self, before: Tensor, wanted: Tensor, after: Tensor) -> None:
        update, change = (wanted - before).double(), (after - before).double()
        is_updated = update != 0
        lost = is_updated & (change == 0)
        numbers = torch.stack(
            [
                is_updated.sum().double(),
                lost.sum().double(),
                before.double().square().sum(),
                update.square().sum(),
                (change * update).sum(),
            ]
        ).tolist()
        self.elements += before.numel()
        self.updated += int(numbers[0])
        self.lost += int(numbers[1])
        self.weights += numbers[2]
        self.updates += numbers[3]
        self.changes += numbers[4]

    def result(self) -> UpdateLoss:
        ratio = 0.0
        if self.updates:
            ratio = math.sqrt(self.updates / self.weights) if self.weights else math.inf
        return UpdateLoss(
            elements=self.elements,
            updated=self.updated,
            lost=self.lost,
            ratio=ratio,
            carried=self.changes / self.updates if self.updates else None,
        )


def _flat(tensor: Tensor) -> Iterator[Tensor]:
    yield from torch.split(tensor.detach().reshape(-1), _CHUNK) if tensor.numel() else ()
