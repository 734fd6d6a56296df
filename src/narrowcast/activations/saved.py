"""What autograd saves while a module runs, in the hands of a lever.

Levers stack. The innermost packs, and what it holds goes on to the hooks that were in force around
it: a ledger sees it, an outer offload moves it, an outer checkpoint drops it.
"""

from __future__ import annotations

import re
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

__all__ = ["Around", "Kept", "Memory", "Packed", "handling_saved", "is_weight"]

# Between a weight and what an operation saves of it: casts of autocast, views, copies.
_CASTS_AND_VIEWS = re.compile(
    "(ToCopy|Clone|Alias|T|Transpose|Permute|View|UnsafeView|ReshapeAlias|AsStrided|Expand|Squeeze|"
    "Unsqueeze|Select|Slice|Split|SplitWithSizes|Unbind)Backward[0-9]"
)


def is_weight(tensor: Tensor) -> bool:
    """Whether a tensor is a leaf that gets gradients, or a cast or a view of one.

    Such as a parameter; it lives as long as its owner does, whatever autograd holds.
    """
    if tensor.is_leaf:
        return tensor.requires_grad
    node: Any = tensor.grad_fn
    while node is not None and _CASTS_AND_VIEWS.fullmatch(node.name()):
        node = node.next_functions[0][0]
    return node is not None and hasattr(node, "variable")


class Packed(ABC):
    """What is held in the place of a saved tensor."""

    @abstractmethod
    def restore(self) -> Tensor:
        """Return the tensor, in the shape, dtype and order of dimensions that it had."""


class Around:
    """The hooks in force around a region when it is entered; what a lever holds goes on to them."""

    def __init__(self) -> None:
        # The only view of the stack of hooks; torch's own tracing of checkpoints reads it so.
        self.hooks: Any = torch._C._autograd._top_saved_tensors_default_hooks(True)

    def hold(self, tensor: Tensor) -> Any:
        """Return what stands for a tensor; without its graph, or an output would keep itself."""
        if self.hooks is not None:
            return self.hooks[0](tensor)
        return tensor.detach() if tensor.requires_grad else tensor

    def get(self, held: Any) -> Tensor:
        tensor: Tensor = held if self.hooks is None else self.hooks[1](held)
        return tensor


class Kept(Packed):
    """The saved tensor itself, which must not have been written to since.

    Autograd checks that for tensors without hooks, and leaves it to the hooks where there are some.
    """

    def __init__(self, tensor: Tensor, around: Around, version: int | None = None) -> None:
        """`version` is what the tensor had when it was saved, if that is a while ago."""
        self._around = around
        self._held = around.hold(tensor)
        self._version = tensor._version if version is None else version

    def restore(self) -> Tensor:
        tensor = self._around.get(self._held)
        if tensor is self._held and tensor._version != self._version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an "
                f"inplace operation: a {tuple(tensor.shape)} tensor of {tensor.dtype} is at "
                f"version {tensor._version}; expected version {self._version} instead"
            )
        return tensor


@contextmanager
def handling_saved(pack: Callable[[Tensor], Packed]) -> Iterator[None]:
    """Hand every tensor that is saved inside to `pack`, without recording what it does."""

    def packed(tensor: Tensor) -> Packed:
        with torch.no_grad():
            return pack(tensor)

    with torch.autograd.graph.saved_tensors_hooks(packed, _restored):
        yield


def _restored(packed: Packed) -> Tensor:
    with torch.no_grad():
        return packed.restore()


class Memory:
    """Finds what was made of the same memory before: several operations save one tensor.

    Entries do not keep what they find alive, and are void once the memory was freed or written to.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[object, ...], tuple[weakref.ref[Any], weakref.ref[Any]]] = {}

    def find(self, tensor: Tensor, kind: object) -> Any | None:
        """Return what `note` was told of this memory, None if nothing that still lives."""
        storage, made = self._known.get(self._key(tensor, kind), (None, None))
        if storage is None or made is None or storage() is not tensor.untyped_storage():
            return None
        return made()

    def note(self, tensor: Tensor, kind: object, made: object) -> None:
        storage = tensor.untyped_storage()
        self._known[self._key(tensor, kind)] = (weakref.ref(storage), weakref.ref(made))

    @staticmethod
    def _key(tensor: Tensor, kind: object) -> tuple[object, ...]:
        return (
            kind,
            tensor.untyped_storage()._cdata,
            tensor.storage_offset(),
            tuple(tensor.shape),
            tensor.stride(),
            tensor.dtype,
            tensor._version,
        )
