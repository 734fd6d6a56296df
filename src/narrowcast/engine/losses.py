"""What backward starts from: a loss that can be used, and the gradient that holds its scale."""

from __future__ import annotations

import torch
from torch import Tensor

from narrowcast.errors import UsageError

__all__ = ["Seeds", "unusable_loss"]


class Seeds:
    """The gradients of losses with respect to themselves, one for each factor, dtype and device.

    Starting backward from one is the same as multiplying the loss, without a product to overflow.
    In fp16 65,536 is infinite, as in torch's GradScaler: the scale then moves down once.
    """

    __slots__ = ("_known",)

    def __init__(self) -> None:
        self._known: dict[tuple[float, torch.dtype, torch.device], Tensor] = {}

    def of(self, factor: float, loss: Tensor) -> Tensor:
        """Return the seed of the loss's shape, dtype and device."""
        key = (factor, loss.dtype, loss.device)
        seed = self._known.get(key)
        if seed is None:
            if not loss.is_floating_point():
                raise unusable_loss(loss)
            wide = torch.full((), factor, dtype=torch.float64, device=loss.device)
            seed = self._known[key] = wide.to(loss.dtype)
        return seed if loss.dim() == 0 else seed.expand(loss.shape)


def unusable_loss(loss: object) -> UsageError:
    """Say why backward cannot start from this."""
    if not isinstance(loss, Tensor):
        return UsageError(
            f"the loss is a {type(loss).__name__}", hint="pass the tensor, not .item()"
        )
    if loss.numel() != 1 or loss.is_complex():
        return UsageError(
            f"the loss is {loss.dtype} of shape {tuple(loss.shape)}, not one real number",
            hint="reduce it first, as with loss.mean()",
        )
    return UsageError(
        "the loss does not depend on anything that requires a gradient",
        hint="was the forward pass run under torch.no_grad() or engine.evaluating(), or the loss "
        "detached?",
    )
