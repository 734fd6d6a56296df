"""Batches: the order follows from (seed, epoch) alone, and a position is continued exactly."""

from __future__ import annotations

import random
from collections import Counter, OrderedDict, UserDict, defaultdict, namedtuple
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import Dataset, Subset, TensorDataset, default_collate

from narrowcast.data import BatchStream, batch_len, epoch_order, evaluation_batches, to_device
from narrowcast.errors import CheckpointError, DataError, UsageError
from narrowcast.randomness import seed_everything

Pair = namedtuple("Pair", ["x", "y"])


def numbers(length: int) -> TensorDataset:
    return TensorDataset(torch.arange(length), torch.arange(length).float().unsqueeze(1))


def ids_of(stream: BatchStream, batches: int) -> list[int]:
    return [i for _ in range(batches) for i in next(stream)[0].tolist()]


@given(length=st.integers(1, 300), seed=st.integers(-(2**70), 2**70), epoch=st.integers(0, 2**40))
def test_an_epoch_is_a_permutation(length: int, seed: int, epoch: int) -> None:
    """Every sample comes exactly once, for any seed that Python can write, negative ones too."""
    order = epoch_order(length, seed, epoch)

    assert order.dtype == np.int64
    assert sorted(order.tolist()) == list(range(length))


def splitmix(x: int) -> int:
    """One output of SplitMix64 in Python's own integers."""
    z = (x + 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
    return z ^ z >> 31


@given(
    length=st.integers(1, 60), seed=st.integers(-(2**65), 2**65), epoch=st.integers(0, 2**64 - 1)
)
def test_the_order_is_the_documented_formula(length: int, seed: int, epoch: int) -> None:
    """The vectorised order equals the formula in exact integers, seeded as published."""
    assert splitmix(1234567) == 6457827717110365317  # the generator's well-known first output
    state = splitmix(splitmix(seed % 2**64) ^ epoch)
    keys = [splitmix((state + i * 0x9E3779B97F4A7C15) % 2**64) for i in range(length)]

    assert epoch_order(length, seed, epoch).tolist() == sorted(range(length), key=keys.__getitem__)


def test_the_order_never_changes() -> None:
    """The order of a seed is part of the contract: runs of other years compare to it."""
    assert epoch_order(10, seed=0, epoch=0).tolist() == [0, 7, 8, 2, 5, 9, 4, 6, 3, 1]
    assert epoch_order(10, seed=0, epoch=1).tolist() == [9, 0, 6, 7, 4, 3, 2, 1, 8, 5]
    assert epoch_order(10, seed=1, epoch=0).tolist() == [9, 8, 7, 4, 2, 0, 3, 6, 5, 1]


def test_every_sample_is_equally_likely_at_every_place() -> None:
    """Chi-square over 8 x 8 (sample, place) counts of 4,000 epochs; the seed is fixed, so no luck.

    49 degrees of freedom: a fair shuffle exceeds 85.4 in one case of 1,000.
    """
    counts = np.zeros((8, 8))
    for epoch in range(4000):
        counts[np.arange(8), epoch_order(8, seed=7, epoch=epoch)] += 1

    assert float(((counts - 500) ** 2 / 500).sum()) < 85.4


def test_neighbouring_seeds_and_epochs_share_no_pattern() -> None:
    """Orders of different (seed, epoch) agree in about one place on average, as random ones do.

    The mean over 400 pairs has a standard deviation of 0.05; 0.2 is four of them.
    """
    orders = [epoch_order(50, seed, epoch) for seed in range(20) for epoch in range(20)]

    agreements = [int((a == b).sum()) for a, b in pairwise(orders)]

    assert abs(np.mean(agreements) - 1) < 0.2


@settings(deadline=None)
@given(
    length=st.integers(1, 40),
    batch_size=st.integers(1, 12),
    before=st.integers(0, 30),
    after=st.integers(1, 10),
)
def test_a_position_is_continued_exactly(
    length: int, batch_size: int, before: int, after: int
) -> None:
    """Saved anywhere, in mid-epoch too, a stream goes on with the same samples and hash."""
    whole = BatchStream(numbers(length), batch_size, seed=3)
    ids_of(whole, before)
    state = whole.state_dict()
    expected = ids_of(whole, after)

    resumed = BatchStream(numbers(length), batch_size, seed=3)
    resumed.load_state_dict(state)

    assert ids_of(resumed, after) == expected
    assert resumed.order_hash == whole.order_hash
    assert resumed.state_dict() == whole.state_dict()


@given(length=st.integers(1, 50), batch_size=st.integers(1, 20))
def test_training_batches_are_full_and_no_sample_repeats_in_an_epoch(
    length: int, batch_size: int
) -> None:
    """The part of an epoch that does not fill a batch is left out; small data are one batch."""
    stream = BatchStream(numbers(length), batch_size, seed=0)
    expected = min(batch_size, length)

    batches = [next(stream)[0] for _ in range(stream.batches_per_epoch)]

    assert [len(ids) for ids in batches] == [expected] * (length // expected)
    assert max(Counter(torch.cat(batches).tolist()).values()) == 1
    assert stream.epoch == 0
    next(stream)
    assert stream.epoch == 1


def test_each_epoch_has_another_order_and_leaves_out_other_samples() -> None:
    """Over a few epochs every sample is trained on, although each epoch leaves some out."""
    stream = BatchStream(numbers(10), 4, seed=0)

    assert set(ids_of(stream, 10)) == set(range(10))


def test_the_order_hash_tells_orders_apart_and_equal_ones_alike() -> None:
    """The same seed gives the same chain; another seed or one batch more gives another."""
    first, again, other = (BatchStream(numbers(30), 5, seed=s) for s in (1, 1, 2))
    assert first.order_hash == ""
    for stream in (first, again, other):
        ids_of(stream, 7)

    assert len(first.order_hash) == 64
    assert first.order_hash == again.order_hash
    assert first.order_hash != other.order_hash
    before = first.order_hash
    next(first)
    assert first.order_hash != before


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"length": 11}, "length 10, and this run has length 11"),
        ({"batch_size": 4}, "batch_size 5, and this run has batch_size 4"),
        ({"seed": 9}, "seed 0, and this run has seed 9"),
    ],
)
def test_a_position_in_other_data_is_refused(changed: dict[str, int], named: str) -> None:
    """Data of another size, another batch size or seed: going on would not be going on."""
    state = BatchStream(numbers(10), 5, seed=0).state_dict()
    setting = {"length": 10, "batch_size": 5, "seed": 0} | changed
    stream = BatchStream(numbers(setting["length"]), setting["batch_size"], seed=setting["seed"])

    with pytest.raises(CheckpointError, match=named):
        stream.load_state_dict(state)


