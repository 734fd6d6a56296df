"""The book of live storages: who they are, how many bytes, when they came and when they went.

A tensor is a view; memory belongs to its storage. Several tensors share one, so bytes are counted
once per storage, from the moment it is first seen until a weak reference says that it is gone.

Nothing is classified while the step runs. The book keeps a log of (holding, change in bytes), and
a holding's role may be learned late: that a forward output was saved for backward, or that a
product of backward became a ``.grad``, is known only afterwards. Reading the log with the final
roles (``attribution``) is what makes the categories at the peak true.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from functools import partial
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

__all__ = ["Holding", "Role", "StorageBook", "storages_of", "tensors_in"]


class Role:
    """The categories of ``records.memory`` by name; RANK says which claim wins over which."""

    UNATTRIBUTED: Final = "unattributed"
    TEMPORARY: Final = "temporaries"
    ACTIVATION: Final = "activations"
    CAST: Final = "autocast_casts"
    INPUT: Final = "inputs"
    GRADIENT: Final = "gradients"
    OPTIMIZER: Final = "optimizer_state"
    MASTER: Final = "master_weights"
    BUFFER: Final = "buffers"
    PARAMETER: Final = "parameters"


# What a storage *is* beats what happens to it: a parameter that is saved for backward stays a
# parameter. A storage that was there before the ledger looked is not made an activation by being
# saved, since it would be held anyway.
_RANK = {
    Role.TEMPORARY: 0,
    Role.ACTIVATION: 1,
    Role.UNATTRIBUTED: 2,
    Role.CAST: 3,
    Role.INPUT: 4,
    Role.GRADIENT: 5,
    Role.OPTIMIZER: 6,
    Role.MASTER: 7,
    Role.BUFFER: 8,
    Role.PARAMETER: 9,
}


# Bookkeeping such as a loss scale is not worth a word.
_SCALAR_BYTES = 8

_SPARSE_PARTS: dict[torch.layout, tuple[Callable[[Tensor], Tensor], ...]] = {
    torch.sparse_coo: (Tensor._indices, Tensor._values),
    torch.sparse_csr: (Tensor.crow_indices, Tensor.col_indices, Tensor.values),
    torch.sparse_csc: (Tensor.ccol_indices, Tensor.row_indices, Tensor.values),
}


class Holding:
    """One storage: its size now, its role as far as known, the module that it belongs to."""

    __slots__ = ("bytes", "key", "module", "parts", "reference", "role", "run")

    def __init__(self, key: int, size: int, role: str, module: str, run: int = 0) -> None:
        self.key = key
        self.bytes = size
        self.role = role
        self.module = module
        self.run = run
        """During which node of autograd's graph it was made, by a count of the nodes that ran."""
        self.parts: list[tuple[int, int]] | None = None
        """Where only this much of the storage counts: first byte, and the one after the last."""
        self.reference: weakref.ref[torch.UntypedStorage] | None = None

    def counted(self, storage: torch.UntypedStorage) -> int:
        """Return how many bytes of the storage count."""
        return storage.nbytes() if self.parts is None else _covered(self.parts)

    def claim(self, role: str, module: str | None = None) -> None:
        """Take a role, and a module with it, unless a stronger one is already known."""
        if _RANK[role] > _RANK[self.role]:
            self.role = role
            if module is not None:
                self.module = module


class _Foreign(NamedTuple):
    """A storage that was read and that nobody had announced."""

    reference: weakref.ref[torch.UntypedStorage]
    bytes: int
    module: str


def storages_of(tensor: Tensor) -> Iterator[torch.UntypedStorage]:
    """Yield the storages under a tensor: those of its parts for sparse and wrapper tensors.

    A tensor of an opaque layout (oneDNN's) shows none.
    """
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is not None:
        for name in flatten()[0]:
            part = getattr(tensor, name)
            if isinstance(part, Tensor):  # a DTensor lists its mesh as well
                yield from storages_of(part)
    elif tensor.layout is torch.strided:
        yield tensor.untyped_storage()
    else:
        for part in _SPARSE_PARTS.get(tensor.layout, ()):
            yield part(tensor).untyped_storage()


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in a nest of sequences, mappings and dataclass instances."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple, set)):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            yield from tensors_in(getattr(value, field.name))


def _span(tensor: Tensor) -> tuple[int, int]:
    """Return the first byte of its storage that a tensor covers, and the one after the last."""
    first = int(tensor.storage_offset())
    reach = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    last = first + reach + 1 if tensor.numel() else first
    return first * tensor.itemsize, last * tensor.itemsize


def _covered(spans: list[tuple[int, int]]) -> int:
    """Count the bytes in a union of spans."""
    total, reached = 0, 0
    for first, end in sorted(spans):
        total += max(0, end - max(first, reached))
        reached = max(reached, end)
    return total


