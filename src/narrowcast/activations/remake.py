"""Remaking: results that are cheap to have again are not kept, but made again from what is kept.

    conv -> norm -> relu -> conv     the norm keeps its input x, the last convolution its input r
         x       n       r           with the lever x is kept, and r is relu(norm(x)), a call

Between two products a network normalises, activates and casts. Each of these operations takes a
fraction of a product's time, and its result is as large as its input, which is kept anyway. So
while a module runs, calls of such operations are noted, and where autograd would save a result, it
is given the call. In backward the call is repeated with the same inputs, kernels and casts, for the
same bits, each time that the result is needed.

A result is remade only if its inputs cost nothing: they are saved for another operation anyway, are
remade themselves, are weights, small, or the caller's (the batch). Which calls are cheap, ``calls``
knows.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode  # the only way to know what is called

from narrowcast.activations.calls import (
    Call,
    Environment,
    Place,
    is_cheap,
    tensors_of,
    without_statistics,
)
from narrowcast.activations.compression import LEAST_NUMEL
from narrowcast.activations.entries import entry_casts, tensors_in
from narrowcast.activations.forward import Forward
from narrowcast.activations.saved import Around, Kept, Memory, Packed, handling_saved, is_weight
from narrowcast.policy import Policy
from narrowcast.precision.functions import functions_in_force

__all__ = ["Remake"]

# Bookkeeping asks tensors much, and levers around would see each question as a call.
_unseen = torch._C.DisableTorchFunction
# What would lead back over more calls is kept: all of them are repeated for each use.
_DEEPEST = 8


@dataclass(frozen=True)
class Remake:
    """Lever: of what the module saves, results of cheap calls are made again."""

    policy: Policy
    name: str = "remake"
    computes: bool = False

    def run(self, module: nn.Module, inner: Forward, args: Any, kwargs: dict[str, Any]) -> Any:
        if torch.compiler.is_compiling():  # a compiler makes cheap results again as it sees fit
            return inner(*args, **kwargs)
        region = _Region(self.policy, module, tensors_in((args, kwargs)))
        try:
            with handling_saved(region.pack), _Calls(region):
                return inner(*args, **kwargs)
        finally:
            region.forget()


class _Calls(TorchFunctionMode):
    """Hands cheap calls to the region."""

    def __init__(self, region: _Region) -> None:
        super().__init__()
        self._region = region

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.is_grad_enabled() and is_cheap(func, args, kwargs):
            return self._region.call(func, args, kwargs)
        return func(*args, **kwargs)


class _Region:
    """One run of a module: what is kept, and what can be made from it."""

    def __init__(self, policy: Policy, module: nn.Module, given: Sequence[Tensor]) -> None:
        self._policy = policy
        self._functions = functions_in_force()
        self._around = Around()
        self._kept = Memory()
        self._results = _Results()
        self._waiting: list[_Saved] | None = None
        self._given = {id(tensor) for tensor in given if not tensor.requires_grad}
        for source, cast in entry_casts(module, given):
            self._note(cast, Tensor.to, (source, cast.dtype), {}, {id(source): source})

    def pack(self, tensor: Tensor) -> Packed:
        """Return what stands for a saved tensor; while a cheap call runs, it is decided after."""
        with _unseen():
            if _is_free(tensor):
                return Kept(tensor, self._around)
            saved = _Saved(tensor)
            if self._waiting is None:
                self._settle([saved])
            else:
                self._waiting.append(saved)
            return saved

    def call(self, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
        """Make a cheap call, and note how to repeat it if its inputs cost nothing."""
        inputs = tensors_of(args, kwargs)
        with _unseen():
            if not all(map(_is_plain, inputs)):
                inputs = []
            # Before the call: one in place leaves its input's memory with another content.
            calls = {id(each): self._results.find(each) for each in inputs}
            versions = {id(each): each._version for each in inputs}
        if not inputs:
            return func(*args, **kwargs)
        waiting: list[_Saved] = []
        self._waiting = waiting
        try:
            result = func(*args, **kwargs)
            self._waiting = None
            with _unseen(), torch.no_grad():
                # Inputs first: that they are saved is why the result need not be.
                own = [saved for saved in waiting if saved.lies_in(result)]
                self._settle(saved for saved in waiting if saved not in own)
                if _is_new(result, inputs, versions):
                    args, kwargs = without_statistics(func, args, kwargs)
                    sources = {
                        id(each): calls[id(each)] or self._free(each, versions[id(each)])
                        for each in tensors_of(args, kwargs)
                    }
                    self._note(result, func, args, kwargs, sources)
                self._settle(own)
            return result
        finally:
            # After an error too, with which an outer checkpoint ends what it computes again.
            self._waiting = None
            for saved in waiting:
                saved.tensor = None

    def forget(self) -> None:
        """Let go of all results: autograd holds the hook that packs as long as the graph lives."""
        self._results = _Results()

    def _free(self, tensor: Tensor, version: int) -> Tensor | None:
        """Return a tensor that is there in backward anyway, as it was before the call."""
        if tensor._version != version:
            return None
        anyway = _is_free(tensor) or id(tensor) in self._given or is_weight(tensor)
        return tensor if anyway or self._kept.find(tensor, "kept") is not None else None

    def _note(
        self,
        result: Tensor,
        func: Callable[..., Any],
        args: Any,
        kwargs: dict[str, Any],
        sources: Mapping[int, Tensor | Call | None],
    ) -> None:
        """Note a result as its call, if all that it is made from is there."""
        there = {key: source for key, source in sources.items() if source is not None}
        if len(there) == len(sources) > 0:
            environment = Environment.here(self._policy, result.device.type, self._functions)
            call = Call.of(
                func, args, kwargs, sources=there, environment=environment, result=result
            )
            if call.depth <= _DEEPEST:
                self._results.note(result, call)

    def _settle(self, waiting: Iterable[_Saved]) -> None:
        for saved in waiting:
            tensor, version = saved.tensor, saved.version
            assert tensor is not None, "what is saved is settled once"
            call = self._results.find(tensor) if tensor._version == version else None
            repeat = None if call is None else call.held(self._around)
            saved.held = repeat or self._keep(tensor, version)
            saved.tensor = None

    def _keep(self, tensor: Tensor, version: int) -> Kept:
        kept = Kept(tensor, self._around, version)
        if _is_plain(tensor):
            self._kept.note(tensor, "kept", kept)
        return kept


class _Saved(Packed):
    """A saved tensor, and later what is held in its place."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor: Tensor | None = tensor
        """Until it is held: with its graph, in which an output would keep itself."""
        self.version = tensor._version
        self.held: Packed | None = None

    def lies_in(self, result: Any) -> bool:
        """Whether this is what a call returned, or a part of it."""
        if not isinstance(self.tensor, Tensor) or not isinstance(result, Tensor):
            return False
        plain = _is_plain(self.tensor) and _is_plain(result)
        return plain and _storage(self.tensor) == _storage(result)

    def restore(self) -> Tensor:
        assert self.held is not None, "its operation raised, so that there is no graph"
        return self.held.restore()


