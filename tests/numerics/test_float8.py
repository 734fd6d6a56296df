"""Facts about emulated fp8 products: each number, each product, each gradient, against slow ones.

The oracle knows the 256 values of a format by their bits, rounds by comparing with all of them, and
multiplies in fp64.
"""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from torch import Tensor, nn

from narrowcast.policy import POLICIES
from narrowcast.precision.cast import forward_context
from narrowcast.precision.float8 import _to_fp8, convert_linears, emulated_product
from narrowcast.ranges.histogram import measure
from narrowcast.ranges.what_if import would_underflow

FORMATS = {"e4m3": (torch.float8_e4m3fn, 448.0), "e5m2": (torch.float8_e5m2, 57344.0)}
EMULATED = POLICIES["fp8-emulated"]
FP32_HALF_ULP = 2.0**-24
BF16_HALF_ULP = 2.0**-8


def values(name: str) -> Tensor:
    """Return every finite value of a format, ascending, in fp64."""
    bits = torch.arange(256, dtype=torch.uint8).view(FORMATS[name][0]).to(torch.float64)
    return bits[bits.isfinite()].unique()


def rounded(x: Tensor, name: str) -> Tensor:
    """Return what fp8 makes of a tensor, in fp64: one scale, then the nearest of all values."""
    x = x.to(torch.float64)
    scale = (FORMATS[name][1] / x.abs().max().clamp(min=1e-12)).to(torch.float32)
    scaled = (x.to(torch.float32) * scale).to(torch.float64)
    table = values(name)
    nearest = table[(scaled.reshape(-1, 1) - table).abs().argmin(dim=1)]
    return nearest.reshape(x.shape) / scale.to(torch.float64)


def is_tie(x: Tensor, name: str) -> Tensor:
    """Whether a number lies in the middle between two values, to which the oracle is blind."""
    x = x.to(torch.float64)
    scale = (FORMATS[name][1] / x.abs().max().clamp(min=1e-12)).to(torch.float32)
    scaled = (x.to(torch.float32) * scale).to(torch.float64)
    distance = (scaled.reshape(-1, 1) - values(name)).abs().sort(dim=1).values
    return (distance[:, 0] == distance[:, 1]).reshape(x.shape)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1,), (15,), (16,), (17,), (3, 5), (2, 3, 16)])
@pytest.mark.parametrize("size", [1e-30, 1e-6, 1.0, 3e4])
def test_a_number_becomes_the_nearest_of_the_format(
    name: str, dtype: torch.dtype, shape: tuple[int, ...], size: float
) -> None:
    """The largest magnitude lands on the format's largest value, all others on the nearest one."""
    x = (torch.randn(shape) * size).to(dtype)

    codes, scale = _to_fp8(x, name)

    assert codes.dtype == FORMATS[name][0]
    assert codes.shape == x.shape
    assert scale.dtype == torch.float32
    assert scale.shape == ()
    back = codes.to(torch.float64) / scale.to(torch.float64)
    settled = ~is_tie(x, name)
    assert torch.equal(back[settled], rounded(x, name)[settled])


@pytest.mark.parametrize("name", FORMATS)
def test_a_tie_goes_to_the_even_neighbour(name: str) -> None:
    """As IEEE rounds: the code with a last bit of 0."""
    table = values(name)
    above = table[table >= table.max() / 4]  # neighbours whose middle fp32 holds, scale 1
    middles = torch.cat([(above[:-1] + above[1:]) / 2, above[-1:]])

    codes, scale = _to_fp8(middles.float(), name)

    assert scale.item() == 1.0
    assert (codes[:-1].view(torch.uint8) % 2 == 0).all()


@pytest.mark.parametrize("name", FORMATS)
def test_zeros_stay_zeros(name: str) -> None:
    """A tensor without a magnitude has a scale all the same."""
    codes, scale = _to_fp8(torch.zeros(4, 4), name)

    assert (codes.float() == 0).all()
    assert scale.isfinite()


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_does_not_become_finite(name: str, bad: float) -> None:
    """An overflow is there to be found after the product, as it was before."""
    x = torch.ones(16, 16)
    x[3, 4] = bad

    product = emulated_product(x, name, torch.ones(16, 16), name)

    assert not product[3].isfinite().any()


