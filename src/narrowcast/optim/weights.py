"""What holds a weight: the dtype of the parameter, and the remainder that makes it an fp32 number.

A store is the only place that knows its bytes. The optimizer reads and writes through it, the
prediction asks it, and a checkpoint saves the tensors that it made.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from narrowcast.errors import UnknownName
from narrowcast.plan import OWN, WEIGHTS
from narrowcast.rounding import join8, join16, split8, split16, split_stochastic

__all__ = ["REMAINDER", "WEIGHT_STORES", "WeightStore", "weight_store"]

REMAINDER = "remainder"
"""Key of the remainder in a parameter's state."""

Join = Callable[[Tensor, Tensor], Tensor]
Split = Callable[[Tensor, Tensor, Tensor, Tensor | None], None]


@dataclass(frozen=True, kw_only=True)
class WeightStore:
    """A parameter of `dtype`, and with `remainder` a second tensor of the same shape."""

    name: str
    dtype: torch.dtype
    remainder: torch.dtype | None = None
    rounds: bool = False
    """Whether writing rounds, which takes noise."""
    join: Join | None = None
    split: Split | None = None

    def nbytes(self, numel: int) -> int:
        """Return the bytes of weight and remainder."""
        return numel * (self.dtype.itemsize + (self.remainder.itemsize if self.remainder else 0))

    def zeros(self, parameter: Tensor) -> dict[str, Tensor]:
        """Return the remainder of a weight that needs none, laid out as the parameter is."""
        if self.remainder is None:
            return {}
        return {REMAINDER: torch.zeros_like(parameter, dtype=self.remainder, requires_grad=False)}

    def read(self, weight: Tensor, remainder: Tensor | None) -> Tensor:
        """Return the number held as fp32: `weight` itself where it is fp32, else a new tensor."""
        if self.join is None or remainder is None:
            return weight.to(torch.float32)
        return self.join(weight, remainder)

    def write(
        self, x: Tensor, weight: Tensor, remainder: Tensor | None, noise: Tensor | None
    ) -> None:
        """Hold fp32 `x`. Without `noise`, a store that rounds rounds to nearest."""
        if self.dtype is torch.float32:
            if x is not weight:  # `read` gave the weight itself, and it was changed in place
                weight.copy_(x)
        elif self.split is None or remainder is None:
            split_stochastic(x, weight, noise)
        else:
            self.split(x, weight, remainder, noise)


WEIGHT_STORES = {
    store.name: store
    for store in (
        WeightStore(name="fp32", dtype=torch.float32),
        WeightStore(
            name="split16",
            dtype=torch.bfloat16,
            remainder=torch.int16,
            join=join16,
            split=split16,
        ),
        WeightStore(
            name="split8",
            dtype=torch.bfloat16,
            remainder=torch.int8,
            rounds=True,
            join=join8,
            split=split8,
        ),
        WeightStore(name="stochastic", dtype=torch.bfloat16, rounds=True),
    )
}


def weight_store(name: str) -> WeightStore:
    """Return the store of this name. Raises UnknownName with the nearest match."""
    if name not in WEIGHT_STORES:
        raise UnknownName.of("weight store", str(name), [n for n in WEIGHTS if n != OWN])
    return WEIGHT_STORES[name]