class _Results:
    """Calls by the memory that their results are in, while it lives and nobody writes to it."""

    def __init__(self) -> None:
        self._calls: dict[int, tuple[weakref.ref[Any], int, Call]] = {}

    def note(self, result: Tensor, call: Call) -> None:
        key, weak_self = _storage(result), weakref.ref(self)

        def forget(reference: weakref.ref[Any]) -> None:
            results = weak_self()  # not held by what it holds: tensors would wait for the collector
            if results is not None and results._calls.get(key, (None,))[0] is reference:
                del results._calls[key]

        self._calls[key] = weakref.ref(result.untyped_storage(), forget), result._version, call

    def find(self, tensor: Tensor) -> Call | None:
        """Return the call that makes this tensor, or of whose result it is a view."""
        if not _is_plain(tensor):
            return None
        storage, version, call = self._calls.get(_storage(tensor), (None, None, None))
        if storage is None or call is None or storage() is not tensor.untyped_storage():
            return None
        if version != tensor._version or call.made.dtype is not tensor.dtype:
            return None
        return call.seen_as(Place.of(tensor))


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _is_free(tensor: Tensor) -> bool:
    """Whether holding a tensor takes nothing worth speaking of: small ones, and parameters."""
    return tensor.numel() < LEAST_NUMEL or (tensor.is_leaf and tensor.requires_grad)


def _is_plain(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided and not hasattr(tensor, "__tensor_flatten__")


def _is_new(result: Any, inputs: Sequence[Tensor], versions: Mapping[int, int]) -> bool:
    """Whether a call returned a large tensor, whole, and not an input as it was."""
    if not isinstance(result, Tensor) or not _is_plain(result) or result.numel() < LEAST_NUMEL:
        return False
    whole = result.untyped_storage().nbytes() == result.numel() * result.element_size()
    return whole and all(
        each.device == result.device
        and (_storage(each) != _storage(result) or each._version != versions[id(each)])
        for each in inputs
    )