def test_a_stream_draws_nothing_from_torch_or_numpy() -> None:
    """Dropout sees the same random numbers whatever the data order is."""

    def draws() -> tuple[float, float, float]:
        return float(torch.rand(1)), float(np.random.rand()), random.random()  # noqa: NPY002

    seed_everything(0, "test")
    expected = draws()
    seed_everything(0, "test")
    ids_of(BatchStream(numbers(20), 3, seed=5), 20)

    assert draws() == expected


class PlainRows:
    """Sample by sample, from tensors: what the short cuts must agree with."""

    def __init__(self, *tensors: Tensor) -> None:
        self.tensors = tensors

    def __len__(self) -> int:
        return len(self.tensors[0])

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        return tuple(t[index] for t in self.tensors)


class ManyRows(PlainRows):
    """Asked once a batch, as torch's own loader would."""

    calls = 0

    def __getitems__(self, indices: list[int]) -> list[tuple[Tensor, ...]]:
        self.calls += 1
        return [self[i] for i in indices]


@given(length=st.integers(1, 30), batch_size=st.integers(1, 9), seed=st.integers(0, 5))
def test_every_way_to_read_gives_the_same_batches(length: int, batch_size: int, seed: int) -> None:
    """TensorDataset, subsets of subsets, __getitems__ and plain reading agree in value and type."""
    x, y = torch.randn(length, 2, 3), torch.arange(length)
    back = list(range(length))[::-1]
    datasets: list[Any] = [
        PlainRows(x, y),
        TensorDataset(x, y),
        ManyRows(x, y),
        Subset(Subset(TensorDataset(x, y), back), back),
        [(x[i], y[i]) for i in range(length)],
    ]
    streams = [BatchStream(d, batch_size, seed=seed) for d in datasets]
    for _ in range(4):
        (ids, expected), *others = [next(s) for s in streams]

        assert isinstance(expected, list)
        for other_ids, batch in others:
            assert type(batch) is type(expected)
            assert torch.equal(ids, other_ids)
            assert all(torch.equal(a, b) for a, b in zip(batch, expected, strict=True))


