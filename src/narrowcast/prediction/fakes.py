"""What torch and our optimizers do otherwise, or needlessly, with tensors that have no contents.

The contexts change module-level functions for as long as they are open, for fake tensors only.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from narrowcast.loss import passes
from narrowcast.loss.tiles import blocks
from narrowcast.optim import dispatch, narrow, step
from narrowcast.optim.layout import is_dense
from narrowcast.optim.masters import write_master
from narrowcast.optim.states import SMALL

__all__ = ["modules_of_fakes", "replaced", "unlogged", "work_that_differs"]


@contextmanager
def unlogged() -> Iterator[None]:
    """Keep torch from logging, with its own traceback, what an operation raises on fake tensors.

    The exception itself arrives, and becomes one error with the user's line.
    """
    log = logging.getLogger(FakeTensor.__module__)
    thread = threading.get_ident()

    def passes_through(_: logging.LogRecord) -> bool:
        return threading.get_ident() != thread

    log.addFilter(passes_through)
    try:
        yield
    finally:
        log.removeFilter(passes_through)


@contextmanager
def modules_of_fakes() -> Iterator[None]:
    """Let modules of fake parameters be moved, cast and deep-copied as real ones are.

    ``Module._apply`` swaps fake tensors, which an optimizer's reference forbids: here it sets
    ``data``. What torch makes of a deep copy has two storages, its own and its views', and all
    addresses are 0. And ``torch.tensor(1.0)`` keeps its number beside it, of which views are made
    ever after, whatever format a parameter has by then: no parameter keeps one.
    """
    original: Callable[..., nn.Module] = nn.Module._apply

    def apply(module: nn.Module, convert: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:  # noqa: FBT001, FBT002
        own = [p for p in module._parameters.values() if p is not None]
        if not all(isinstance(p, FakeTensor) for p in own):
            return original(module, convert, recurse)
        if recurse:
            for child in module.children():
                child._apply(convert)  # type: ignore[no-untyped-call]
        with torch.no_grad():
            for parameter in own:
                _convert(parameter, convert)
            for key, buffer in module._buffers.items():
                module._buffers[key] = buffer if buffer is None else convert(buffer)
        return module

    register: Callable[..., None] = nn.Module.register_parameter

    def register_without_number(module: nn.Module, name: str, param: Tensor | None) -> None:
        if isinstance(param, FakeTensor):
            param.constant = None
        register(module, name, param)

    with (
        replaced(nn.Module, _apply=apply, register_parameter=register_without_number),
        replaced(FakeTensor, __deepcopy__=_deep_copy, data_ptr=_address),
    ):
        yield


@contextmanager
def replaced(owner: Any, **functions: Callable[..., Any]) -> Iterator[None]:
    """Put functions in the place of an owner's own ones, or beside inherited ones."""
    own = {name: vars(owner)[name] for name in functions if name in vars(owner)}
    for name, function in functions.items():
        setattr(owner, name, function)
    try:
        yield
    finally:
        for name in functions:
            if name in own:
                setattr(owner, name, own[name])
            else:
                delattr(owner, name)


def _address(tensor: FakeTensor) -> int:
    """Return what tells two tensors in different places apart, as an address does."""
    offset = tensor.storage_offset() * tensor.element_size()
    return int(tensor.untyped_storage()._cdata + offset)


def _convert(parameter: nn.Parameter, convert: Callable[[Tensor], Tensor]) -> None:
    converted = convert(parameter)
    if converted is not parameter:
        parameter.data = converted
    if parameter.grad is not None:
        parameter.grad = convert(parameter.grad)


def _deep_copy(tensor: FakeTensor, memo: dict[int, Any]) -> Tensor:
    if id(tensor) not in memo:
        copied = tensor.detach().clone().requires_grad_(tensor.requires_grad)
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(copied, tensor.requires_grad) if is_parameter else copied
    found: Tensor = memo[id(tensor)]
    return found


@contextmanager
def work_that_differs() -> Iterator[None]:
    """Let optimizers and chunked losses do, of what makes and frees the same, only the first.

    A narrow optimizer goes through its tensors range by range (``optim.step``), a chunked loss
    through its logits tile by tile (``loss.passes``), with nothing alive between two of them. GPT-2
    has two thousand ranges, and an operation on fake tensors takes as long on few elements as on
    many. Weights that have no contents need not be written when the optimizer is made.
    """
    update, part, advance = step.update, step._part, step._advance
    seen: set[tuple[Hashable, Hashable]] = set()
    last: Hashable = None

    def write(store: Any, value: Tensor, weight: Tensor, remainder: Tensor | None) -> None:
        if not isinstance(weight, FakeTensor):
            write_master(store, value, weight, remainder)

    def update_once(rule: Any, items: Sequence[step.Item]) -> None:
        nonlocal last
        seen.clear()
        last = None
        update(rule, items)

    def make(item: step.Item, start: int, stop: int) -> Any:
        nonlocal last
        if isinstance(item.parameter, FakeTensor) and item.parameter.numel() >= SMALL:
            kind = _kind_of_range(item, start, stop)
            # An allocator may serve the first of a kind after another kind from other memory.
            pair, last = (last, kind), kind
            if pair in seen:
                return None
            seen.add(pair)
        return part(item, start, stop)

    def go(rule: Any, parts: list[Any]) -> None:
        if parts[0] is not None:
            advance(rule, parts)

    with (
        replaced(step, update=update_once, _part=make, _advance=go),
        replaced(dispatch, update=update_once),
        replaced(narrow, write_master=write),
        replaced(passes, blocks=_few_of_blocks()),
    ):
        yield


def _kind_of_range(item: step.Item, start: int, stop: int) -> Hashable:
    """Tell what an update of a range allocates: with holes, more the larger the tensor is."""
    layout, length = item.layout, stop - start
    tensors = (item.parameter, item.gradient)
    holes = [None if is_dense(t, layout) else (start, t.shape, t.stride()) for t in tensors]
    return item.numbers, item.gradient.dtype, length, bool(layout), *holes


def _few_of_blocks() -> Callable[[int, int], Iterator[slice]]:
    """Return ``blocks`` without those that are like the second; on other threads, all of them.

    The second is not like the first: it begins while names still stand for what the first made.
    """
    thread = threading.get_ident()

    def few(count: int, size: int) -> Iterator[slice]:
        for block in blocks(count, size):
            is_alike = block.start > size and block.stop < count
            if not is_alike or threading.get_ident() != thread:
                yield block

    return few