def laid_out(x: Tensor, layout: str) -> Tensor:
    """Return the same matrix in another memory layout."""
    if layout == "transposed":
        return x.t().contiguous().t()
    if layout == "strided":
        return torch.stack([x, x], dim=-1)[..., 0]
    return x


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "strided"])
@pytest.mark.parametrize("sizes", [(1, 16, 16), (15, 16, 32), (16, 48, 16), (17, 32, 64)])
@pytest.mark.parametrize("names", [("e4m3", "e4m3"), ("e5m2", "e4m3")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_product_is_that_of_the_rounded_factors(
    dtype: torch.dtype, names: tuple[str, str], sizes: tuple[int, int, int], layout: str
) -> None:
    """Two divisions and K additions in fp32 are all that it differs by from the one in fp64."""
    rows, inner, columns = sizes
    a, b = torch.randn(rows, inner, dtype=dtype), torch.randn(inner, columns, dtype=dtype)
    a, b = laid_out(a, layout), laid_out(b, layout)

    product = emulated_product(a, names[0], b, names[1])

    assert product.dtype == torch.float32
    assert product.shape == (rows, columns)
    exact_a, exact_b = a.double(), b.double()
    scales = [_to_fp8(x, name) for x, name in ((a, names[0]), (b, names[1]))]
    exact_a, exact_b = (codes.double() / scale.double() for codes, scale in scales)
    bound = (inner + 3) * FP32_HALF_ULP * (exact_a.abs() @ exact_b.abs())
    assert ((product - exact_a @ exact_b).abs() <= bound).all()


def within(result: Tensor, a: Tensor, b: Tensor) -> bool:
    """Whether a bf16 result is the product of two fp64 factors, summed in fp32 and rounded once."""
    exact, magnitudes = a @ b, a.abs() @ b.abs()
    sums = (a.shape[1] + 3) * FP32_HALF_ULP * magnitudes
    bound = BF16_HALF_ULP * exact.abs() + (1 + BF16_HALF_ULP) * sums
    return bool(((result.double() - exact).abs() <= bound).all())


def decoded(x: Tensor, name: str) -> Tensor:
    codes, scale = _to_fp8(x, name)
    return codes.double() / scale.double()


NEEDS_TORCHAO = pytest.mark.skipif(
    find_spec("torchao") is None, reason="needs torchao (pip install narrowcast[fp8])"
)


@pytest.mark.parametrize("policy", ["fp8-emulated", pytest.param("fp8", marks=NEEDS_TORCHAO)])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1,), (15,), (16,), (17,), (3, 5), (2, 1, 16)])
def test_a_layer_and_its_gradients_are_those_of_the_oracle(
    shape: tuple[int, ...], weight_dtype: torch.dtype, policy: str
) -> None:
    """Output, input gradient and weight gradient: three products of factors rounded to fp8.

    Under fp8 it is torchao's layer on torch._scaled_mm, which torch has on CPUs too; its rows are
    filled up to a multiple of 16, and the result shows nothing of it.
    """
    layer = nn.Linear(32, 48, bias=False).to(weight_dtype)
    convert_linears(layer, POLICIES[policy])
    x = torch.randn(*shape, 32).to(torch.bfloat16).requires_grad_()
    with forward_context(EMULATED, "cpu"):
        output = layer(x)
    gradient = torch.randn(output.shape).to(torch.bfloat16)
    output.backward(gradient)

    assert output.dtype == torch.bfloat16
    assert output.shape == (*shape, 48)
    assert x.grad is not None
    assert layer.weight.grad is not None
    assert x.grad.dtype == torch.bfloat16
    assert layer.weight.grad.dtype == weight_dtype
    rows, w = decoded(x.detach().reshape(-1, 32), "e4m3"), decoded(layer.weight.detach(), "e4m3")
    g = decoded(gradient.reshape(-1, 48), "e5m2")
    assert within(output.reshape(-1, 48), rows, w.t())
    assert within(x.grad.reshape(-1, 32), g, w)
    assert within(layer.weight.grad, g.t(), rows)


def test_rounding_to_fp8_is_seen_in_the_result() -> None:
    """The layer does not compute in bf16 under another name."""
    layer, x = nn.Linear(32, 48), torch.randn(16, 32)
    convert_linears(layer, EMULATED)
    with forward_context(EMULATED, "cpu"):
        fp8, bf16 = layer(x), torch.nn.functional.linear(x, layer.weight, layer.bias)

    assert not torch.equal(fp8, bf16)


@NEEDS_TORCHAO
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1,), (16,), (17,), (3, 5)])
def test_the_emulation_has_the_bits_of_torchaos(
    shape: tuple[int, ...], weight_dtype: torch.dtype
) -> None:
    """What is said of the emulated precision is said of the recipe that the hardware gets."""
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    layer = nn.Linear(32, 48).to(weight_dtype)
    theirs = convert_to_float8_training(layer, config=Float8LinearConfig(emulate=True))
    inputs = torch.randn(*shape, 32).to(torch.bfloat16)
    gradient = torch.randn(*shape, 48).to(torch.bfloat16)
    results = []
    for module in (theirs, layer):
        if module is layer:
            convert_linears(layer, EMULATED)
        x = inputs.clone().requires_grad_()
        layer.zero_grad()
        with forward_context(EMULATED, "cpu"):
            output = module(x)
        output.backward(gradient)
        assert layer.bias is not None
        results.append((output, x.grad, layer.weight.grad, layer.bias.grad))

    for their, our in zip(*results, strict=True):
        assert their is not None
        assert our is not None
        assert torch.equal(their, our)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("exponent", [-20, 0, 20])
def test_ranges_say_beforehand_what_becomes_zero(name: str, exponent: int) -> None:
    """A histogram and the scale that the largest magnitude gives: the share that fp8 flushes.

    Exact here, where the scale is a power of two, so that the limit lies between two bins.
    """
    largest = FORMATS[name][1] * 2.0**exponent
    x = torch.randn(10_000) * 10.0 ** (torch.rand(10_000) * 12 - 12) * largest / 100
    x = torch.cat([x.clamp(-largest, largest), torch.tensor([largest])])
    values = measure(x)

    codes, scale = _to_fp8(x, name)

    flushed = ((codes.float() == 0) & (x != 0)).sum() / (x != 0).sum()
    assert scale.item() == FORMATS[name][1] / values.amax
    assert flushed > 0
    assert would_underflow(values, name, scale.item()) == pytest.approx(flushed.item(), rel=1e-6)
