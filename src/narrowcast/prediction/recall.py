"""What an operation returned for tensors of the same sizes, returned again without asking torch.

A step repeats a few hundred different operations thousands of times: layers, tiles and ranges are
alike. What an operation on fake tensors returns follows from the formats, sizes and strides of its
arguments, and torch takes a tenth of a millisecond or more to say so, also where its own cache
knows it. Here it is asked once, and the answer kept as a description: this argument, a view of
that one, or a tensor in a storage of its own.

Nothing is remembered that might be otherwise the next time: operations whose results depend on
values, that give a tensor another storage, size or stride, that are not torch's own; arguments that
are not plain fake tensors; results that share a storage among themselves.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._mode_utils import no_dispatch

__all__ = ["Recall"]

# Of these the result, or what becomes of an argument, is not told by formats and sizes.
_OTHERWISE = {
    torch.Tag.data_dependent_output,
    torch.Tag.dynamic_output_shape,
    torch.Tag.inplace_view,
}
_NUMBERS = {int, float, bool}
_WORDS = {str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format}
_NO_TENSOR = {*_NUMBERS, type(None)}


@dataclass(frozen=True, slots=True)
class _Made:
    """A new tensor, in a storage of its own or, if there is a `place`, in that argument's."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    device: torch.device
    place: int | None


@dataclass(frozen=True, slots=True)
class _Given:
    """The argument at a place among an operation's tensors."""

    place: int


@dataclass(frozen=True, slots=True)
class _Constant:
    value: Any


@dataclass(frozen=True, slots=True)
class _Answer:
    parts: tuple[_Made | _Given | _Constant, ...]
    holder: type[Any] | None
    """List or tuple, for several results."""


_Tensors = dict[int, FakeTensor]
"""The tensors of a call in the order of its arguments, each once, by identity."""

_ANSWERS: dict[tuple[Any, ...], _Answer | None] = {}
"""Of this process: they speak of no tensor and no mode. None: to be asked every time."""

# A prediction adds a thousand or two, of about a kilobyte.
_MOST = 50_000


class Recall:
    """Calls operations on the fake tensors of one mode, each kind of call only once."""

    def __init__(self, mode: FakeTensorMode) -> None:
        self._mode = mode
        # Its own cache would keep the same, at a price for each new kind of call.
        mode.cache_enabled = False

    def call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return what an operation returns."""
        tensors: _Tensors = {}
        key = self._key(func, args, kwargs, tensors) if _is_told_by_sizes(func) else None
        if key is None:
            return func(*args, **kwargs)
        answer = _ANSWERS.get(key)
        if answer is not None:
            return self._again(answer, list(tensors.values()))
        result = func(*args, **kwargs)
        # What has changed an argument (resized it for `out=`) would have to change it again.
        if key not in _ANSWERS and key == self._key(func, args, kwargs, {}):
            if len(_ANSWERS) >= _MOST:
                _ANSWERS.clear()
            _ANSWERS[key] = _answer(result, list(tensors.values()))
        return result

    def _key(
        self,
        func: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        tensors: _Tensors,
    ) -> tuple[Any, ...] | None:
        """Describe all that the result depends on, and note the tensors; None if it is more."""
        parts = [func, torch.get_default_dtype(), torch.is_inference_mode_enabled(), len(args)]
        free = torch.Tag.pointwise in func.tags
        if not self._describe(args, parts, tensors, free=free):
            return None
        if kwargs:
            parts += kwargs
            if not self._describe(kwargs.values(), parts, tensors, free=free):
                return None
        return tuple(parts)

    def _describe(
        self, values: Iterable[Any], parts: list[Any], tensors: _Tensors, *, free: bool
    ) -> bool:
        """Describe arguments; of numbers that are `free`, what kind they are is enough.

        A pointwise operation's result has the size of its tensors broadcast, and its format follows
        from theirs and from the kind of number.
        """
        for value in values:
            kind = type(value)
            if kind is FakeTensor:
                if id(value) in tensors:  # `out=` may be one of the others, or none of them
                    parts += (FakeTensor, list(tensors).index(id(value)))
                    continue
                dtype = value.dtype
                if (
                    value.fake_mode is not self._mode
                    or value.constant is not None
                    or value.layout is not torch.strided
                    or dtype.is_complex
                ):
                    return False
                tensors[id(value)] = value
                offset = value.storage_offset()
                parts += (dtype, value.shape, value.stride(), offset, value.fake_device)
            elif kind in _NUMBERS:
                parts += (kind,) if free else (kind, value)
            elif kind in _WORDS:
                parts.append(value)
            elif kind is list or kind is tuple:
                parts += (kind, len(value))
                if not self._describe(value, parts, tensors, free=free):
                    return False
            else:
                return False
        return True

    def _again(self, answer: _Answer, tensors: list[FakeTensor]) -> Any:
        if answer.holder is None:
            return self._part(answer.parts[0], tensors)
        return answer.holder(self._part(part, tensors) for part in answer.parts)

    def _part(self, part: _Made | _Given | _Constant, tensors: list[FakeTensor]) -> Any:
        if type(part) is _Given:
            return tensors[part.place]
        if type(part) is _Constant:
            return part.value
        assert type(part) is _Made
        with no_dispatch():
            if part.place is None:
                made = torch.empty_strided(part.shape, part.stride, dtype=part.dtype, device="meta")
            else:
                made = torch.empty(0, dtype=part.dtype, device="meta")
                storage = tensors[part.place].untyped_storage()
                made.set_(storage, part.offset, part.shape, part.stride)
        return FakeTensor(self._mode, made, part.device)


@cache
def _is_told_by_sizes(func: Any) -> bool:
    """Whether formats and sizes of the arguments tell what an operation returns and does."""
    return func.namespace == "aten" and not _OTHERWISE.intersection(func.tags)


def _answer(result: Any, tensors: Sequence[FakeTensor]) -> _Answer | None:
    """Describe a result; None if it might be otherwise the next time."""
    several = isinstance(result, (tuple, list))
    values = result if several else (result,)
    storages = Counter(t.untyped_storage()._cdata for t in tensors)
    parts = []
    for value in values:
        part = _described(value, tensors, storages)
        if part is None:
            return None
        parts.append(part)
        if isinstance(part, _Made) and part.place is None:
            storages[value.untyped_storage()._cdata] += 2  # another result in it is not described
    return _Answer(tuple(parts), type(result) if several else None)


def _described(
    value: Any, tensors: Sequence[FakeTensor], storages: Counter[int]
) -> _Made | _Given | _Constant | None:
    if type(value) in _NO_TENSOR:
        return _Constant(value)
    for place, tensor in enumerate(tensors):
        if value is tensor:
            return _Given(place)
    if type(value) is not FakeTensor or value.constant is not None or value.requires_grad:
        return None
    if value.layout is not torch.strided or value.dtype.is_complex:
        return None
    storage = value.untyped_storage()
    sharing = storages[storage._cdata]
    offset = int(value.storage_offset())
    if sharing > 1 or (not sharing and (offset or storage.nbytes() != _extent(value))):
        return None
    places = (i for i, t in enumerate(tensors) if t.untyped_storage()._cdata == storage._cdata)
    return _Made(
        shape=tuple(value.shape),
        stride=value.stride(),
        offset=offset,
        dtype=value.dtype,
        device=value.fake_device,
        place=next(places, None),
    )


def _extent(tensor: Tensor) -> int:
    """Return the bytes of a storage that ends with the tensor's last element."""
    if not tensor.numel():
        return 0
    last = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()
