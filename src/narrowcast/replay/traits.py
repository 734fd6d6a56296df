"""What has to be known of an ATen operation before its call can be judged, from its schema.

Views and moves make no numbers; operations in place overwrite what they read; random ones cannot
be done twice; a Python number in an element-wise operation is meant as an element.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

__all__ = ["Traits", "traits_of"]


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Their output shares the input's storage (though the schema does not say so), or has no values yet.
_WITHOUT_VALUES = _names(
    """_unsafe_view _reshape_alias lift lift_fresh detach alias empty empty_like empty_strided
    new_empty new_empty_strided resize_ set_ _local_scalar_dense"""
)
# They take shape and dtype of their first argument, and not its values.
_LIKE = _names(
    "zeros_like ones_like full_like rand_like randn_like new_zeros new_ones new_full fill_ zero_"
)
_CASTS = _names("_to_copy copy_ copy")
_SUMS_OF_TWO = {"add": 1.0, "add_": 1.0, "sub": -1.0, "sub_": -1.0}
# They make elements of a number, and torch does not call them element-wise.
_FILLS = _names(
    """full full_like new_full fill fill_ scalar_tensor constant_pad_nd index_fill index_fill_
    masked_fill masked_fill_ where"""
)
# Factors, exponents and options of element-wise operations: kernels hold them in fp32 or better,
# and what comes of them shows in the result.
_NO_ELEMENTS = _names("alpha beta exponent approximate eps rounding_mode p")


@dataclass(frozen=True, slots=True)
class Traits:
    """One overload of one operation."""

    name: str
    """As it prints: ``aten.add.Tensor``."""
    stem: str
    """Without namespace and overload: ``add``."""
    is_seen: bool
    """Whether it can compute or store new values."""
    reads_first: bool
    """Whether the values of its first argument matter, and not its shape and dtype alone."""
    writes: frozenset[int]
    """Positions of the arguments that it writes into."""
    writes_named: frozenset[str]
    """Names of the keyword arguments that it writes into."""
    is_random: bool
    """Whether it draws random numbers; attention does so with dropout alone (`dropout`)."""
    dropout: int
    """Position of an attention's ``dropout_p``; -1 for other operations."""
    is_cast: bool
    addend_sign: float
    """Of ``add`` and ``sub``: the sign of the second addend; 0 for other operations."""
    elements: frozenset[int | str]
    """Positions and names of arguments of which Python numbers are meant as elements."""

    @property
    def is_in_place(self) -> bool:
        return bool(self.writes or self.writes_named)


@lru_cache(maxsize=4096)
def traits_of(func: Any) -> Traits | None:
    """Return what is known of an operation; None for one of higher order, which has no schema."""
    schema = getattr(func, "_schema", None)
    if schema is None:
        return None
    namespace, _, stem = schema.name.partition("::")
    arguments = schema.arguments
    written = [
        (None if a.kwarg_only else place, a.name)
        for place, a in enumerate(arguments)
        if a.alias_info is not None and a.alias_info.is_write
    ]
    takes_elements = torch.Tag.pointwise in func.tags or stem in _FILLS
    elements = [
        (place, a.name)
        for place, a in enumerate(arguments)
        if takes_elements and a.name not in _NO_ELEMENTS
    ]
    return Traits(
        name=str(func),
        stem=stem,
        is_seen=not (func.is_view or stem in _WITHOUT_VALUES or namespace in ("profiler", "prim")),
        reads_first=stem not in _LIKE,
        writes=frozenset(place for place, _ in written if place is not None),
        writes_named=frozenset(name for place, name in written if place is None),
        is_random=torch.Tag.nondeterministic_seeded in func.tags,
        dropout=next((i for i, a in enumerate(arguments) if a.name == "dropout_p"), -1),
        is_cast=stem in _CASTS,
        addend_sign=_SUMS_OF_TWO.get(stem, 0.0),
        elements=frozenset(each for pair in elements for each in pair),
    )
