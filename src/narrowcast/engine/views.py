"""What this process sees of the gradients when a step is closed: all of them, or its shards.

Of shards each rank has some elements of every gradient, and what is asked of all elements, their
norm or whether they are finite, is asked of all ranks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.optim import Optimizer

from narrowcast.engine import gradients
from narrowcast.errors import UsageError
from narrowcast.optim.parts import part_of
from narrowcast.parallel.shards import Shards, require_one_order
from narrowcast.scaling.skips import nonfinite_parameters

__all__ = ["InParts", "View", "Whole"]

_NAMED = 8
"""Parameters of a skipped step that are named at most."""


class Whole:
    """Every gradient is here, whole."""

    def take(self, optimizer: Optimizer) -> None:
        """Take over, after a backward pass, what is to be summed otherwise than in ``.grad``."""

    def meet(self, optimizer: Optimizer) -> None:
        """Add up what backward did not; nothing."""

    def discard(self) -> None:
        """Forget what was taken over."""

    def norm(self, optimizer: Optimizer, norms: tuple[Tensor, ...]) -> float:
        """Return the norm over all gradients from the norm of each; reads the device."""
        return gradients.read_total(norms)

    def clip(
        self, pending: list[Tensor], norms: tuple[Tensor, ...], norm: float, limit: float
    ) -> None:
        """Scale gradients in place so that their norm, which is `norm`, is at most `limit`."""
        gradients.clip(pending, norms, limit)

    def nonfinite(self, optimizer: Optimizer, names: Mapping[int, str]) -> tuple[str, ...]:
        """Name the parameters whose gradients are not finite, nearest the loss first."""
        return nonfinite_parameters(optimizer, names, at_most=_NAMED)


class InParts:
    """Each rank has some rows of every gradient, and the whole of those that cannot be cut."""

    def __init__(self, shards: Shards) -> None:
        self._shards = shards
        self._ranks = shards.ranks
        self._reduce = shards.reduce
        self._sums: dict[Tensor, Tensor] = {}
        """Gradients of parameters that are not cut, over micro-batches."""

    def take(self, optimizer: Optimizer) -> None:
        """Sum the gradients of parameters that are not cut in the reduction format."""
        for parameter in _parameters(optimizer):
            if part_of(parameter) is None and parameter.grad is not None:
                gradient = parameter.grad.to(self._reduce, copy=True)
                known = self._sums.get(parameter)
                self._sums[parameter] = gradient if known is None else known.add_(gradient)
                parameter.grad = None

    def meet(self, optimizer: Optimizer) -> None:
        """Add up the gradients of parameters that are not cut, in the reduction format."""
        uncut = [p for p in _parameters(optimizer) if part_of(p) is None]
        if not uncut:
            return
        self.take(optimizer)
        anywhere = self._ranks.any_of_each([p in self._sums for p in uncut])
        taking_part = [p for p, is_there in zip(uncut, anywhere, strict=True) if is_there]
        for parameter in taking_part:
            if parameter not in self._sums:
                self._sums[parameter] = torch.zeros_like(parameter, dtype=self._reduce)
        self._ranks.add_up([self._sums[parameter] for parameter in taking_part])
        for parameter in taking_part:
            parameter.grad = self._sums[parameter].to(parameter.dtype)
        self._sums.clear()

    def discard(self) -> None:
        """Forget the sums over micro-batches."""
        self._sums.clear()
        self._shards.discard()

    def norm(self, optimizer: Optimizer, norms: tuple[Tensor, ...]) -> float:
        """Return the norm over all gradients of all ranks, the same on each.

        Raises UsageError if a parameter has a gradient on some of them only, or blocks ran in
        different orders: what was added up then belongs to different parameters.
        """
        parameters = _parameters(optimizer)
        present = [p.grad is not None for p in parameters]
        uncut = [part_of(p) is None for p in parameters if p.grad is not None]
        squares = [x * x for x in torch.stack(norms).double().tolist()]
        shares = [s / self._ranks.size if w else s for s, w in zip(squares, uncut, strict=True)]
        pattern = float(hash(tuple(present)) & (2**52 - 1))
        found = self._ranks.each([sum(shares), pattern, self._shards.order])
        if len({pattern for _, pattern, _ in found}) > 1:
            raise UsageError(
                "a parameter has a gradient on some ranks and none on others, and fsdp2 adds up "
                "what all of them have",
                hint="let every parameter take part in every loss, or use --parallel ddp",
            )
        require_one_order(order for _, _, order in found)
        return math.sqrt(sum(square for square, _, _ in found))

    def clip(
        self, pending: list[Tensor], norms: tuple[Tensor, ...], norm: float, limit: float
    ) -> None:
        """Scale this rank's part of the gradients by what the norm of all of them asks for."""
        torch._foreach_mul_(pending, min(1.0, limit / (norm + gradients.CLIP_EPSILON)))

    def nonfinite(self, optimizer: Optimizer, names: Mapping[int, str]) -> tuple[str, ...]:
        """Name the parameters whose gradients are not finite on any rank."""
        parameters = _parameters(optimizer)
        broken = self._ranks.any_of_each(
            [p.grad is not None and not bool(torch.isfinite(p.grad).all()) for p in parameters]
        )
        found = [names[id(p)] for p, is_it in zip(parameters, broken, strict=True) if is_it]
        return tuple(reversed(found))[:_NAMED]


View = Whole | InParts


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
