"""AdamW on any weight store and state store.

    w <- w (1 - lr * weight_decay)
    m <- m + (1 - beta1) (g - m)                 v <- beta2 v + (1 - beta2) g^2
    w <- w - lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)

Loshchilov and Hutter 2019, algorithm 2, as ``torch.optim.AdamW`` orders the operations.
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

__all__ = ["ADAMW", "AdamW"]

_MOMENTS = (
    Moment(name="exp_avg", signed=True),
    Moment(name="exp_avg_sq", signed=False),
)


class _AdamWRule(Rule):
    name = "AdamW"

    def moments(self, group: Mapping[str, Any]) -> tuple[Moment, ...]:
        return _MOMENTS

    def coefficients(self, group: Mapping[str, Any], step: int, *, is_fresh: bool) -> Coefficients:
        lr = group["lr"]  # as a tensor it rounds what is computed of it, as in torch
        beta1, beta2 = group["betas"]
        return (
            number(1 - lr * group["weight_decay"]) if group["weight_decay"] != 0 else 1.0,
            1 - beta1,
            beta2,
            1 - beta2,
            (1 - beta2**step) ** 0.5,
            group["eps"],
            -number(lr / (1 - beta1**step)),
        )

    def update(
        self,
        weight: Tensor,
        gradient: Tensor,
        moments: Sequence[Tensor],
        coefficients: Coefficients,
    ) -> None:
        decay, share1, beta2, share2, correction, eps, negative_step = coefficients
        mean, square = moments
        if decay != 1.0:
            weight.mul_(decay)
        mean.lerp_(gradient, share1)
        square.mul_(beta2).addcmul_(gradient, gradient, value=share2)
        denominator = square.sqrt().div_(correction).add_(eps)
        weight.addcdiv_(mean, denominator, value=negative_step)

    def require_sound(self, group: Mapping[str, Any]) -> None:
        require_number("lr", group["lr"])
        require_number("eps", group["eps"])
        require_number("weight_decay", group["weight_decay"])
        require_betas(group["betas"], usual=(0.9, 0.999))


ADAMW = _AdamWRule()


class AdamW(NarrowOptimizer):
    """AdamW whose weights and moments live in the stores of your choice.

    `weights` is fp32, split16, split8 or stochastic; `states` is fp32, bf16, int8 or int4; a
    parameter group may name its own. Other than with fp32, fp32 parameters become bf16 in place.
    `generator` gives the seed of all rounding; without it, the seed is torch's initial one.
    """

    rule = ADAMW

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
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
                "eps": eps,
                "weight_decay": weight_decay,
                "maximize": maximize,
            },
            weights=weights,
            states=states,
            generator=generator,
            others=others,
        )
