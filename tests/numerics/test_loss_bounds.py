"""linear_cross_entropy against fp64 within derived bounds, and against torch option by option."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from loss_oracle import BF16, FP16, FP32, FP64, Case, check
from narrowcast.loss import passes
from narrowcast.loss.cross_entropy import linear_cross_entropy

SMALL = 24_576
"""About 64 x 64 tiles in fp32 without widened blocks, smaller ones otherwise."""


@pytest.mark.parametrize("dtype", [FP64, FP32, BF16, FP16])
@pytest.mark.parametrize("classes", [1, 2, 63, 64, 65, 257])
@pytest.mark.parametrize("tokens", [0, 1, 63, 64, 65, 300])
def test_loss_and_gradients_are_within_the_bounds(
    dtype: torch.dtype, tokens: int, classes: int
) -> None:
    """Every loss, and every number of each gradient, whatever the sizes round a tile's edge."""
    check(Case(tokens=tokens, classes=classes, width=16, dtype=dtype, chunk_bytes=SMALL))


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(0, 70),
    classes=st.integers(1, 70),
    width=st.integers(1, 20),
    dtype=st.sampled_from([FP64, FP32, BF16, FP16]),
    chunk_bytes=st.integers(1_000, 50_000),
)
def test_any_shape_and_any_cut_are_within_the_bounds(
    tokens: int, classes: int, width: int, dtype: torch.dtype, chunk_bytes: int
) -> None:
    """The cut into tiles changes roundings only."""
    check(Case(tokens=tokens, classes=classes, width=width, dtype=dtype, chunk_bytes=chunk_bytes))


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize(("tokens", "classes"), [(1, 1), (65, 257), (300, 63)])
def test_products_of_16_bit_factors_are_within_the_bounds(
    dtype: torch.dtype, tokens: int, classes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What CUDA does, with its product stood in for: dz is rounded once more, nothing else."""
    monkeypatch.setattr(passes, "_multiplies_narrow", lambda _device, _compute: True)
    monkeypatch.setattr(passes, "_narrow_product", narrow_product)

    check(
        Case(
            tokens=tokens,
            classes=classes,
            width=16,
            dtype=dtype,
            chunk_bytes=SMALL,
            rounds_dz=True,
        )
    )


def narrow_product(a: Tensor, b: Tensor) -> Tensor:
    assert a.dtype == b.dtype
    assert a.dtype.itemsize == 2
    return a.float() @ b.float()


OPTIONS: dict[str, Callable[[int], dict[str, object]]] = {
    "plain": lambda _: {},
    "smoothed": lambda _: {"label_smoothing": 0.1},
    "smoothed only": lambda _: {"label_smoothing": 1.0},
    "weighted": lambda v: {"weight": torch.rand(v, dtype=FP64)},
    "both": lambda v: {"weight": torch.rand(v, dtype=FP64), "label_smoothing": 0.3},
}


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("has_bias", [True, False])
def test_options_mean_what_they_mean_to_torch(
    options: str, reduction: str, *, has_bias: bool
) -> None:
    """In fp64 a sum of 60 terms differs by no more than 60 x 2^-53 of its size, here 1e-12."""
    hidden = torch.randn(3, 17, 8, dtype=FP64, requires_grad=True)
    weight = torch.randn(53, 8, dtype=FP64, requires_grad=True)
    bias = torch.randn(53, dtype=FP64, requires_grad=True) if has_bias else None
    target = torch.randint(0, 53, (3, 17))
    target[0, ::3] = -100
    chosen = OPTIONS[options](53)
    inputs = [t for t in (hidden, weight, bias) if t is not None]
    logits = F.linear(hidden, weight, bias).transpose(1, 2)
    whole = F.cross_entropy(logits, target, reduction=reduction, **chosen)  # type: ignore[arg-type]

    if "weight" in chosen:
        chosen["class_weight"] = chosen.pop("weight")
    chunked = linear_cross_entropy(
        hidden,
        weight,
        target,
        bias=bias,
        reduction=reduction,
        chunk_bytes=3_000,
        **chosen,  # type: ignore[arg-type]
    )

    up = torch.rand_like(whole)
    torch.testing.assert_close(chunked, whole, rtol=1e-12, atol=1e-12)
    for a, b in zip(
        torch.autograd.grad(chunked, inputs, up),
        torch.autograd.grad(whole, inputs, up),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("tokens", [5, 40])
def test_gradients_are_the_slopes_of_the_loss(tokens: int, smoothing: float) -> None:
    """torch.autograd.gradcheck in fp64, in both orders of the loops."""
    hidden = torch.randn(tokens, 3, dtype=FP64, requires_grad=True)
    weight = torch.randn(20, 3, dtype=FP64, requires_grad=True)
    bias = torch.randn(20, dtype=FP64, requires_grad=True)
    target = torch.randint(0, 20, (tokens,))
    target[2] = -100

    assert torch.autograd.gradcheck(
        lambda h, w, b: linear_cross_entropy(
            h, w, target, bias=b, label_smoothing=smoothing, chunk_bytes=1_000
        ),
        (hidden, weight, bias),
    )
