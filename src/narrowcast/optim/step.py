"""One step on tensors of any store, in ranges, so that temporaries stay small whatever the model.

The reference for all faster ways. A large tensor is updated range by range; tensors of fewer than
`SMALL` elements with equal numbers are laid end to end and updated together, since each operation
costs microseconds however small it is. Where nothing has to be converted or laid together, the
operations work on the tensors themselves.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from narrowcast.optim.layout import Layout, flat_range, scatter
from narrowcast.optim.parts import part_of
from narrowcast.optim.rule import Coefficients, Rule
from narrowcast.optim.states import SMALL, Moment, Plain, StateStore
from narrowcast.optim.weights import REMAINDER, WeightStore
from narrowcast.rounding import NOISE_TILE, noise16, stream_key, tensor_key

__all__ = ["CHUNK", "Item", "Numbers", "chunk_for", "update"]

CHUNK = 2 * NOISE_TILE
"""Elements of the longest range: 512 KiB a temporary in fp32, of which a step has half a dozen.

Half as long costs a sixth more time on a CPU: an operation has a price of its own.
"""
_SHORTEST = 8192


def chunk_for(numel: int) -> int:
    """Return the elements of a range for parameters of so many elements together.

    A step's temporaries are then no larger than the parameters are in fp32, but for the shortest
    ranges. Results are the same bits in ranges of any length.
    """
    wanted = numel // 16 // SMALL * SMALL  # half a dozen temporaries, more where strides are odd
    return max(_SHORTEST, min(CHUNK, wanted))


@dataclass(frozen=True, slots=True)
class Numbers:
    """What tensors must have in common to be updated together."""

    weights: WeightStore
    states: StateStore
    moments: tuple[Moment, ...]
    coefficients: Coefficients
    maximize: bool
    seed: int
    step: int
    chunk: int = CHUNK
    """Elements of a range on a CPU; see `chunk_for`."""

    def next(self, rule: Rule, group: Mapping[str, Any]) -> Numbers:
        """Return the numbers of the step after this one."""
        step = self.step + 1
        coefficients = rule.coefficients(group, step, is_fresh=False)
        return replace(
            self,
            coefficients=coefficients,
            maximize=group["maximize"],
            seed=group["seed"],
            step=step,
        )


@dataclass(slots=True)
class Item:
    """One parameter that steps: its tensors, and the numbers of its step."""

    parameter: Tensor
    gradient: Tensor
    state: dict[str, Any]
    group: dict[str, Any]
    numbers: Numbers
    layout: Layout
    ordinal: int
    """Position among all parameters of the optimizer, which makes its noise its own."""


@dataclass(slots=True)
class _Part:
    """Elements `start` to `stop` of an item, as flat tensors in a fixed order.

    The order is weight, gradient, remainder if there is one, then the parts of each moment.
    """

    item: Item
    start: int
    stop: int
    tensors: list[Tensor]
    is_gathered: bool
    """Whether the weight is a copy that has to be written back."""


def update(rule: Rule, items: Sequence[Item]) -> None:
    """Take one step of `rule` with every item, in place."""
    small: dict[tuple[int, torch.dtype, torch.device], list[Item]] = {}
    for item in items:
        numel = item.parameter.numel()
        # Codes of several tensors laid together would share blocks.
        if 0 < numel < SMALL and isinstance(item.numbers.states, Plain):
            key = id(item.numbers), item.gradient.dtype, item.parameter.device
            small.setdefault(key, []).append(item)
        else:
            chunk = item.numbers.chunk
            for start in range(0, numel, chunk):
                _advance(rule, [_part(item, start, min(start + chunk, numel))])
    for alike in small.values():
        for batch in _batches(alike):
            _advance(rule, [_part(item, 0, item.parameter.numel()) for item in batch])


def _batches(items: list[Item]) -> Iterator[list[Item]]:
    """Yield the items, of equal numbers, in groups of at most a range's elements."""
    batch: list[Item] = []
    elements = 0
    for item in items:
        numel = item.parameter.numel()
        if elements + numel > item.numbers.chunk:
            yield batch
            batch, elements = [], 0
        batch.append(item)
        elements += numel
    yield batch


def _part(item: Item, start: int, stop: int) -> _Part:
    numbers, state = item.numbers, item.state
    weight, is_view = flat_range(item.parameter, item.layout, start, stop)
    gradient, _ = flat_range(item.gradient, item.layout, start, stop)
    tensors = [weight, gradient]
    if numbers.weights.remainder is not None:
        tensors.append(flat_range(state[REMAINDER], item.layout, start, stop)[0])
    for moment in numbers.moments:
        tensors.extend(numbers.states.ranges(state, moment, start, stop))
    return _Part(item, start, stop, tensors, not is_view)


def _advance(rule: Rule, parts: list[_Part]) -> None:
    """Update parts with equal numbers together; several parts are copied together and back."""
    numbers = parts[0].item.numbers
    if len(parts) == 1:
        _compute(rule, numbers, parts, parts[0].tensors)
    else:
        columns = list(zip(*(part.tensors for part in parts), strict=True))
        joined = [torch.cat(column) for column in columns]
        _compute(rule, numbers, parts, joined)
        sizes = [part.stop - part.start for part in parts]
        for index, (column, whole) in enumerate(zip(columns, joined, strict=True)):
            if index != 1:  # the gradient is only read
                torch._foreach_copy_(list(column), list(torch.split(whole, sizes)))
    for part in parts:
        if part.is_gathered:
            scatter(part.item.parameter, part.item.layout, part.start, part.tensors[0])


def _compute(rule: Rule, numbers: Numbers, parts: list[_Part], tensors: list[Tensor]) -> None:
    """Read all stores, apply the rule, write all stores."""
    weight, gradient = tensors[0], tensors[1].to(torch.float32)
    if numbers.maximize:
        gradient = -gradient
    rest = tensors[2:]
    remainder = rest.pop(0) if numbers.weights.remainder is not None else None
    width = len(rest) // len(numbers.moments) if numbers.moments else 0
    held = [tuple(rest[i * width : (i + 1) * width]) for i in range(len(numbers.moments))]
    count = weight.numel()
    master = numbers.weights.read(weight, remainder)
    values = [
        numbers.states.read(views, moment, count)
        for views, moment in zip(held, numbers.moments, strict=True)
    ]
    rule.update(master, gradient, values, numbers.coefficients)
    del gradient
    noise = _noise(parts, 0) if numbers.weights.rounds else None
    numbers.weights.write(master, weight, remainder, noise)
    del master
    for stream, (views, moment) in enumerate(zip(held, numbers.moments, strict=True), start=1):
        noise = _noise(parts, stream) if numbers.states.rounds else None
        numbers.states.write(values.pop(0), views, moment, noise)


def _noise(parts: list[_Part], stream: int) -> Tensor:
    """Return the noise of these elements; the same in whatever parts they come."""
    found = []
    for part in parts:
        numbers = part.item.numbers
        key = stream_key(tensor_key(numbers.seed, numbers.step, part.item.ordinal), stream)
        piece = part_of(part.item.parameter)
        start = part.start if piece is None else piece.start + part.start
        count = part.stop - part.start
        found.append(noise16(key, start, count, part.item.parameter.device))
    return found[0] if len(found) == 1 else torch.cat(found)
