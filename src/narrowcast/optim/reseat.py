"""An optimizer goes on with other tensors in the place of its parameters: their shards.

Weights are adopted by their stores while they are whole, and cut afterwards; what a store keeps
beside a weight is cut with it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from narrowcast.errors import UsageError
from narrowcast.optim.narrow import NarrowOptimizer
from narrowcast.optim.weights import REMAINDER

__all__ = ["require_elementwise", "reseat"]

_ELEMENTWISE = frozenset(
    ("Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "ASGD", "NAdam", "RAdam", "RMSprop", "Rprop")
) | {"SGD"}
"""Of torch.optim: those in which no element of a parameter's update depends on another."""


def require_elementwise(optimizer: Optimizer) -> None:
    """Raise UsageError for an optimizer that may look at a whole parameter."""
    kind = type(optimizer)
    if isinstance(optimizer, NarrowOptimizer):
        return
    if kind.__module__.startswith("torch.optim.") and kind.__name__ in _ELEMENTWISE:
        return
    raise UsageError(
        f"{kind.__name__} may need whole parameters, such as their norms, and a rank of fsdp2 "
        "holds a part of each",
        hint="use an optimizer of narrowcast, or AdamW, SGD and their like of torch.optim; or "
        "--parallel ddp",
    )


@torch.no_grad()
def reseat(
    optimizer: Optimizer, parts: Mapping[Tensor, Tensor], cut: Callable[[Tensor, Tensor], Tensor]
) -> None:
    """Put each parameter's part in its place; `cut(whole, part)` cuts a tensor of its shape.

    Group dictionaries and their lists stay the same objects, which schedulers hold.
    """
    state: defaultdict[Any, dict[str, Any]] = defaultdict(dict)
    for group in optimizer.param_groups:
        for position, parameter in enumerate(group["params"]):
            part = parts.get(parameter, parameter)
            held = optimizer.state.get(parameter, {})
            if part is not parameter and held.keys() - {REMAINDER}:
                raise UsageError(
                    f"the {type(optimizer).__name__} has taken steps, and its states are whole",
                    hint="shard the model before the first step",
                )
            if held and part is not parameter:
                held = {REMAINDER: cut(held[REMAINDER], part)}
            if held:
                state[part] = held
            group["params"][position] = part
    optimizer.state = state
    if isinstance(optimizer, NarrowOptimizer):
        optimizer._versions = {}
        for group in optimizer.param_groups:
            optimizer._note_versions(group["params"])
