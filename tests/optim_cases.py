"""What the tests of the optimizers share: parameters of awkward sizes, and gradients for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from narrowcast.optim.adamw import AdamW
from narrowcast.optim.lion import Lion
from narrowcast.optim.narrow import NarrowOptimizer
from narrowcast.optim.sgd import SGD
from narrowcast.optim.states import SMALL
from narrowcast.optim.step import CHUNK

# Round every boundary: nothing, one, the block of codes, what counts as small, a range of a step.
SHAPES: tuple[tuple[int, ...], ...] = (
    (0,),
    (),
    (1,),
    (31, 3),
    (SMALL - 1,),
    (SMALL,),
    (SMALL + 1,),
    (65, 64),
    (CHUNK - 1,),
    (CHUNK,),
    (CHUNK + 1,),
    (300, 257),
)
# For tests on all rules and stores: one of each kind, and one that takes a second range.
FEW: tuple[tuple[int, ...], ...] = ((0,), (31, 3), (SMALL - 1,), (SMALL + 1,), (CHUNK + 33,))

Make = Callable[..., NarrowOptimizer]
RULES: dict[str, tuple[Make, dict[str, Any]]] = {
    "AdamW": (AdamW, {"lr": 1e-2, "weight_decay": 0.1}),
    "SGD": (SGD, {"lr": 1e-2, "momentum": 0.9, "weight_decay": 0.1}),
    "Lion": (Lion, {"lr": 1e-3, "weight_decay": 0.1}),
}


def parameters(shapes: Sequence[tuple[int, ...]] = SHAPES, seed: int = 0) -> list[nn.Parameter]:
    """Make fp32 parameters."""
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def give_gradients(owned: Sequence[Tensor], step: int) -> None:
    """Set gradients that bf16 can hold, the same for the same step and shapes."""
    generator = torch.Generator().manual_seed(step)
    for parameter in owned:
        gradient = torch.randn(parameter.shape, generator=generator).to(torch.bfloat16)
        parameter.grad = gradient.to(parameter.dtype).to(parameter.device)


def train(optimizer: torch.optim.Optimizer, owned: Sequence[Tensor], steps: range) -> None:
    """Step with the gradients of these steps."""
    for step in steps:
        give_gradients(owned, step)
        optimizer.step()


def held(optimizer: NarrowOptimizer) -> list[Tensor]:
    """List everything that a step may change, in a fixed order."""
    found: list[Tensor] = []
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            found.append(parameter.detach().clone())
            state = optimizer.state.get(parameter, {})
            found += [state[k].clone() for k in sorted(state) if isinstance(state[k], Tensor)]
    return found


def same_bits(left: Sequence[Tensor], right: Sequence[Tensor]) -> bool:
    """Whether two lists of tensors are equal bit for bit."""
    return len(left) == len(right) and all(
        a.dtype is b.dtype and torch.equal(a, b) for a, b in zip(left, right, strict=True)
    )