class StorageBook:
    """All live storages on one device, and the log of their comings, goings and changes of size."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.total = 0
        self.log: list[tuple[Holding, int]] = []
        self.only_read: tuple[tuple[int, str], ...] = ()
        """After closing: size, and module of the first use, of what was read and never counted."""
        self.run = 0
        """What holdings made from now on say of themselves (``Holding.run``)."""
        self._expected: tuple[Holding, Holding, Callable[[int], None]] | None = None
        self._live: dict[int, Holding] = {}
        self._read: dict[int, _Foreign] = {}
        self._open = True

    def find(self, tensor: Tensor) -> Holding | None:
        """Return the holding of a tensor's (first) storage, None if unknown or elsewhere."""
        if tensor.device != self.device:
            return None
        first = next(storages_of(tensor), None)
        return None if first is None else self._live.get(first._cdata)

    def read(self, tensor: Tensor, module: str) -> None:
        """Note what an operation reads: an unknown storage was there before the ledger looked.

        It is remembered and not counted: it may be the whole data set, of which a batch is taken.
        """
        if tensor.device == self.device:
            for storage in storages_of(tensor):
                if storage._cdata in self._live:
                    self._see_storage(storage, Role.TEMPORARY, module)  # may have been resized
                elif self._foreign(storage) is None:
                    reference = weakref.ref(storage)
                    self._read[storage._cdata] = _Foreign(reference, storage.nbytes(), module)

    def made(self, tensor: Tensor, module: str) -> None:
        """Note what an operation returns: a new storage, or a view of a known or an old one."""
        if tensor.device == self.device:
            for storage in storages_of(tensor):
                foreign = self._foreign(storage) is not None
                role = Role.UNATTRIBUTED if foreign else Role.TEMPORARY
                self._see_storage(storage, role, module)

    def claim(self, tensor: Tensor, role: str, module: str | None = None) -> None:
        """Give the storages of a tensor a role that is known for certain, entering them if new."""
        if tensor.device != self.device:
            return
        for storage in storages_of(tensor):
            self._see_storage(storage, role, module or "").claim(role, module)

    def claim_part(self, tensor: Tensor, role: str, module: str) -> None:
        """Do as `claim`, but count of a storage not seen before no more than the tensor covers.

        What further tensors cover of the same storage is counted with it, once.
        """
        is_one = tensor.layout is torch.strided and not hasattr(tensor, "__tensor_flatten__")
        if tensor.device == self.device and is_one:
            storage = tensor.untyped_storage()
            holding = self._live.get(storage._cdata)
            if holding is None:
                holding = self._enter(storage, role, module)
                holding.parts = []
            if holding.parts is not None:
                holding.parts.append(_span(tensor))
                if _covered(holding.parts) == storage.nbytes():
                    holding.parts = None
        self.claim(tensor, role, module)

    def forget_parts(self) -> None:
        """Count nothing of the storages that count in part, until something is claimed of them."""
        for holding in self._live.values():
            if holding.parts:
                holding.parts = []
                self._change(holding, 0)

    def close(self) -> None:
        """Stop following; what dies later is no longer noted."""
        self._open = False
        self.only_read = tuple(
            (found.bytes, found.module)
            for key, found in self._read.items()
            if key not in self._live and found.bytes > _SCALAR_BYTES
        )
        self._read.clear()
        for holding in self._live.values():
            holding.reference = None
        self._live.clear()

    def resized(self, storage: torch.UntypedStorage, module: str) -> None:
        """Note the new size of a storage that was resized in place.

        One that nobody knows and that has bytes now is new memory, however old the tensor: FSDP2
        empties what it gathered and fills it again.
        """
        if not self._open:
            return
        holding = self._live.get(storage._cdata)
        if holding is not None:
            self._change(holding, holding.counted(storage))
        elif storage.nbytes() and storage.device.type in (self.device.type, "meta"):
            self._read.pop(storage._cdata, None)
            self._see_storage(storage, Role.TEMPORARY, module)

    def expect(self, old: Holding, new: Holding, amend: Callable[[int], None]) -> None:
        """Take `new`, made by the last operation, for `old`, if that goes before `settle`.

        `amend` is then called with the bytes that were counted twice.
        """
        self._expected = old, new, amend

    def settle(self) -> None:
        """Expect nothing any more."""
        self._expected = None

    def _foreign(self, storage: torch.UntypedStorage) -> _Foreign | None:
        """Return what was noted when this storage was read; its address may be another's by now."""
        found = self._read.get(storage._cdata)
        return found if found is not None and found.reference() is storage else None

    def _see_storage(self, storage: torch.UntypedStorage, role: str, module: str) -> Holding:
        holding = self._live.get(storage._cdata)
        if holding is None:
            holding = self._enter(storage, role, module)
        size = holding.counted(storage)
        if holding.bytes != size:
            self._change(holding, size)
        return holding

    def _enter(self, storage: torch.UntypedStorage, role: str, module: str) -> Holding:
        key = storage._cdata
        holding = self._live[key] = Holding(key, 0, role, module, self.run)
        # The reference lives in the holding; without it the callback would never come.
        holding.reference = weakref.ref(storage, partial(self._gone, holding))
        return holding

    def _change(self, holding: Holding, size: int) -> None:
        change = size - holding.bytes
        holding.bytes = size
        self.total += change
        self.log.append((holding, change))

    def _gone(self, holding: Holding, _: object) -> None:
        if not self._open:
            return
        self._live.pop(holding.key, None)
        if self._expected is not None and self._expected[0] is holding:
            old, new, amend = self._expected
            self._expected = None
            if old.bytes == new.bytes and self._replace(old, new):
                amend(old.bytes)
                return
        self._change(holding, 0)

    def _replace(self, old: Holding, new: Holding) -> bool:
        """Let `old` go on in the storage of `new`, as if that had never been; it must be live."""
        storage = None if new.reference is None else new.reference()
        if storage is None:
            return False
        made = next(i for i in range(len(self.log) - 1, -1, -1) if self.log[i][0] is new)
        del self.log[made]
        self.total -= new.bytes
        old.key = new.key
        old.reference = weakref.ref(storage, partial(self._gone, old))
        self._live[old.key] = old
        new.bytes, new.reference = 0, None
        return True
