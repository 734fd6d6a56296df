"""What holds a moment of an optimizer: fp32, bf16 or block-wise codes, as tensors of its state.

A moment is signed (an average of gradients) or unsigned (an average of squares), which block-wise
stores treat differently. A store speaks of ranges of the flat tensor, in the order of its storage,
so that a step needs fp32 copies of one range at a time.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from narrowcast.blockwise import (
    INT4_SIGNED,
    INT4_UNSIGNED,
    INT8_SIGNED,
    INT8_UNSIGNED,
    BlockCode,
)
from narrowcast.errors import UnknownName
from narrowcast.plan import OWN, STATES
from narrowcast.rounding import split_stochastic

__all__ = [
    "FP32",
    "SMALL",
    "STATE_STORES",
    "Blocks",
    "Moment",
    "Plain",
    "StateStore",
    "fitted",
    "state_store",
]

SMALL = 4096
"""Tensors of fewer elements keep fp32 states: norms and biases are few and easily disturbed.

The same bound as in bitsandbytes and torchao, so that comparisons compare codes.
"""


@dataclass(frozen=True, kw_only=True)
class Moment:
    """A state of an update rule: the key that torch gives it, and whether it has a sign."""

    name: str
    signed: bool


class StateStore(ABC):
    """Where a moment lives. Parts are the tensors that `zeros` made, by key."""

    name: str

    @property
    @abstractmethod
    def rounds(self) -> bool:
        """Whether writing rounds, which takes noise."""

    @abstractmethod
    def part_keys(self, moment: Moment) -> tuple[str, ...]:
        """Return the keys of the parts."""

    @abstractmethod
    def nbytes(self, numel: int, moment: Moment) -> int:
        """Return the bytes of all parts."""

    @abstractmethod
    def zeros(self, parameter: Tensor, moment: Moment) -> dict[str, Tensor]:
        """Return the parts of a moment of zeros."""

    @abstractmethod
    def fits(self, state: Mapping[str, Any], moment: Moment, numel: int) -> bool:
        """Whether a state holds the moment as `zeros` makes it, or not at all in any store."""

    @abstractmethod
    def ranges(
        self, parts: Mapping[str, Tensor], moment: Moment, start: int, stop: int
    ) -> tuple[Tensor, ...]:
        """Return flat views of the parts that hold elements `start` to `stop`.

        `start` is a multiple of the block (any multiple of 64 is).
        """

    @abstractmethod
    def read(self, views: tuple[Tensor, ...], moment: Moment, count: int) -> Tensor:
        """Return the `count` elements of a range as fp32: the view itself where it is fp32."""

    @abstractmethod
    def write(
        self, x: Tensor, views: tuple[Tensor, ...], moment: Moment, noise: Tensor | None
    ) -> None:
        """Hold fp32 `x` in a range; stochastic with `noise`, to nearest without."""


def _block_keys(moment: Moment) -> tuple[str, str]:
    return f"{moment.name}_codes", f"{moment.name}_scales"


@dataclass(frozen=True, kw_only=True)
class Plain(StateStore):
    """One tensor of `dtype`, laid out as the parameter is."""

    name: str
    dtype: torch.dtype

    @property
    def rounds(self) -> bool:
        return self.dtype is not torch.float32

    def part_keys(self, moment: Moment) -> tuple[str, ...]:
        return (moment.name,)

    def nbytes(self, numel: int, moment: Moment) -> int:
        return numel * self.dtype.itemsize

    def zeros(self, parameter: Tensor, moment: Moment) -> dict[str, Tensor]:
        return {moment.name: torch.zeros_like(parameter, dtype=self.dtype, requires_grad=False)}

    def fits(self, state: Mapping[str, Any], moment: Moment, numel: int) -> bool:
        part = state.get(moment.name)
        if part is None:
            return not any(key in state for key in _block_keys(moment))
        return part.dtype is self.dtype and part.numel() == numel

    def ranges(
        self, parts: Mapping[str, Tensor], moment: Moment, start: int, stop: int
    ) -> tuple[Tensor, ...]:
        part = parts[moment.name]
        # Its storage has no holes (zeros_like makes none), so it is one flat run of elements.
        return (part.as_strided((stop - start,), (1,), part.storage_offset() + start),)

    def read(self, views: tuple[Tensor, ...], moment: Moment, count: int) -> Tensor:
        return views[0].to(torch.float32)

    def write(
        self, x: Tensor, views: tuple[Tensor, ...], moment: Moment, noise: Tensor | None
    ) -> None:
        view = views[0]
        if self.dtype is torch.bfloat16:
            split_stochastic(x, view, noise)
        elif x is not view:  # `read` gave the view itself, and it was changed in place
            view.copy_(x)


@dataclass(frozen=True, kw_only=True)
class Blocks(StateStore):
    """Codes and scales, flat, in the order of the parameter's storage."""

    name: str
    signed: BlockCode
    unsigned: BlockCode

    @property
    def rounds(self) -> bool:
        return True

    def code(self, moment: Moment) -> BlockCode:
        """Return the code for this moment."""
        return self.signed if moment.signed else self.unsigned

    def part_keys(self, moment: Moment) -> tuple[str, ...]:
        return _block_keys(moment)

    def nbytes(self, numel: int, moment: Moment) -> int:
        return self.code(moment).nbytes(numel)

    def zeros(self, parameter: Tensor, moment: Moment) -> dict[str, Tensor]:
        parts = self.code(moment).zeros(parameter.numel(), parameter.device)
        return dict(zip(self.part_keys(moment), parts, strict=True))

    def fits(self, state: Mapping[str, Any], moment: Moment, numel: int) -> bool:
        codes, scales = (state.get(key) for key in self.part_keys(moment))
        if codes is None or scales is None:
            return codes is scales and moment.name not in state
        code = self.code(moment)
        return (codes.numel(), scales.numel()) == (code.code_bytes(numel), code.blocks(numel))

    def ranges(
        self, parts: Mapping[str, Tensor], moment: Moment, start: int, stop: int
    ) -> tuple[Tensor, ...]:
        code = self.code(moment)
        codes, scales = (parts[key] for key in self.part_keys(moment))
        return (
            codes[code.code_bytes(start) : code.code_bytes(stop)],
            scales[code.blocks(start) : code.blocks(stop)],
        )

    def read(self, views: tuple[Tensor, ...], moment: Moment, count: int) -> Tensor:
        codes, scales = views
        return self.code(moment).decode(codes, scales, count)

    def write(
        self, x: Tensor, views: tuple[Tensor, ...], moment: Moment, noise: Tensor | None
    ) -> None:
        codes, scales = views
        self.code(moment).encode(x, codes, scales, noise)


FP32 = Plain(name="fp32", dtype=torch.float32)

STATE_STORES: dict[str, StateStore] = {
    store.name: store
    for store in (
        FP32,
        Plain(name="bf16", dtype=torch.bfloat16),
        Blocks(name="int8", signed=INT8_SIGNED, unsigned=INT8_UNSIGNED),
        Blocks(name="int4", signed=INT4_SIGNED, unsigned=INT4_UNSIGNED),
    )
}


def state_store(name: str) -> StateStore:
    """Return the store of this name. Raises UnknownName with the nearest match."""
    if name not in STATE_STORES:
        raise UnknownName.of("state store", str(name), [n for n in STATES if n != OWN])
    return STATE_STORES[name]


def fitted(store: StateStore, numel: int) -> StateStore:
    """Return the store that a tensor of `numel` elements gets where `store` is asked for."""
    return store if numel >= SMALL else FP32
