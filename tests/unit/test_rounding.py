"""Splitting fp32 numbers and joining them again, and the noise of unbiased rounding."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from narrowcast.rounding import (
    NOISE_TILE,
    join8,
    join16,
    mix,
    noise16,
    split8,
    split16,
    split_stochastic,
    stream_key,
    tensor_key,
)

CPU = torch.device("cpu")


def patterns() -> Tensor:
    """Every sign and exponent, with the mantissas at which rounding could go wrong.

    For each of the 2^9 upper parts: all 2^7 mantissas of bf16, each with remainders at and beside
    zero, the tie at 0x8000, the ties of 24 bits, and the ends.
    """
    upper = torch.arange(1 << 16, dtype=torch.int64) << 16
    below = [0, 1, 0x7F, 0x80, 0x81, 0x7F7F, 0x7F80, 0x7FFF]
    above = [0x8000, 0x8001, 0x807F, 0x8080, 0xFF00, 0xFF7F, 0xFF80, 0xFFFF]
    low = torch.tensor([*below, *above])
    words = (upper[:, None] + low).flatten()
    return (words - ((words >> 31) << 32)).to(torch.int32).view(torch.float32)


def holders(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x, dtype=torch.bfloat16), torch.empty_like(x, dtype=dtype)


def bits(x: Tensor) -> Tensor:
    return x.view(torch.int32)


def test_split16_gives_every_number_back_bit_for_bit() -> None:
    """Every exponent, every tie, subnormals, signed zeros and infinities; NaN stays NaN."""
    x = patterns()
    weight, remainder = holders(x, torch.int16)
    split16(x, weight, remainder)
    back = join16(weight, remainder)
    is_nan = x.isnan()

    assert back.dtype is torch.float32
    assert torch.equal(bits(back)[~is_nan], bits(x)[~is_nan])
    assert back[is_nan].isnan().all()
    assert weight[is_nan].isnan().all()


def test_the_weight_of_split16_is_the_nearest_bf16_number() -> None:
    """As torch rounds, but for exact ties, which go away from zero and not to even."""
    x = patterns()
    x = x[~x.isnan()]
    weight, remainder = holders(x, torch.int16)
    split16(x, weight, remainder)
    is_tie = (bits(x) & 0xFFFF) == 0x8000

    assert torch.equal(weight[~is_tie], x[~is_tie].to(torch.bfloat16))
    assert torch.equal(
        weight[is_tie].view(torch.int16).int(),
        ((bits(x)[is_tie] >> 16) + 1).to(torch.int16).int(),
    )


def test_beyond_bf16_the_weight_is_infinite_and_the_master_is_not() -> None:
    """3.4e38 rounds to infinity in bf16, as IEEE 754 has it; the remainder still knows it."""
    x = torch.tensor([3.4e38, -3.4e38, torch.finfo(torch.float32).max])
    weight, remainder = holders(x, torch.int16)
    split16(x, weight, remainder)

    assert weight.isinf().all()
    assert torch.equal(join16(weight, remainder), x)


@pytest.mark.parametrize("word", [0x7FFFFFFF, -1, 0x7FC00000, -0x400000, 0x7F800001, 0x7F80FFFF])
@pytest.mark.parametrize("store", ["split16", "split8", "stochastic"])
def test_no_nan_pattern_turns_into_a_number(word: int, store: str) -> None:
    """CUDA's own NaN, 0x7fffffff, would carry into the sign; it stays NaN in all stores."""
    x = torch.tensor([word], dtype=torch.int32).view(torch.float32)
    weight, remainder = holders(x, torch.int16 if store == "split16" else torch.int8)
    noise = torch.full((1,), 0xFFFF, dtype=torch.int32)
    if store == "split16":
        split16(x, weight, remainder)
        joined = join16(weight, remainder)
    elif store == "split8":
        split8(x, weight, remainder, noise)
        joined = join8(weight, remainder)
    else:
        split_stochastic(x, weight, noise)
        joined = weight.float()

    assert weight.isnan().all()
    assert joined.isnan().all()


def test_split8_rounds_to_24_bits() -> None:
    """The joined number differs by at most half a unit of 24 bits, and not at all from 24 bits."""
    x = patterns()
    x = x[x.isfinite() & (x.abs() < 3.4e38)]
    weight, remainder = holders(x, torch.int8)
    split8(x, weight, remainder)
    back = join8(weight, remainder)
    again, remainder2 = holders(x, torch.int8)
    split8(back, again, remainder2)

    assert ((bits(back) & 0xFF) == 0).all()
    assert (bits(back).long() - bits(x).long()).abs().max() <= 0x80
    assert torch.equal(bits(join8(again, remainder2)), bits(back))


def test_split8_keeps_zeros_and_infinities() -> None:
    """Signs of zeros stay; infinities stay whatever the noise."""
    x = torch.tensor([0.0, -0.0, math.inf, -math.inf])
    weight, remainder = holders(x, torch.int8)
    split8(x, weight, remainder, torch.zeros(4, dtype=torch.int32))

    assert torch.equal(bits(join8(weight, remainder)), bits(x))

    noise = torch.full((2,), 0xFFFF, dtype=torch.int32)
    split8(x[2:], weight[2:], remainder[2:], noise)

    assert torch.equal(join8(weight[2:], remainder[2:]), x[2:])


