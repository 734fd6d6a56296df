"""Logits that are not computed, as a value, and what shape operations and casts make of them.

Logits of shape (..., V) are a function of hidden states (..., D): whatever moves, cuts or joins the
other dimensions of the logits may be done to the hidden states instead, which are smaller. A rule
gives the form after an operation, or None where the logits themselves are needed.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Form", "rule_for"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Form:
    """Logits as hidden states (leading dimensions, D) and a head, with V at `class_dim`."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    compute: torch.dtype
    """Format of the product, that which F.linear would have used at the head."""
    dtype: torch.dtype
    class_dim: int
    is_log: bool = False
    """Whether a log-softmax over the classes has been asked for."""

    @property
    def classes(self) -> int:
        return self.weight.shape[0]

    @property
    def leading(self) -> tuple[int, ...]:
        return tuple(self.hidden.shape[:-1])

    @property
    def shape(self) -> tuple[int, ...]:
        leading = self.leading
        return (*leading[: self.class_dim], self.classes, *leading[self.class_dim :])

    @property
    def is_last(self) -> bool:
        """Whether the classes are the last dimension, as they come from a head."""
        return self.class_dim == len(self.leading)

    def moved(self, hidden: Tensor) -> Form:
        """Return the form with other leading dimensions, classes last."""
        return replace(self, hidden=hidden, class_dim=hidden.dim() - 1)

    def dim(self, dim: int) -> int:
        return dim % (len(self.leading) + 1)

    def compute_logits(self) -> Tensor:
        """Return what these logits would be, rounded as they would have been."""
        hidden, weight = self.hidden.to(self.compute), self.weight.to(self.compute)
        bias = None if self.bias is None else self.bias.to(self.compute)
        with torch.autocast(self.hidden.device.type, enabled=False):
            logits = F.linear(hidden, weight, bias).to(self.dtype)
        if self.is_log:
            logits = torch.log_softmax(logits, -1)
        return logits.movedim(-1, self.class_dim)


Forms = Form | tuple[Form, ...] | None


def _reshape(form: Form, *sizes: Any, shape: Any = None, size: Any = None) -> Forms:
    given = sizes or shape or size or ()
    if len(given) == 1 and isinstance(given[0], Sequence):
        (given,) = given
    wanted = list(given)
    if not form.is_last or not wanted or not all(isinstance(n, int) for n in wanted):
        return None
    if wanted.count(-1) == 1:
        others = math.prod(n for n in wanted if n != -1)
        if others == 0:
            return None
        wanted[wanted.index(-1)] = math.prod(form.shape) // others
    fits = wanted[-1] == form.classes and math.prod(wanted) == math.prod(form.shape)
    return form.moved(form.hidden.reshape(*wanted[:-1], form.hidden.shape[-1])) if fits else None


def _flatten(form: Form, start_dim: int = 0, end_dim: int = -1) -> Forms:
    start, end = form.dim(start_dim), form.dim(end_dim)
    if not form.is_last or end == form.class_dim:
        return form if start == end else None
    return form.moved(form.hidden.flatten(start, end))


def _unflatten(form: Form, dim: int, sizes: Sequence[int]) -> Forms:
    if not form.is_last or form.dim(dim) == form.class_dim:
        return None
    return form.moved(torch.unflatten(form.hidden, form.dim(dim), sizes))


def _squeeze(form: Form, dim: int | tuple[int, ...] | None = None) -> Forms:
    if not form.is_last or form.classes == 1:
        return None
    chosen = range(form.class_dim) if dim is None else (dim,) if isinstance(dim, int) else dim
    dims = {form.dim(d) for d in chosen} - {form.class_dim}
    return form.moved(form.hidden.squeeze(tuple(dims)))


def _unsqueeze(form: Form, dim: int) -> Forms:
    place = dim % (len(form.leading) + 2)
    if not form.is_last or place > form.class_dim:
        return None
    return form.moved(form.hidden.unsqueeze(place))


def _getitem(form: Form, index: Any) -> Forms:
    """Take an index on the leading dimensions: it means the same on the hidden states."""
    parts = index if isinstance(index, tuple) else (index,)
    if not form.is_last or not all(isinstance(part, _INDICES) for part in parts):
        return None
    if not any(part is Ellipsis for part in parts):
        parts = (*parts, Ellipsis)
    place = next(i for i, part in enumerate(parts) if part is Ellipsis)
    rest = len(form.shape) - sum(_dims_taken(part) for part in parts)
    parts = (*parts[:place], *(slice(None),) * rest, *parts[place + 1 :])
    takes_all = isinstance(parts[-1], slice) and parts[-1].indices(form.classes)
    if takes_all != (0, form.classes, 1) or any(part is Ellipsis for part in parts):
        return None
    return form.moved(form.hidden[(*parts[:-1], slice(None))])


_INDICES = (int, slice, type(None), type(Ellipsis), Tensor)


def _dims_taken(part: Any) -> int:
    """Count the dimensions that one part of an index refers to."""
    if part is None or part is Ellipsis or isinstance(part, bool):
        return 0
    return part.dim() if isinstance(part, Tensor) and part.dtype == torch.bool else 1


def _narrow(form: Form, dim: int, start: Any, length: int) -> Forms:
    return _along(form, dim, lambda hidden, at: hidden.narrow(at, start, length))


def _select(form: Form, dim: int, index: int) -> Forms:
    return _along(form, dim, lambda hidden, at: hidden.select(at, index))


