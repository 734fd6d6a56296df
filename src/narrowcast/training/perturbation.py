"""The smallest change of a training's start that shows: the control by which arms are judged.

A control that changes nothing proves nothing, and a weight chosen blindly may be multiplied by a
pixel that is always 0. So the weight is chosen by its first-order effect on the loss of the first
batch, and where one unit in its last place rounds away, more weights and more units are moved,
until the loss of the first batch has been seen to change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from narrowcast.errors import PrecisionError
from narrowcast.randomness import isolated

__all__ = ["perturb"]

# 64 units of fp32 are 2^-17 of a weight: still less than bf16 and fp16 resolve (2^-8 and 2^-11).
_MOST_UNITS = 64

Loss = Callable[[nn.Module, Any], Tensor]


def perturb(model: nn.Module, compute_loss: Loss, batch: Any, *, seed: int) -> str:
    """Change weights by units in the last place, in place and up the gradient, and say which.

        candidates: the weight with the largest |gradient| x ulp; its whole parameter; all weights;
                    all weights by 2, 4, 8 ... 64 units
        take the first for which the loss of `batch` differs in some bit
        if there is none, the last, provided that some gradient of `batch` differs

    Buffers, gradients and random states are left as they were. Costs one backward pass, and one
    more per candidate tried. Raises PrecisionError if no candidate changes anything.
    """
    weights = {n: p for n, p in model.named_parameters() if p.requires_grad}
    original = {name: weight.detach().clone() for name, weight in weights.items()}
    loss, before = _gradients(model, weights, compute_loss, batch, seed=seed)
    for what, masks, units in _candidates(weights, before):
        _move(weights, masks, before, units)
        moved, after = _gradients(model, weights, compute_loss, batch, seed=seed)
        if not torch.equal(loss, moved):
            return what
        if units == _MOST_UNITS and any(not torch.equal(before[n], after[n]) for n in before):
            return f"{what}, which changes gradients but not the first loss"
        for name, value in original.items():
            weights[name].data.copy_(value)
    raise PrecisionError(
        f"moving every weight by {_MOST_UNITS} units in the last place changes neither the loss "
        "nor a gradient of the first batch",
        hint="the recipe's loss does not depend on its weights; no control run can be made",
    )


_Candidate = tuple[str, dict[str, Tensor], int]


def _candidates(
    weights: dict[str, nn.Parameter], gradients: dict[str, Tensor]
) -> Iterator[_Candidate]:
    """Yield (description, parameter name -> mask of what to move, units), gentlest first."""
    effects = {name: (gradients[name] * _ulp(weights[name])).abs() for name in gradients}
    name = max(effects, key=lambda n: float(effects[n].max()))
    flat = int(effects[name].argmax())
    mask = torch.zeros_like(effects[name], dtype=torch.bool)
    mask.view(-1)[flat] = True
    place = [int(i) for i in torch.unravel_index(torch.tensor(flat), mask.shape)]
    yield f"{name}{place} moved by one unit in the last place", {name: mask}, 1
    everything = {n: torch.ones_like(e, dtype=torch.bool) for n, e in effects.items()}
    whole = {name: everything[name]}
    yield f"every element of {name} moved by one unit in the last place", whole, 1
    yield "every weight moved by one unit in the last place", everything, 1
    units = 2
    while units <= _MOST_UNITS:
        yield f"every weight moved by {units} units in the last place", everything, units
        units *= 2


def _ulp(weight: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.nextafter(weight, torch.full_like(weight, torch.inf)) - weight


def _move(
    weights: dict[str, nn.Parameter],
    masks: dict[str, Tensor],
    gradients: dict[str, Tensor],
    units: int,
) -> None:
    """Move up where the gradient is not negative, else down, so that effects do not cancel."""
    with torch.no_grad():
        for name, mask in masks.items():
            weight = weights[name]
            ulp = torch.where(gradients[name] < 0, -_ulp(-weight), _ulp(weight))
            weight.copy_(torch.where(mask, weight + units * ulp, weight))


def _gradients(
    model: nn.Module,
    weights: dict[str, nn.Parameter],
    compute_loss: Loss,
    batch: Any,
    *,
    seed: int,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss of one batch and its gradients, with the training's first random numbers."""
    with isolated(seed, "training"), _buffers_kept(model):
        loss = compute_loss(model, batch)
        found = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
    return loss.detach(), {
        name: torch.zeros_like(weight) if gradient is None else gradient
        for (name, weight), gradient in zip(weights.items(), found, strict=True)
    }


@contextmanager
def _buffers_kept(model: nn.Module) -> Iterator[None]:
    """Undo what a forward pass does to running statistics."""
    saved = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        for buffer, value in saved:
            buffer.data.copy_(value)
