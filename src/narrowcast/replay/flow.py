"""Who wrote what an operation reads: tensors are followed by their storages, held weakly.

A view shares its storage, so views need no following. A storage that is written piece by piece has
several writers; which of them left a NaN is decided afterwards, when the values are known.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from narrowcast.memory.storages import storages_of, tensors_in
from narrowcast.ranges.histogram import Counted, count

__all__ = ["OUTSIDE", "Flow", "Known", "numbers_in", "real_parts"]

OUTSIDE = "outside"
"""The source of a tensor that was there before, and that nobody has named."""

_LAYOUTS = (torch.strided, torch.sparse_coo)


class Known:
    """A storage: the operations that its values are of, and what has been counted in it."""

    __slots__ = ("counted", "reference", "source", "writers")

    def __init__(self, source: str) -> None:
        self.source = source
        self.writers: tuple[int, ...] = ()
        self.counted: dict[tuple[Any, ...], Counted] = {}
        """By view, until somebody writes."""
        self.reference: weakref.ref[torch.UntypedStorage] | None = None


class Flow:
    """All storages that a step has touched and that are still alive."""

    def __init__(self) -> None:
        self._known: dict[int, Known] = {}

    def name(self, nest: Any, source: str) -> None:
        """Say what the tensors of a nest are, unless that was said before."""
        for tensor in tensors_in(nest):
            self.of(tensor, source)

    def of(self, tensor: Tensor, source: str = OUTSIDE) -> Known:
        """Return what is known of a tensor's storage; new ones are of this source."""
        storage = next(storages_of(tensor), None)
        if storage is None:
            return Known(source)
        key = storage._cdata
        known = self._known.get(key)
        if known is None:
            known = self._known[key] = Known(source)
            # The address may be another's as soon as the storage is gone.
            known.reference = weakref.ref(storage, partial(_forget, self._known, key))
        return known

    def wrote(self, tensor: Tensor, index: int) -> None:
        """Note that operation `index` left these values."""
        known = self.of(tensor)
        whole = tensor.layout is not torch.strided or (
            tensor.numel() * tensor.itemsize >= tensor.untyped_storage().nbytes()
        )
        # The same operation may return two views of one storage.
        writers = () if whole else tuple(w for w in known.writers if w != index)
        known.writers = (*writers, index)
        known.counted.clear()

    def count(self, tensor: Tensor) -> Counted:
        """Count a tensor's values, once until they change."""
        known = self.of(tensor)
        place: tuple[Any, ...] = (tensor.dtype, tensor.shape)
        if tensor.layout is torch.strided:
            place = (*place, tensor.stride(), tensor.storage_offset())
        found = known.counted.get(place)
        if found is None:
            found = known.counted[place] = count(real_parts(tensor))
        return found


def _forget(known: dict[int, Known], key: int, _: object) -> None:
    known.pop(key, None)


def numbers_in(values: Iterable[Any]) -> Iterator[Tensor]:
    """Yield the floating-point and complex tensors among arguments or results."""
    for value in values:
        if isinstance(value, Tensor):
            if (value.is_floating_point() or value.is_complex()) and value.layout in _LAYOUTS:
                yield value
        elif isinstance(value, (list, tuple)):
            yield from numbers_in(value)


def real_parts(tensor: Tensor) -> Tensor:
    """Return a complex tensor as twice as many real numbers, and a real one as it is."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
