"""Sparse COO tensors without contents keep their elements, which torch's meta kernels forget.

A gradient of ``nn.Embedding(sparse=True)`` has an element for every index of the batch. Copied by
autograd, coalesced by the engine, added or scaled, it would have none left. How many different
places there are is in the values; what is allocated is not: ``coalesce`` and sums make room for
all elements and narrow (ATen/native/sparse/SparseTensor.cpp, SparseTensorMath.cpp:
``set_nnz_and_narrow``). What is left is taken for as many as there can be.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["sparse_rule"]

_aten = torch.ops.aten


def sparse_rule(func: Any, args: tuple[Any, ...]) -> Callable[..., Tensor] | None:
    """Return a function of the arguments that does what an operation does; None if torch can."""
    rules = _RULES.get(func)
    return None if rules is None else rules.get(tuple(map(_is_sparse, args[:2])))


def _is_sparse(value: Any) -> bool:
    return isinstance(value, Tensor) and value.layout is torch.sparse_coo


def _each_value(func: Any) -> Callable[..., Tensor]:
    """Apply an operation to the values alone; indices are copied."""

    def applied(sparse: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        kwargs.pop("memory_format", None)
        values = func(sparse._values(), *args, **kwargs)
        return _made(sparse, sparse._indices().clone(), values, coalesced=sparse.is_coalesced())

    return applied


def _coalesced(sparse: Tensor) -> Tensor:
    """Make room for every element."""
    indices, values = sparse._indices().clone(), sparse._values().clone()
    return _made(sparse, indices, values, coalesced=True)


def _sum(one: Tensor, other: Tensor, **_: Any) -> Tensor:
    """Make room for the elements of both."""
    count = one._values().shape[0] + other._values().shape[0]
    indices = one._indices().new_empty((one.sparse_dim(), count))
    values = one._values().new_empty((count, *one._values().shape[1:]))
    return _made(one, indices, values, coalesced=one.is_coalesced() and other.is_coalesced())


def _sum_in_place(one: Tensor, other: Tensor, **_: Any) -> Tensor:
    one.data = _sum(one, other)
    return one


def _masked(dense: Tensor, mask: Tensor, *_: Any) -> Tensor:
    """Take from a dense tensor what a sparse one has."""
    values = dense.new_empty(mask._values().shape)
    return _made(mask, mask._indices().clone(), values, coalesced=mask.is_coalesced())


def _added_in_place(dense: Tensor, *_: Any, **__: Any) -> Tensor:
    """Change a dense tensor where it lies; torch's kernel would look for the values."""
    return dense


def _made(like: Tensor, indices: Tensor, values: Tensor, *, coalesced: bool) -> Tensor:
    """Put a tensor together; of a coalesced one no more are left than it has places."""
    places = math.prod(like.shape[: like.sparse_dim()])
    if coalesced and values.shape[0] > places:
        indices, values = indices[:, :places], values[:places]
    made: Tensor = _aten._sparse_coo_tensor_with_dims_and_tensors.default(
        like.sparse_dim(),
        like.dense_dim(),
        like.shape,
        indices,
        values,
        dtype=values.dtype,
        layout=torch.sparse_coo,
        device=like.device,
        is_coalesced=coalesced,
    )
    return made


_ALONE, _WITH_DENSE, _BOTH, _SECOND = (True,), (True, False), (True, True), (False, True)
# By operation, and by which of its first two arguments are sparse.
_RULES: dict[Any, dict[tuple[bool, ...], Callable[..., Tensor]]] = {
    _aten._coalesce.default: {_ALONE: _coalesced},
    _aten.add.Tensor: {_BOTH: _sum},
    _aten.add_.Tensor: {_SECOND: _added_in_place, _BOTH: _sum_in_place},
    _aten.sparse_mask.default: {_SECOND: _masked},
    **{
        func: dict.fromkeys((_ALONE, _WITH_DENSE), _each_value(func))
        for func in (
            _aten.clone.default,
            _aten.mul.Tensor,
            _aten.div.Tensor,
            _aten.neg.default,
            _aten.pow.Tensor_Scalar,
            _aten._to_copy.default,
        )
    },
}
