"""Calls that are cheap to repeat, and saved tensors in the form of a call.

Cheap is what takes a small part of the time of the products around it: norms, activation functions,
products of two tensors element by element, casts, and convolutions with a few products a number
(depthwise ones, and those on the channels of an image). Nothing random is cheap: it would be drawn
again.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from narrowcast.activations.norms import narrow_norm
from narrowcast.activations.saved import Around, Kept, Packed
from narrowcast.policy import Policy
from narrowcast.precision.cast import backward_context
from narrowcast.precision.functions import FunctionsInForce

__all__ = ["Call", "Environment", "Place", "is_cheap", "tensors_of", "without_statistics"]

_SPELLINGS = """
    relu relu_ relu6 hardtanh leaky_relu leaky_relu_ elu selu celu gelu silu mish hardswish
    hardsigmoid softplus logsigmoid sigmoid tanh glu
    layer_norm rms_norm group_norm
    mul multiply square
    to float bfloat16 half"""
_CHEAP = {F.batch_norm, narrow_norm}
_CHEAP |= {
    getattr(owner, name)
    for name in _SPELLINGS.split()
    for owner in (torch, F, Tensor)
    if hasattr(owner, name)
}
_CONVOLUTIONS = {F.conv1d, F.conv2d, F.conv3d}
# Products a number of the result: 3 x 3 of one channel are 9, of three channels 27. A layer of a
# network has hundreds.
_FEW = 32


def tensors_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """List the tensors of a cheap call; none of these operations takes nests of them."""
    return [each for each in (*args, *kwargs.values()) if isinstance(each, Tensor)]


def is_cheap(func: Any, args: Any, kwargs: Mapping[str, Any]) -> bool:
    """Whether a call is worth repeating, so that its result need not be kept."""
    if func not in _CONVOLUTIONS:
        return func in _CHEAP
    weight = args[1] if len(args) > 1 else kwargs.get("weight")
    return isinstance(weight, Tensor) and weight.shape[1:].numel() <= _FEW


def without_statistics(func: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return arguments with which a batch norm in training writes no running statistics again.

    Its result does not depend on them.
    """
    if func is not F.batch_norm:
        return args, kwargs
    named: dict[str, Any] = inspect.signature(func).bind(*args, **kwargs).arguments
    if named.get("training"):
        named |= {"running_mean": None, "running_var": None}
    return (), named


@dataclass(frozen=True)
class Environment:
    """What decides about casts where a call is made."""

    policy: Policy
    device_type: str
    autocast: torch.dtype | None
    functions: FunctionsInForce
    """Those of the modules around; an inner one's have had their say when a call is noted."""

    @classmethod
    def here(cls, policy: Policy, device_type: str, functions: FunctionsInForce) -> Environment:
        enabled = torch.is_autocast_enabled(device_type)
        dtype = torch.get_autocast_dtype(device_type) if enabled else None
        return cls(policy, device_type, dtype, functions)

    @contextmanager
    def again(self) -> Iterator[None]:
        """Enter it from wherever backward runs.

        Casts of weights are not put into autocast's cache: made without gradients, they would lead
        nowhere in a forward pass that found them there.
        """
        kind, enabled = self.device_type, self.autocast is not None
        with ExitStack() as stack:
            if enabled or torch.is_autocast_enabled(kind):
                stack.enter_context(backward_context(self.policy, kind))
                stack.enter_context(
                    torch.autocast(kind, self.autocast, enabled, cache_enabled=False)
                )
            stack.enter_context(self.functions.again())
            yield


@dataclass(frozen=True, slots=True)
class Place:
    """Where the numbers of a tensor lie in its storage."""

    shape: torch.Size
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> Place:
        offset = int(tensor.storage_offset())
        return cls(tensor.shape, tensor.stride(), offset, tensor.dtype)

    def laid_out(self, tensor: Tensor) -> Tensor:
        """Return the numbers of a tensor of this shape as they were, for views to look at."""
        if tensor.stride() == self.stride and tensor.storage_offset() == self.offset:
            return tensor
        return tensor.new_empty_strided(self.shape, self.stride).copy_(tensor)


@dataclass(frozen=True, eq=False)
class Call:
    """How a result was made, and how the part of its memory that is asked for lies."""

    func: Callable[..., Any]
    args: tuple[Any, ...]
    """Calls in the place of results that are made by calls, tensors, and the rest; as in kwargs."""
    kwargs: Mapping[str, Any]
    versions: Mapping[int, int]
    depth: int
    """How many calls stand behind one another."""
    environment: Environment
    made: Place
    place: Place

    @classmethod
    def of(
        cls,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        *,
        sources: Mapping[int, Tensor | Call],
        environment: Environment,
        result: Tensor,
    ) -> Call:
        """Write a call down; `sources` maps ids of its tensors to what is to be held of them."""
        place, parts = Place.of(result), sources.values()
        return cls(
            func=func,
            args=tuple(sources.get(id(each), each) for each in args),
            kwargs={name: sources.get(id(each), each) for name, each in kwargs.items()},
            versions={id(e): e._version for e in parts if isinstance(e, Tensor)},
            depth=1 + max((e.depth for e in parts if isinstance(e, Call)), default=0),
            environment=environment,
            made=place,
            place=place,
        )

    def seen_as(self, place: Place) -> Call:
        """Return the call for another view of the memory that its result is in."""
        return self if place == self.place else replace(self, place=place)

    def held(self, around: Around) -> Repeat | None:
        """Hold what the call needs; None if something was written to since it was made.

        Afresh for each saved tensor: what an outer checkpoint holds can be asked for once.
        """
        held: dict[int, Packed] = {}
        for each in (*self.args, *self.kwargs.values()):
            if isinstance(each, Tensor) and each._version != self.versions[id(each)]:
                return None
            if isinstance(each, (Tensor, Call)) and id(each) not in held:
                part = Kept(each, around) if isinstance(each, Tensor) else each.held(around)
                if part is None:
                    return None
                held[id(each)] = part
        return Repeat(self, held)


class Repeat(Packed):
    """A saved tensor as a call with inputs that are held."""

    def __init__(self, call: Call, held: Mapping[int, Packed]) -> None:
        """`held` maps the ids of the call's tensors and calls to what holds them."""
        self._func, self._environment = call.func, call.environment
        self._made, self._place = call.made, call.place
        self._args = tuple(held.get(id(each), each) for each in call.args)
        self._kwargs = {name: held.get(id(each), each) for name, each in call.kwargs.items()}

    def restore(self) -> Tensor:
        parts = {id(e): e for e in (*self._args, *self._kwargs.values()) if isinstance(e, Packed)}
        tensors = {key: part.restore() for key, part in parts.items()}
        args = [tensors.get(id(each), each) for each in self._args]
        kwargs = {name: tensors.get(id(each), each) for name, each in self._kwargs.items()}
        with self._environment.again():
            result = self._made.laid_out(self._func(*args, **kwargs))
        place = self._place
        if place == self._made:
            return result
        return result.as_strided(place.shape, place.stride, place.offset)
