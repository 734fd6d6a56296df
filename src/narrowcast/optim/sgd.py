"""SGD, with momentum or without, on any weight store and state store.

    g <- g + weight_decay * w
    b <- momentum * b + (1 - dampening) g         (b <- g in the first step)
    w <- w - lr (b, or g + momentum * b with Nesterov, or g without momentum)

As ``torch.optim.SGD`` has it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from narrowcast.errors import UsageError
from narrowcast.optim.narrow import NarrowOptimizer
from narrowcast.optim.rule import Coefficients, Rule, number, require_number
from narrowcast.optim.states import Moment

__all__ = ["SGD", "SGD_RULE"]

_MOMENTUM = (Moment(name="momentum_buffer", signed=True),)


class _SGDRule(Rule):
    name = "SGD"

    def moments(self, group: Mapping[str, Any]) -> tuple[Moment, ...]:
        return _MOMENTUM if group["momentum"] != 0 else ()

    def coefficients(self, group: Mapping[str, Any], step: int, *, is_fresh: bool) -> Coefficients:
        return (
            group["weight_decay"],
            group["momentum"],
            1 - group["dampening"],
            float(group["nesterov"]),
            float(is_fresh),
            -number(group["lr"]),
        )

    def update(
        self,
        weight: Tensor,
        gradient: Tensor,
        moments: Sequence[Tensor],
        coefficients: Coefficients,
    ) -> None:
        decay, momentum, share, nesterov, is_fresh, negative_lr = coefficients
        if decay != 0:
            gradient = gradient.add(weight, alpha=decay)
        if moments:
            (buffer,) = moments
            if is_fresh:
                buffer.copy_(gradient)
            else:
                buffer.mul_(momentum).add_(gradient, alpha=share)
            gradient = gradient.add(buffer, alpha=momentum) if nesterov else buffer
        weight.add_(gradient, alpha=negative_lr)

    def require_sound(self, group: Mapping[str, Any]) -> None:
        require_number("lr", group["lr"])
        require_number("momentum", group["momentum"])
        require_number("weight_decay", group["weight_decay"])
        require_number("dampening", group["dampening"], low=float("-inf"))
        if group["nesterov"] and (group["momentum"] <= 0 or group["dampening"] != 0):
            raise UsageError(
                f"nesterov with momentum={group['momentum']}, dampening={group['dampening']}",
                hint="Nesterov's momentum needs a momentum above zero and no dampening",
            )


SGD_RULE = _SGDRule()


class SGD(NarrowOptimizer):
    """SGD whose weights and momentum live in the stores of your choice; see `AdamW`."""

    rule = SGD_RULE

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        *,
        nesterov: bool = False,
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
                "momentum": momentum,
                "dampening": dampening,
                "weight_decay": weight_decay,
                "nesterov": nesterov,
                "maximize": maximize,
            },
            weights=weights,
            states=states,
            generator=generator,
            others=others,
        )
