"""Nested state travels through JSON and named tensors without a bit changed."""

from __future__ import annotations

import json
import math
from collections import Counter, OrderedDict
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from narrowcast.errors import CheckpointError
from narrowcast.training.state_tree import leaves, pack, unpack

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
]
SHAPES = [(), (0,), (1,), (3, 0), (2, 3), (2, 3, 4, 5)]


def there_and_back(tree: Any) -> Any:
    data, tensors = pack(tree)
    return unpack(json.loads(json.dumps(data)), tensors)


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
TREES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner)
        | st.lists(inner).map(tuple)
        | st.dictionaries(st.text() | st.integers(), inner)
    ),
    max_leaves=20,
)


def same(a: Any, b: Any) -> bool:
    """Equality that tells True from 1, (1,) from [1] and -0.0 from 0.0, and NaN equals NaN."""
    return repr(a) == repr(b)


@given(TREES)
def test_any_nest_of_plain_values_comes_back_as_it_was(tree: Any) -> None:
    """Types, order, integer keys, signed zeros, infinities and NaN survive."""
    assert same(there_and_back(tree), tree)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_tensor_of_any_dtype_and_shape_comes_back_bit_for_bit(
    dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    """The bytes are kept, whatever they mean: NaN payloads and subnormals as well."""
    count = math.prod(shape)
    raw = torch.randint(0, 2 if dtype == torch.bool else 256, (count * dtype.itemsize,))
    tensor = (
        raw.to(torch.uint8).view(dtype).reshape(shape) if count else torch.empty(shape).to(dtype)
    )

    back = there_and_back({"x": tensor})["x"]

    assert (back.dtype, back.shape) == (dtype, tensor.shape)
    assert back.reshape(-1).view(torch.uint8).tolist() == raw.tolist()


def test_the_memory_order_of_a_tensor_survives() -> None:
    """channels_last state stays channels_last, so that the same kernels run after a resume."""
    tensor = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)

    back = there_and_back([tensor])[0]

    assert back.stride() == tensor.stride()
    assert torch.equal(back, tensor)


def test_one_tensor_in_two_places_is_stored_once() -> None:
    """Tied weights take their bytes once and come back tied."""
    weight = torch.randn(4, 4)

    data, tensors = pack({"encoder": weight, "decoder": weight.detach()})
    back = unpack(data, tensors)

    assert list(tensors) == ["encoder"]
    assert back["encoder"] is back["decoder"]


def test_views_that_overlap_are_stored_apart() -> None:
    """safetensors refuses shared memory; each view keeps its own values."""
    base = torch.arange(12.0)
    tree = {
        "whole": base,
        "flat": base.view(3, 4),
        "part": base[2:5],
        "turned": base.view(3, 4).t(),
    }

    data, tensors = pack(tree)
    storages = [t.untyped_storage().data_ptr() for t in tensors.values()]
    back = unpack(data, tensors)

    assert len(set(storages)) == len(storages) == 4
    assert all(torch.equal(back[name], value) for name, value in tree.items())


def test_counters_ordered_dicts_and_numpy_values_keep_their_meaning() -> None:
    """What schedulers and optimizers of torch and of users keep in their state."""
    tree = {
        "milestones": Counter([3, 3, 9]),
        "ordered": OrderedDict(b=1, a=2),
        "rate": np.float32(0.1),
        "count": np.int64(7),
        "table": np.array([[1, 2], [3, 4]], dtype=np.uint32),
    }

    back = there_and_back(tree)

    assert back["milestones"] == tree["milestones"]
    assert sorted(back["milestones"].elements()) == [3, 3, 9]
    assert list(back["ordered"]) == ["b", "a"]
    assert (type(back["rate"]), back["rate"]) == (np.float32, np.float32(0.1))
    assert (type(back["count"]), back["count"]) == (np.int64, 7)
    assert back["table"].dtype == np.uint32
    assert back["table"].tolist() == [[1, 2], [3, 4]]


@pytest.mark.parametrize(
    ("value", "named"),
    [
        (lambda: None, "function"),
        (torch.nn.ReLU(), "ReLU"),
        ({1, 2}, "set"),
        (torch.tensor([1j]), "complex64"),
        (torch.eye(2).to_sparse(), "sparse"),
        (np.array(["a"]), "ndarray"),
    ],
    ids=["function", "object", "set", "complex", "sparse", "strings"],
)
def test_what_would_need_pickle_is_refused_with_its_place(value: object, named: str) -> None:
    """The error says where in the state and what it is; nothing is dropped silently."""
    with pytest.raises(CheckpointError, match=rf"(?s){named}.*'model\.hooks\.0'"):
        pack({"model": {"hooks": [value]}})


def test_a_key_that_is_no_string_or_integer_is_refused() -> None:
    """A float or tuple key would come back as another one."""
    with pytest.raises(CheckpointError, match=r"key \(1, 2\) in 'state'"):
        pack({"state": {(1, 2): 3}})


@pytest.mark.parametrize(
    "data", [{"python/object": "os.system"}, {}, {"tensor": "absent"}, {"dict": [1]}, {"float": {}}]
)
def test_data_of_another_make_is_an_error(data: object) -> None:
    """Nothing but the kinds that pack writes is ever built."""
    with pytest.raises(CheckpointError, match="malformed"):
        unpack(data, {})


def test_leaves_names_every_value_by_its_path() -> None:
    """The flat view in which two states are compared and differences named."""
    tree = {"a": {"b": [1, (2.0,)]}, 3: "x"}

    assert leaves(tree) == {"a.b.0": 1, "a.b.1.0": 2.0, "3": "x"}


OPTIMIZERS = [
    name
    for name, kind in sorted(vars(torch.optim).items())
    if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer) and name != "Optimizer"
]
SCHEDULERS: dict[str, dict[str, Any]] = {
    "LambdaLR": {"lr_lambda": lambda epoch: 0.9**epoch},
    "StepLR": {"step_size": 2},
    "MultiStepLR": {"milestones": [1, 3, 3]},
    "LinearLR": {},
    "ExponentialLR": {"gamma": 0.9},
    "CosineAnnealingLR": {"T_max": 5},
    "PolynomialLR": {},
    "CyclicLR": {"base_lr": 0.01, "max_lr": 0.1},
    "CosineAnnealingWarmRestarts": {"T_0": 2},
    "OneCycleLR": {"max_lr": 0.1, "total_steps": 10},
    "ReduceLROnPlateau": {},
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_state_of_every_optimizer_of_torch_can_be_stored(name: str) -> None:
    """After a step, with whatever it keeps by then; the new ones of a new torch as well."""
    weight = torch.nn.Parameter(torch.randn(3, 3))
    optimizer = getattr(torch.optim, name)([weight])
    weight.grad = torch.eye(3).to_sparse() if name == "SparseAdam" else torch.eye(3)
    optimizer.step(*((lambda: weight.square().sum(),) if name == "LBFGS" else ()))
    state = optimizer.state_dict()

    assert same(leaves(there_and_back(state)), leaves(state))


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_state_of_every_scheduler_of_torch_can_be_stored(name: str) -> None:
    """Counters of milestones, infinities of the best metric, tuples and strings."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(3))], lr=0.1, momentum=0.9)
    scheduler = getattr(torch.optim.lr_scheduler, name)(optimizer, **SCHEDULERS[name])
    state = scheduler.state_dict()

    assert same(leaves(there_and_back(state)), leaves(state))