def test_getitems_is_called_once_a_batch() -> None:
    """A dataset that can read many samples at once is not asked for them one by one."""
    dataset = ManyRows(torch.randn(12, 2))
    stream = BatchStream(dataset, 4, seed=0)
    for _ in range(3):
        next(stream)

    assert dataset.calls == 3


def test_a_plain_tensor_is_a_dataset_of_its_rows() -> None:
    """Windows that unfold() cuts from a text need no wrapper and no copy."""
    windows = torch.arange(20).unfold(0, 5, 3)
    ids, batch = next(BatchStream(windows, 2, seed=0))

    assert torch.equal(batch, torch.stack([windows[i] for i in ids]))


class Doubled(TensorDataset):
    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        return tuple(2 * t for t in super().__getitem__(index))


def test_a_subclass_of_a_known_dataset_reads_in_its_own_way() -> None:
    """The short cut is for exact types: an overridden __getitem__ is never bypassed."""
    _, batch = next(BatchStream(Doubled(torch.ones(3)), 3, seed=0))

    assert batch[0].tolist() == [2.0, 2.0, 2.0]


def test_a_collate_of_ones_own_gets_the_list_of_samples() -> None:
    """The recipe decides how samples become a batch, also for a TensorDataset."""
    stream = BatchStream(numbers(6), 2, seed=0, collate=lambda samples: {"count": len(samples)})

    assert next(stream)[1] == {"count": 2}


@given(length=st.integers(1, 30), batch_size=st.integers(1, 35))
def test_evaluation_goes_once_through_everything_in_order(length: int, batch_size: int) -> None:
    """No sample is dropped or repeated, and only the last batch may be smaller."""
    batches = list(evaluation_batches(numbers(length), batch_size))

    assert torch.cat([ids for ids, _ in batches]).tolist() == list(range(length))
    assert torch.cat([batch[0] for _, batch in batches]).tolist() == list(range(length))
    assert {len(ids) for ids, _ in batches[:-1]} <= {batch_size}


def test_a_sample_that_cannot_be_read_is_named_and_the_position_stays() -> None:
    """The error has the index and the user's own line; nothing counts as served."""

    class Broken(Dataset[int]):
        def __len__(self) -> int:
            return 4

        def __getitem__(self, index: int) -> int:
            return [10, 20][index]

    stream = BatchStream(Broken(), 4, seed=0)
    with pytest.raises(DataError) as caught:
        next(stream)

    first_missing = next(i for i in epoch_order(4, seed=0, epoch=0) if i > 1)
    expected = f"reading sample {first_missing} raised IndexError: list index out of range"
    assert expected in caught.value.message
    assert "return [10, 20][index]" in caught.value.message
    assert "narrowcast/data.py" not in caught.value.message
    assert (stream.position, stream.order_hash) == (0, "")


def test_samples_of_unequal_shape_ask_for_a_collate() -> None:
    """What default_collate cannot stack is an error with the way out."""
    with pytest.raises(DataError, match="stack expects each tensor to be equal size") as caught:
        next(BatchStream([torch.zeros(2), torch.zeros(3)], 2, seed=0))

    assert "collate(samples)" in caught.value.hint


def test_getitems_that_returns_too_few_is_an_error() -> None:
    """A short answer would silently train on fewer samples than the ids say."""

    class Short(PlainRows):
        def __getitems__(self, indices: list[int]) -> list[Any]:
            return [self[i] for i in indices[1:]]

    with pytest.raises(DataError, match="asked for 3 samples and returned 2"):
        next(BatchStream(Short(torch.zeros(3)), 3, seed=0))


