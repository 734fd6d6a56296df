"""The smallest possible change of a training's start: the control against which arms are judged.

A control that changes nothing proves nothing, and a weight chosen blindly may be multiplied by a
pixel that is always 0. So the weight is chosen by its first-order effect on the loss of the first
batch, and the change is kept only once the batch's gradients have been seen to change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from narrowcast.errors import PrecisionError
from narrowcast.training.randomness import isolated

__all__ = ["perturb"]

Loss = Callable[[nn.Module, Any], Tensor]


def perturb(model: nn.Module, compute_loss: Loss, batch: Any, *, seed: int) -> str:
    """Change weights by one unit in the last place, in place, and say which.

        candidates: the weight with the largest |gradient| x ulp; its whole parameter; all weights
        take the first for which some gradient of `batch` differs in some bit

    Buffers, gradients and random states are left as they were. Costs one backward pass, and one
    more per candidate tried. Raises PrecisionError if no candidate changes anything.
    """
    weights = {n: p for n, p in model.named_parameters() if p.requires_grad}
    before = _gradients(model, weights, compute_loss, batch, seed=seed)
    for what, masks in _candidates(weights, before):
        original = {name: weights[name].detach().clone() for name in masks}
        _move_up(weights, masks)
        after = _gradients(model, weights, compute_loss, batch, seed=seed)
        if any(not torch.equal(before[name], after[name]) for name in before):
            return what
        for name, value in original.items():
            weights[name].data.copy_(value)
    raise PrecisionError(
        "moving every weight by one unit in the last place changes no gradient of the first batch",
        hint="the recipe's loss does not depend on its weights; no control run can be made",
    )


_Candidate = tuple[str, dict[str, Tensor]]


def _candidates(
    weights: dict[str, nn.Parameter], gradients: dict[str, Tensor]
) -> Iterator[_Candidate]:
    """Yield (description, parameter name -> mask of the elements to move), gentlest first."""
    effects = {name: (gradients[name] * _ulp(weights[name])).abs() for name in gradients}
    name = max(effects, key=lambda n: float(effects[n].max()))
    flat = int(effects[name].argmax())
    mask = torch.zeros_like(effects[name], dtype=torch.bool)
    mask.view(-1)[flat] = True
    place = [int(i) for i in torch.unravel_index(torch.tensor(flat), mask.shape)]
    yield f"{name}{place} moved by one unit in the last place", {name: mask}
    everything = {n: torch.ones_like(e, dtype=torch.bool) for n, e in effects.items()}
    yield f"every element of {name} moved by one unit in the last place", {name: everything[name]}
    yield "every weight moved by one unit in the last place", everything


def _ulp(weight: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.nextafter(weight, torch.full_like(weight, torch.inf)) - weight


def _move_up(weights: dict[str, nn.Parameter], masks: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, mask in masks.items():
            weight = weights[name]
            weight.copy_(torch.where(mask, weight + _ulp(weight), weight))


def _gradients(
    model: nn.Module,
    weights: dict[str, nn.Parameter],
    compute_loss: Loss,
    batch: Any,
    *,
    seed: int,
) -> dict[str, Tensor]:
    """Differentiate the loss of one batch, always with the same random numbers."""
    with isolated(seed, "perturbation"), _buffers_kept(model):
        loss = compute_loss(model, batch)
        found = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
    return {
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
