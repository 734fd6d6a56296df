"""One look at the gradients of a step: whether an element is not finite.

By the operation with which torch unscales: it takes a sixth of the time of norms on small models,
and writes each gradient times a number. Mostly all gradients are dense and of one device and
format, so that it is called once; that is asked for at every step, since parameters thaw and
groups are added.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim import Optimizer

from narrowcast.engine import gradients

__all__ = ["CHECKED", "Flags", "alike"]

CHECKED = (torch.float32, torch.float16, torch.bfloat16)
"""What torch's operation takes on every device; wider numbers are looked at otherwise."""

Kind = tuple[torch.device, torch.dtype]
_STRIDED = torch.strided


def alike(optimizer: Optimizer) -> list[Tensor] | None:
    """List the gradients if one call can look at all of them, else None; [] if there are none."""
    found: list[Tensor] = [
        gradient
        for group in optimizer.param_groups
        for parameter in group["params"]
        if (gradient := parameter.grad) is not None
    ]
    if not found:
        return found
    dtype, device = found[0].dtype, found[0].device
    if dtype not in CHECKED:
        return None
    for gradient in found:
        if (
            gradient.dtype is not dtype
            or gradient.device != device
            or gradient.layout is not _STRIDED
        ):
            return None
    return found


class Flags:
    """Says for each kind of gradient whether an element is not finite: fp32 1, else 0; unread.

    Flags are made once, and go up but not down.
    """

    def __init__(self) -> None:
        self._made: dict[Kind, tuple[Tensor, Tensor]] = {}
        """For each kind its flag, and the 1 that gradients are multiplied by."""

    def are_up_for(self, optimizer: Optimizer) -> bool:
        """Look at an optimizer's gradients, and read one flag for each kind of them."""
        pending = alike(optimizer)
        if pending:
            return bool(self._of(pending).item())
        return any(flag.item() for flag in self.raised(gradients.collect(optimizer)))

    def raised(self, pending: list[Tensor]) -> list[Tensor]:
        """Return a flag for each kind of gradient, up if an element is not finite."""
        kinds: dict[Kind, list[Tensor]] = {}
        for gradient in pending:
            kinds.setdefault((gradient.device, gradient.dtype), []).append(gradient)
        return [self._of(same) for same in kinds.values()]

    def _of(self, same: list[Tensor]) -> Tensor:
        kind = same[0].device, same[0].dtype
        made = self._made.get(kind)
        if made is None:
            if kind[1] not in CHECKED:
                return (~gradients.all_finite(same)).float()
            made = torch.zeros((), device=kind[0]), torch.ones((), device=kind[0])
            self._made[kind] = made
        flag, one = made
        torch._amp_foreach_non_finite_check_and_unscale_(same, flag, one)
        return flag

    def lower(self) -> None:
        """Take the flags down for the next step."""
        for flag, _ in self._made.values():
            flag.zero_()
