"""A training of two numbers in which it can be chosen what goes wrong."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from narrowcast.dropin.grad_scaler import GradScaler

NAN, INF = math.nan, math.inf


class Loop:
    """A weight of two elements whose gradient is the input: what goes wrong can be chosen."""

    def __init__(self, *, fused: bool = False, optimizer: Any = None, **options: Any) -> None:
        self.weight = nn.Parameter(torch.ones(2))
        self.optimizer = optimizer or torch.optim.SGD([self.weight], lr=0.5, fused=fused)
        self.scaler = GradScaler("cpu", **options)

    def step(
        self,
        gradient: float = 1.0,
        *,
        loss: float = 0.0,
        unscaled: Callable[[Tensor], object] | None = None,
    ) -> Any:
        """Step once; `loss` is added to the loss, `unscaled` changes the gradient before `step`."""
        self.optimizer.zero_grad()
        value = (self.weight * gradient).sum() + loss
        self.scaler.scale(value).backward()
        if unscaled is not None:
            self.scaler.unscale_(self.optimizer)
            unscaled(self.weight.grad)
        outcome = self.scaler.step(self.optimizer)
        self.scaler.update()
        return outcome

    def overflow(self) -> Any:
        """Step once with a finite loss and a scaled gradient that is infinite."""
        self.optimizer.zero_grad()
        self.scaler.scale(self.weight.sum()).backward()
        self.weight.grad[1] = INF
        outcome = self.scaler.step(self.optimizer)
        self.scaler.update()
        return outcome