@pytest.mark.parametrize("value", [1.0 + 2**-9, -3.3e-7, 1e-40, 123.456, -(2.0**-133) * 1.37])
def test_stochastic_rounding_has_the_right_expectation(value: float) -> None:
    """Over all 2^16 noises, exactly: the mean of the rounded numbers is the number."""
    noise = torch.arange(1 << 16, dtype=torch.int32)
    x = torch.full((1 << 16,), value)
    weight = torch.empty_like(x, dtype=torch.bfloat16)
    split_stochastic(x, weight, noise)
    # Sums of 2^16 numbers of 8 bits within two binades are exact in fp64.
    mean = weight.double().sum() / (1 << 16)

    assert mean.item() == x[0].double().item()


def test_stochastic_rounding_of_24_bits_has_the_right_expectation() -> None:
    """The noise's upper 8 bits decide over the lower 8 bits of the number."""
    noise = torch.arange(1 << 16, dtype=torch.int32)
    x = torch.full((1 << 16,), 1.2345678)
    weight, remainder = holders(x, torch.int8)
    split8(x, weight, remainder, noise)

    assert join8(weight, remainder).double().mean().item() == x[0].double().item()


@pytest.mark.parametrize("shape", [(0,), (1,), (7,), (3, 5), (2, 3, 4)])
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_splitting_keeps_shape_and_dtype(shape: tuple[int, ...], layout: str) -> None:
    """Any shape and stride; the parts and the joined tensor have the dtypes of the store."""
    x = torch.randn(shape)
    x = x if layout == "contiguous" else x.transpose(0, -1)
    weight, remainder = holders(x, torch.int16)
    split16(x, weight, remainder)
    joined = join16(weight, remainder)

    assert (joined.dtype, joined.shape, joined.device) == (torch.float32, x.shape, x.device)
    assert torch.equal(joined, x)


def test_mix_is_one_to_one() -> None:
    """No two of 2^16 neighbouring words share a hash, and the hash is the published one's shape."""
    hashed = {mix(word) for word in range(1 << 16)}

    assert len(hashed) == 1 << 16
    assert all(0 <= h < 1 << 32 for h in hashed)


@pytest.mark.parametrize("start", [0, 1, NOISE_TILE - 1, NOISE_TILE, NOISE_TILE + 1])
@pytest.mark.parametrize("count", [0, 1, 100, NOISE_TILE + 3])
def test_noise_does_not_depend_on_where_a_range_begins(start: int, count: int) -> None:
    """An element has its number, in whatever range it is asked for."""
    whole = noise16(17, 0, start + count, CPU)
    part = noise16(17, start, count, CPU)

    assert (part.dtype, part.shape) == (torch.int32, (count,))
    assert torch.equal(part, whole[start:])


def test_the_noise_is_the_hash_that_it_is_said_to_be() -> None:
    """Element i of tile t: the upper half of (mix(i) xor mix(key + t)) times an odd number."""
    key = 0xDEADBEEF
    found = noise16(key, NOISE_TILE + 5, 3, CPU).tolist()
    expected = [((mix(i) ^ mix(key + 1)) * 0x2C1B3C6D & 0xFFFFFFFF) >> 16 for i in (5, 6, 7)]

    assert found == expected


def test_noise_is_uniform_over_elements_and_over_steps() -> None:
    """Chi-square over 256 bins of 2^20 numbers, and of one element over 2^14 steps.

    Each statistic is beyond 377 with probability 1e-6 for uniform numbers (255 degrees of freedom).
    """
    numbers = noise16(tensor_key(1, 2, 3), 0, 1 << 20, CPU)
    steps = torch.tensor(
        [int(noise16(stream_key(tensor_key(1, t, 3), 1), 77, 1, CPU)) for t in range(1 << 14)]
    )
    for found in (numbers, steps):
        counts = torch.bincount(found >> 8, minlength=256).double()
        expected = len(found) / 256
        chi_square = ((counts - expected) ** 2 / expected).sum().item()
        assert chi_square < 377


def test_noises_of_streams_steps_and_tensors_are_unrelated() -> None:
    """Correlations of 2^16 pairs stay within 5 standard errors: fails once in 3 million pairs."""
    keys = [
        tensor_key(0, 1, 0),
        tensor_key(0, 2, 0),
        tensor_key(0, 1, 1),
        tensor_key(1, 1, 0),
        stream_key(tensor_key(0, 1, 0), 1),
        stream_key(tensor_key(0, 1, 0), 2),
    ]
    numbers = torch.stack([noise16(k, 0, NOISE_TILE, CPU).double() for k in keys])
    correlation = torch.corrcoef(numbers) - torch.eye(len(keys), dtype=torch.float64)

    assert correlation.abs().max() < 5 / math.sqrt(NOISE_TILE)