def _index_select(form: Form, dim: int, index: Tensor) -> Forms:
    return _along(form, dim, lambda hidden, at: hidden.index_select(at, index))


def _split(form: Form, split_size: Any, dim: int = 0) -> Forms:
    return _along(form, dim, lambda hidden, at: torch.split(hidden, split_size, at))


def _chunk(form: Form, chunks: int, dim: int = 0) -> Forms:
    return _along(form, dim, lambda hidden, at: hidden.chunk(chunks, at))


def _unbind(form: Form, dim: int = 0) -> Forms:
    return _along(form, dim, lambda hidden, at: hidden.unbind(at))


def _along(form: Form, dim: int, do: Callable[[Tensor, int], Any]) -> Forms:
    """Do what works along one dimension to the hidden states, unless it is that of the classes."""
    if not form.is_last or form.dim(dim) == form.class_dim:
        return None
    made = do(form.hidden, form.dim(dim))
    return form.moved(made) if isinstance(made, Tensor) else tuple(form.moved(m) for m in made)


def _transpose(form: Form, dim0: int, dim1: int) -> Forms:
    order = list(range(len(form.shape)))
    a, b = form.dim(dim0), form.dim(dim1)
    order[a], order[b] = order[b], order[a]
    return _permuted(form, order)


def _permute(form: Form, *order: Any, dims: Any = None) -> Forms:
    given = order or dims or ()
    if len(given) == 1 and isinstance(given[0], Sequence):
        (given,) = given
    return _permuted(form, [form.dim(d) for d in given])


def _movedim(form: Form, source: Any, destination: Any) -> Forms:
    if not (isinstance(source, int) and isinstance(destination, int)):
        return None
    order = list(range(len(form.shape)))
    order.insert(form.dim(destination), order.pop(form.dim(source)))
    return _permuted(form, order)


def _permuted(form: Form, order: list[int]) -> Forms:
    if sorted(order) != list(range(len(form.shape))):
        return None  # torch says what is wrong with it
    leading = [d - (d > form.class_dim) for d in order if d != form.class_dim]
    hidden = form.hidden.permute(*leading, form.hidden.dim() - 1)
    return replace(form, hidden=hidden, class_dim=order.index(form.class_dim))


def _copied(form: Form, *, memory_format: Any = None) -> Forms:
    """Return the same numbers as a tensor of their own, as far as the operation copies."""
    return replace(form) if memory_format in (None, torch.contiguous_format) else None


def _detach(form: Form) -> Forms:
    bias = None if form.bias is None else form.bias.detach()
    return replace(form, hidden=form.hidden.detach(), weight=form.weight.detach(), bias=bias)


def _to(form: Form, *args: Any, **kwargs: Any) -> Forms:
    if set(kwargs) - {"dtype", "device", "non_blocking"}:
        return None
    device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)  # nn.Module.to reads its so
    if device is not None and device != form.hidden.device:
        return None
    return _cast(form, dtype or form.dtype)


def _cast(form: Form, dtype: torch.dtype) -> Forms:
    """Take a cast that loses nothing, to fp32; the loss is computed in fp32 in any case."""
    if dtype == form.dtype:
        return form
    widens = form.dtype.itemsize == 2 and dtype == torch.float32
    return replace(form, dtype=dtype) if widens and not form.is_log else None


def _log_softmax(
    form: Form, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None
) -> Forms:
    if dim is None or form.dim(dim) != form.class_dim or form.is_log:
        return None
    # Autocast decides the format, on some devices; an empty tensor shows what it decides here.
    probe = torch.empty(0, 1, dtype=form.dtype, device=form.hidden.device)
    made = torch.log_softmax(probe, -1, dtype=dtype).dtype
    return replace(form, is_log=True, dtype=made) if made in (form.dtype, torch.float32) else None


_CASTS = {
    "float": torch.float32,
    "double": torch.float64,
    "half": torch.float16,
    "bfloat16": torch.bfloat16,
}
_BY_NAME: dict[str, Callable[..., Forms]] = {
    "view": _reshape,
    "reshape": _reshape,
    "flatten": _flatten,
    "unflatten": _unflatten,
    "squeeze": _squeeze,
    "unsqueeze": _unsqueeze,
    "__getitem__": _getitem,
    "narrow": _narrow,
    "select": _select,
    "index_select": _index_select,
    "split": _split,
    "chunk": _chunk,
    "unbind": _unbind,
    "transpose": _transpose,
    "swapaxes": _transpose,
    "permute": _permute,
    "movedim": _movedim,
    "contiguous": _copied,
    "clone": _copied,
    "detach": _detach,
    "to": _to,
    "log_softmax": _log_softmax,
    **{name: lambda form, to=dtype: _cast(form, to) for name, dtype in _CASTS.items()},
}
_RULES = {
    getattr(space, name): rule
    for name, rule in _BY_NAME.items()
    for space in (torch, Tensor, F)
    if hasattr(space, name) and callable(getattr(space, name))
}
_SIGNATURES = {rule: inspect.signature(rule) for rule in _BY_NAME.values()}


def rule_for(func: Callable[..., Any], args: Any, kwargs: Any) -> Callable[[Form], Forms] | None:
    """Return what a torch function with these further arguments does to a form, if there is a rule.

    None for a function without a rule, and for arguments of a kind that its rule does not know.
    """
    rule = _RULES.get(func)
    if rule is None:
        return None
    try:
        _SIGNATURES[rule].bind(None, *args, **kwargs)
    except TypeError:
        return None
    return lambda form: rule(form, *args, **kwargs)
