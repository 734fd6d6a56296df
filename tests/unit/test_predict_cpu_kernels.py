"""Fake results have the storages of real ones, operation by operation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only

from narrowcast.prediction.cpu_kernels import CpuKernels

Described = list[tuple[tuple[int, ...], torch.dtype, torch.device, int]]


def described(result: Any) -> Described:
    """Shape, dtype, device and bytes of storage of every tensor in a result."""
    return [
        (tuple(t.shape), t.dtype, t.device, t.untyped_storage().nbytes())
        for t in tree_leaves(result)
        if isinstance(t, Tensor)
    ]


def both(function: Callable[..., Any], *args: Any) -> tuple[Described, Described]:
    """Call a function with fake tensors and with real ones."""
    mode = FakeTensorMode()
    fake = tree_map_only(Tensor, mode.from_tensor, args)
    with mode, CpuKernels():
        predicted = described(function(*fake))
    return predicted, described(function(*args))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(), (0,), (1,), (7,), (3, 5), (2, 0, 4)])
@pytest.mark.parametrize(
    "loss", [F.mse_loss, F.smooth_l1_loss, F.soft_margin_loss, F.binary_cross_entropy]
)
def test_a_reduced_loss_keeps_its_elementwise_storage(
    loss: Callable[..., Tensor], shape: tuple[int, ...], dtype: torch.dtype, reduction: str
) -> None:
    """The scalar that a CPU returns is as large as its input; without reduction nothing changes."""
    x = torch.rand(shape, dtype=dtype)

    predicted, real = both(lambda a, b: loss(a, b, reduction=reduction), x, x.clone())

    assert predicted == real


def test_a_loss_of_operands_that_are_not_contiguous_or_broadcast() -> None:
    """The storage is that of the elementwise result, whatever the operands' strides."""
    x, y = torch.rand(6, 8)[:, ::2], torch.rand(4, 6).t()

    for operands in ((x, y), (x, y[:1].expand(6, 4))):
        predicted, real = both(torch.ops.aten.mse_loss.default, *operands)
        assert predicted == real
    predicted, real = both(torch.ops.aten.mse_loss.default, x, torch.rand(6, 1))
    assert predicted == real


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weights", [torch.float32, None])
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_statistics_of_a_norm_are_fp32_beside_fp32_weights(
    batch: int, weights: torch.dtype | None, dtype: torch.dtype
) -> None:
    """Batch norm and group norm, with weights and without, in their forward pass."""
    x = torch.rand(batch, 4, 3, 3).to(dtype)
    weight = None if weights is None else torch.ones(4, dtype=weights)
    mean = None if weights is None else torch.zeros(4, dtype=weights)
    group_norm, batch_norm = (
        torch.ops.aten.native_group_norm.default,
        torch.ops.aten.native_batch_norm.default,
    )

    predicted, real = both(group_norm, x, weight, weight, batch, 4, 9, 2, 1e-5)
    assert predicted == real
    predicted, real = both(batch_norm, x, weight, weight, mean, mean, True, 0.1, 1e-5)
    assert predicted == real


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_of_a_norms_input_has_the_inputs_format(dtype: torch.dtype) -> None:
    """An fp32 weight does not widen it."""
    x = torch.rand(2, 4, 3, 3).to(dtype)
    statistics = torch.zeros(2, 2)
    backward = torch.ops.aten.native_group_norm_backward.default

    predicted, real = both(
        backward, x, x, statistics, statistics, torch.ones(4), 2, 4, 9, 2, [True] * 3
    )

    assert predicted == real


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("mode", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 6])
def test_the_indices_of_bags_are_sized_as_they_are_made(
    count: int, dtype: torch.dtype, mode: int, last: bool
) -> None:
    """Sum, mean and max, with the offset of the end and without."""
    weight, indices = torch.rand(5, 4).to(dtype), torch.arange(count) % 5
    offsets = torch.tensor([0, count])

    predicted, real = both(
        torch.ops.aten._embedding_bag.default,
        *(weight, indices, offsets, False, mode, False, None, last),
    )

    assert predicted == real


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("steps", "batch"), [(1, 1), (2, 3), (13, 5)])
def test_an_lstm_takes_the_workspace_that_onednn_asks_for(
    steps: int, batch: int, dtype: torch.dtype
) -> None:
    """It is saved for backward, and is most of what the layer saves."""
    x = torch.rand(steps, batch, 16).to(dtype)
    weights = [torch.rand(shape).to(dtype) for shape in ((96, 16), (96, 24), (96,), (96,))]
    state = torch.zeros(batch, 24, dtype=dtype)
    layer = torch.ops.aten.mkldnn_rnn_layer.default
    rest = (False, [], 2, 24, 1, True, False, False, True)

    predicted, real = both(lambda *a: layer(*a, *rest), x, *weights, state, state)

    assert predicted == real
    assert real[3][3] > 0


def test_without_gradients_an_lstm_takes_none() -> None:
    """Then nothing is run to ask for it either."""
    layer = torch.nn.LSTM(16, 24)
    mode = FakeTensorMode(allow_non_fake_inputs=True)

    with mode, CpuKernels(), torch.no_grad():
        output, _ = layer(torch.zeros(3, 2, 16))

    assert output.shape == (3, 2, 24)
