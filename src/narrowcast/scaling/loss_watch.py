"""Losses held unread, so that a skipped step can be asked whether its loss was finite.

A loss that is NaN before it is scaled makes every gradient NaN, and lowering the scale cannot cure
that. Reading the loss each step would wait for the device; here it is kept (detached, one number
each) and looked at only when a step was skipped, when waiting has happened already.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

__all__ = ["LossWatch"]

_HELD_AT_MOST = 32


def _ranks_may_differ() -> bool:
    distributed = torch.distributed
    return (
        distributed.is_available()
        and distributed.is_initialized()
        and distributed.get_world_size() > 1
    )


class LossWatch:
    """The losses of one optimizer step, over all its micro-batches."""

    def __init__(self) -> None:
        self._held: list[Tensor] = []
        self._read = 0.0
        """0 while all numbers that were read are finite, and NaN from then on."""

    def passing(self, outputs: Any) -> Any:
        """Hold the outputs and return them; an iterable that is lazy stays lazy."""
        if isinstance(outputs, Tensor):
            self.hold(outputs)
        elif isinstance(outputs, list | tuple):
            for output in outputs:
                self.passing(output)
        elif isinstance(outputs, Iterable):
            return map(self.passing, outputs)
        return outputs

    def hold(self, output: Tensor) -> None:
        """Hold one tensor of losses."""
        size = output.numel()
        if size == 0 or not output.is_floating_point():
            return
        value = output.detach()
        if size > 1:  # one number that is finite exactly when all of them are
            value = torch.linalg.vector_norm(value, ord=torch.inf)
        self._held.append(value)
        if len(self._held) >= _HELD_AT_MOST:
            self._held = [self._taint(value.device)]

    def note(self, output: Tensor) -> None:
        """Read a number that is on a CPU, where nothing waits, and hold any other tensor."""
        if output.is_cpu and output.numel() == 1 and output.is_floating_point():
            self._read += output.item() * 0.0
        else:
            self.hold(output)

    def _taint(self, device: torch.device) -> Tensor:
        """Return fp32 0 when all held values are finite, NaN otherwise: x * 0 is 0 for finite x."""
        zeros = [(x * 0).to(device, torch.float32, non_blocking=True) for x in self._held]
        return torch.stack([zero.reshape(()) for zero in zeros]).sum()

    def was_bad(self, device: torch.device) -> Tensor:
        """Return whether a loss was not finite, as fp32 1 or 0 on `device`; does not read it.

        Among several ranks always 0: their gradients are the same, their losses are not, and a
        decision by one rank's loss would set its scale apart from the others'.
        """
        if _ranks_may_differ():
            return torch.zeros((), device=device)
        if not self._held or math.isnan(self._read):
            return torch.full((), float(math.isnan(self._read)), device=device)
        return self._taint(device).isnan().float()

    def clear(self) -> None:
        self._held.clear()
        self._read = 0.0
