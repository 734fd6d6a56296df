"""Samples to batches, in an order that can be proved equal and continued exactly.

``BatchStream`` serves a training for ever: epoch after epoch, each in an order that is a pure
function of (seed, epoch), the same on every machine and with every version of torch and numpy. It
draws nothing from any random generator. Its position is two integers, so that a checkpoint can
hold it, and a chain of hashes over the sample ids proves afterwards what was trained on.

The last batch of a training epoch is dropped if it is not full, so that every step averages over
the same number of samples; a dataset smaller than one batch is served whole. ``evaluation_batches``
goes once through a dataset in its own order and drops nothing.

Batches are read in the calling process: for data in memory one indexing operation is faster than
any worker. That is what happens for a ``TensorDataset``, a ``Subset`` of one, and a plain tensor.
A dataset with ``__getitems__`` (torch's own convention) gets all ids of a batch in one call, and
every other one is asked for sample after sample.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._pytree import tree_map_only
from torch.utils.data import Subset, TensorDataset, default_collate

from narrowcast.errors import CheckpointError, DataError, UsageError
from narrowcast.user_code import user_code

__all__ = [
    "BatchStream",
    "MapDataset",
    "Repeated",
    "batch_len",
    "epoch_order",
    "evaluation_batches",
    "split_batch",
    "to_device",
]

Collate = Callable[[list[Any]], Any]
Ids = NDArray[np.int64]


class MapDataset(Protocol):
    """Anything with a length that gives a sample for each index below it: a list will do."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


@dataclass(frozen=True)
class Repeated:
    """The first `length` samples of an endless repetition of a dataset."""

    data: MapDataset
    length: int

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int, /) -> Any:
        return self.data[index % len(self.data)]


class BatchStream:
    """Endless batches ``(ids, batch)`` for training; `ids` is an int64 tensor of shape (B,).

    `batch` is what `collate` makes of the samples: without one, torch's ``default_collate``, which
    turns samples that are tuples into a list of tensors.
    """

    def __init__(
        self,
        dataset: MapDataset,
        batch_size: int,
        *,
        seed: int,
        collate: Collate | None = None,
        share: tuple[int, int] = (0, 1),
    ) -> None:
        """Serve all of each batch, or of `share` = (rank, ranks) the rank's equal part of it.

        Order, position and hash are those of whole batches. Raises UsageError if the ranks do not
        divide a batch.
        """
        _check(dataset, batch_size)
        self.seed = seed
        self.length = len(dataset)
        self.batch_size = min(batch_size, self.length)
        self._share = _part_of(self.batch_size, *share)
        self.epoch = 0
        self.position = 0
        """Samples of this epoch that were served."""
        self._chain = ""
        self._order = epoch_order(self.length, seed, 0)
        self._read = _reader(dataset, collate)

    @property
    def batches_per_epoch(self) -> int:
        return self.length // self.batch_size

    @property
    def order_hash(self) -> str:
        """SHA-256 (hex) over the ids of all batches so far: each hash covers the one before it.

        Empty before the first batch. Equal hashes mean equal samples in equal batches and order.
        """
        return self._chain

    def __iter__(self) -> Iterator[tuple[Tensor, Any]]:
        return self

    def __next__(self) -> tuple[Tensor, Any]:
        """Return the next batch; if reading it fails, the position stays where it was."""
        if self.position + self.batch_size > self.length:
            self.epoch, self.position = self.epoch + 1, 0
            self._order = epoch_order(self.length, self.seed, self.epoch)
        ids = self._order[self.position : self.position + self.batch_size]
        own = ids[self._share]
        batch = self._read(own)
        self.position += len(ids)
        served = self._chain.encode() + ids.astype("<i8").tobytes()
        self._chain = hashlib.sha256(served).hexdigest()
        return torch.from_numpy(own), batch

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on: integers and one string."""
        return {
            "seed": self.seed,
            "length": self.length,
            "batch_size": self.batch_size,
            "epoch": self.epoch,
            "position": self.position,
            "order_hash": self._chain,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where the state was taken, in the middle of an epoch too.

        Raises CheckpointError if it was taken with other data, batch size or seed.
        """
        for name in ("length", "batch_size", "seed"):
            if state[name] != getattr(self, name):
                raise CheckpointError(
                    f"the data position was saved with {name} {state[name]}, "
                    f"and this run has {name} {getattr(self, name)}",
                    hint="continue with the same data and options, or start a new run",
                )
        self.epoch, self.position = state["epoch"], state["position"]
        self._chain = state["order_hash"]
        self._order = epoch_order(self.length, self.seed, self.epoch)


def evaluation_batches(
    dataset: MapDataset,
    batch_size: int,
    collate: Collate | None = None,
    share: tuple[int, int] = (0, 1),
) -> Iterator[tuple[Tensor, Any]]:
    """Go once through a dataset in its own order; the last batch may be smaller.

    Yields ``(ids, batch)`` as ``BatchStream`` does; of `share` = (rank, ranks) every `ranks`-th
    batch, from number `rank` on.
    """
    _check(dataset, batch_size)
    read = _reader(dataset, collate)
    rank, ranks = share
    for start in range(rank * batch_size, len(dataset), ranks * batch_size):
        ids = np.arange(start, min(start + batch_size, len(dataset)), dtype=np.int64)
        yield torch.from_numpy(ids), read(ids)


