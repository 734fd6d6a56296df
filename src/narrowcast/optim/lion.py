"""Lion on any weight store and state store: one moment, and steps of equal size everywhere.

    w <- w (1 - lr * weight_decay) - lr * sign(m + (1 - beta1) (g - m))
    m <- m + (1 - beta2) (g - m)

Chen et al. 2023, algorithm 2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from narrowcast.optim.narrow import NarrowOptimizer
from narrowcast.optim.rule import Coefficients, Rule, number, require_betas, require_number
from narrowcast.optim.states import Moment

__all__ = ["LION", "Lion"]

_MOMENTS = (Moment(name="exp_avg", signed=True),)


class _LionRule(Rule):
    name = "Lion"

    def moments(self, group: Mapping[str, Any]) -> tuple[Moment, ...]:
        return _MOMENTS

    def coefficients(self, group: Mapping[str, Any], step: int, *, is_fresh: bool) -> Coefficients:
        lr = number(group["lr"])
        beta1, beta2 = group["betas"]
        return 1 - lr * group["weight_decay"], 1 - beta1, 1 - beta2, -lr

    def update(
        self,
        weight: Tensor,
        gradient: Tensor,
        moments: Sequence[Tensor],
        coefficients: Coefficients,
    ) -> None:
        decay, share1, share2, negative_lr = coefficients
        (mean,) = moments
        if decay != 1.0:
            weight.mul_(decay)
        weight.add_(mean.lerp(gradient, share1).sign_(), alpha=negative_lr)
        mean.lerp_(gradient, share2)

    def require_sound(self, group: Mapping[str, Any]) -> None:
        require_number("lr", group["lr"])
        require_number("weight_decay", group["weight_decay"])
        require_betas(group["betas"], usual=(0.9, 0.99))


LION = _LionRule()


class Lion(NarrowOptimizer):
    """Lion whose weights and moment live in the stores of your choice; see `AdamW`."""

    rule = LION

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        weights: str = "fp32",
        states: str = "fp32",
        generator: torch.Generator | None = None,
        **others: object,
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "betas": betas,
                "weight_decay": weight_decay,
                "maximize": maximize,
            },
            weights=weights,
            states=states,
            generator=generator,
            others=others,
        )