@pytest.mark.parametrize("batch_size", [0, -1])
def test_a_batch_holds_at_least_one_sample(batch_size: int) -> None:
    """A batch size of zero would never end."""
    with pytest.raises(UsageError, match=f"batch_size is {batch_size}"):
        BatchStream(numbers(3), batch_size, seed=0)


def test_empty_data_are_an_error() -> None:
    """There is no batch to take, in training and in evaluation."""
    with pytest.raises(DataError, match="empty"):
        BatchStream([], 1, seed=0)
    with pytest.raises(DataError, match="empty"):
        next(evaluation_batches([], 1))


nests = st.recursive(
    st.just("tensor") | st.none() | st.text(max_size=3) | st.integers(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner, inner)
        | st.builds(Pair, inner, inner)
        | st.dictionaries(st.text(max_size=2), inner, max_size=3)
    ),
    max_leaves=10,
)


def with_tensors(nest: Any) -> Any:
    if nest == "tensor":
        return torch.zeros(2)
    if isinstance(nest, Pair):
        return Pair(*(with_tensors(i) for i in nest))
    if isinstance(nest, (list, tuple)):
        return type(nest)(with_tensors(i) for i in nest)
    if isinstance(nest, dict):
        return {k: with_tensors(v) for k, v in nest.items()}
    return nest


def shape_of(nest: Any) -> Any:
    """A nest with its tensors replaced by the device that they are on."""
    if isinstance(nest, Tensor):
        return nest.device.type
    if isinstance(nest, Pair):
        return Pair(*(shape_of(i) for i in nest))
    if isinstance(nest, (list, tuple)):
        return type(nest)(shape_of(i) for i in nest)
    if isinstance(nest, dict):
        return {k: shape_of(v) for k, v in nest.items()}
    return nest


@given(nest=nests)
def test_moving_a_nest_moves_every_tensor_and_keeps_all_else(nest: Any) -> None:
    """Lists, tuples, named tuples and dicts keep their types, order and other contents."""
    batch = with_tensors(nest)

    moved = to_device(batch, "meta")

    expected = shape_of(batch)
    assert repr(shape_of(moved)) == repr(expected).replace("'cpu'", "'meta'")


@pytest.mark.parametrize(
    "mapping",
    [kind(a=torch.zeros(1)) for kind in (OrderedDict, partial(defaultdict, list), UserDict)],
    ids=lambda m: type(m).__name__,
)
def test_moving_a_mapping_keeps_its_class_and_leaves_the_original(mapping: Any) -> None:
    """A tokenizer's batch is a mapping of a class of its own; the caller's one is not changed."""
    moved = to_device(mapping, "meta")

    assert type(moved) is type(mapping)
    assert moved["a"].device.type == "meta"
    assert mapping["a"].device.type == "cpu"


def test_an_object_with_a_to_method_moves_itself() -> None:
    """Batches of graphs and the like know best what to move."""

    class Graph:
        def to(self, device: str) -> str:
            return f"graph on {device}"

    assert to_device([Graph()], "meta") == ["graph on meta"]


@given(size=st.integers(1, 20))
def test_batch_len_is_the_leading_dimension_of_the_first_tensor(size: int) -> None:
    """However deep it lies, and behind things that have no length of their own."""
    x = torch.zeros(size, 3)

    for batch in (x, [x, None], {"a": "text", "b": (x,)}, [torch.tensor(1.0), x], Pair(x, 1)):
        assert batch_len(batch) == size


def test_batch_len_of_what_has_no_batch_is_an_error() -> None:
    """Guessing would weight metrics wrongly."""
    with pytest.raises(DataError, match="how many samples a batch of type dict holds"):
        batch_len({"a": 1, "b": torch.tensor(2.0)})


def test_default_collate_is_what_a_loader_would_use() -> None:
    """Numbers in samples become tensors exactly as torch's DataLoader makes them."""
    samples = [({"a": 1.5}, 2), ({"a": 2.5}, 3)]
    ids, batch = next(BatchStream(samples, 2, seed=0))
    expected = default_collate([samples[i] for i in ids.tolist()])

    assert repr(batch) == repr(expected)