def epoch_order(length: int, seed: int, epoch: int) -> Ids:
    """Return the order of `length` samples in one epoch: a permutation, int64 of shape (length,).

    Each index gets a 64-bit hash of (seed, epoch, index), and the indices are sorted by it:

        state = mix(mix(seed) xor epoch)
        order = argsort(mix(state + index * golden) for each index)

    `mix` is SplitMix64's (Steele, Lea and Flood 2014, figure 15). A library's shuffle may change
    with its next version; this cannot.
    """
    golden = np.uint64(0x9E3779B97F4A7C15)
    seeded = _mix(np.array([seed % 2**64], np.uint64))
    state = _mix(seeded ^ np.array([epoch], np.uint64))
    keys = _mix(state + np.arange(length, dtype=np.uint64) * golden)
    return np.argsort(keys, kind="stable").astype(np.int64, copy=False)


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Scramble 64-bit integers one to one; products wrap around, as they must."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def to_device(batch: Any, device: torch.device | str) -> Any:
    """Move every tensor of a nest of mappings, lists and (named) tuples; keep all else as it is.

    An object with a ``to`` method of its own moves itself.
    """
    if callable(getattr(batch, "to", None)):
        return batch.to(device)
    if isinstance(batch, tuple):
        moved = [to_device(item, device) for item in batch]
        return type(batch)(*moved) if hasattr(batch, "_fields") else type(batch)(moved)
    if isinstance(batch, list):
        return [to_device(item, device) for item in batch]
    if isinstance(batch, MutableMapping):
        clone = copy.copy(batch)  # keeps what a subclass carries: a default factory, an order
        clone.update({key: to_device(item, device) for key, item in batch.items()})
        return clone
    if isinstance(batch, Mapping):
        return {key: to_device(item, device) for key, item in batch.items()}
    return batch


def batch_len(batch: Any) -> int:
    """Return the number of samples: the length of the first tensor's leading dimension.

    Where the ids of a batch are at hand, ``len(ids)`` is the better answer: it needs no convention.
    Raises DataError if no tensor in the nest has a dimension.
    """
    for tensor in _tensors(batch):
        if tensor.dim() > 0:
            return int(tensor.shape[0])
    raise DataError(
        f"cannot tell how many samples a batch of type {type(batch).__name__} holds",
        hint="let collate() return tensors whose first dimension is the batch",
    )


def split_batch(batch: Any, parts: int) -> list[Any]:
    """Cut a batch into equal micro-batches along its samples, in their order; views, no copies.

    Tensors whose first dimension is the batch are cut, everything else goes into each part.
    Raises DataError where the samples do not divide by `parts`.
    """
    if parts == 1:
        return [batch]
    size = batch_len(batch)
    if size % parts:
        raise DataError(
            f"a batch of {size} samples cannot be cut into {parts} equal micro-batches",
            hint=f"choose a number of micro-batches that divides {size}",
        )

    def part(index: int) -> Any:
        width = size // parts

        def cut(tensor: Tensor) -> Tensor:
            if tensor.dim() == 0 or tensor.shape[0] != size:
                return tensor
            return tensor[index * width : (index + 1) * width]

        return tree_map_only(Tensor, cut, batch)

    return [part(index) for index in range(parts)]


def _tensors(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        for item in batch.values():
            yield from _tensors(item)
    elif isinstance(batch, (list, tuple)):
        for item in batch:
            yield from _tensors(item)


def _part_of(size: int, rank: int, ranks: int) -> slice:
    """Return which of a batch's samples are a rank's."""
    if size % ranks:
        raise UsageError(
            f"a batch of {size} samples cannot be shared equally by {ranks} ranks",
            hint=f"choose a batch size that {ranks} divides (--set batch_size=...), or another "
            "number of ranks",
        )
    width = size // ranks
    return slice(rank * width, (rank + 1) * width)


def _check(dataset: MapDataset, batch_size: int) -> None:
    if batch_size < 1:
        raise UsageError(f"batch_size is {batch_size}", hint="a batch holds at least one sample")
    if len(dataset) == 0:
        raise DataError("the dataset is empty", hint="return at least one sample from data()")


def _reader(dataset: MapDataset, collate: Collate | None) -> Callable[[Ids], Any]:
    """Choose the fastest way to read samples that gives what reading them one by one would.

    Only exact types take the short cut: a subclass may read its samples in its own way.
    """
    if collate is None:
        if type(dataset) is TensorDataset:
            tensors = dataset.tensors
            return lambda ids: [tensor[torch.from_numpy(ids)] for tensor in tensors]
        if type(dataset) is Tensor:
            return lambda ids: dataset[torch.from_numpy(ids)]
        if type(dataset) is Subset and type(dataset.dataset) in (TensorDataset, Subset):
            inner = _reader(cast("MapDataset", dataset.dataset), None)
            indices = np.asarray(dataset.indices, dtype=np.int64)
            return lambda ids: inner(indices[ids])
    stack = default_collate if collate is None else collate
    many = getattr(dataset, "__getitems__", None)

    def read(ids: Ids) -> Any:
        samples = _read_many(many, ids) if callable(many) else _read_each(dataset, ids)
        hint = "" if collate else "give the recipe a collate(samples) that makes a batch of them"
        with user_code(None, f"stacking {len(samples)} samples", kind=DataError, hint=hint):
            return stack(samples)

    return read


def _read_many(many: Callable[[list[int]], Sequence[Any]], ids: Ids) -> list[Any]:
    with user_code(None, f"reading the samples {_few(ids)}", kind=DataError):
        samples = list(many(ids.tolist()))
    if len(samples) != len(ids):
        raise DataError(
            f"__getitems__ was asked for {len(ids)} samples and returned {len(samples)}",
            hint="return a list with one sample for each index",
        )
    return samples


def _read_each(dataset: MapDataset, ids: Ids) -> list[Any]:
    samples = []
    for index in ids.tolist():
        with user_code(None, f"reading sample {index}", kind=DataError):
            samples.append(dataset[index])
    return samples


def _few(ids: Ids) -> str:
    return ", ".join(map(str, ids[:3])) + (", ..." if len(ids) > 3 else "")
