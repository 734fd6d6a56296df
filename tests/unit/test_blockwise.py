"""Block-wise codes: bytes, bounds, unbiased rounding, and what happens at the edges."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from narrowcast.blockwise import (
    INT4_SIGNED,
    INT4_UNSIGNED,
    INT8_SIGNED,
    INT8_UNSIGNED,
    BlockCode,
)
from narrowcast.rounding import mix, noise16

CPU = torch.device("cpu")
CODES = [INT8_SIGNED, INT8_UNSIGNED, INT4_SIGNED, INT4_UNSIGNED]
every_code = pytest.mark.parametrize(
    "code", CODES, ids=lambda c: f"int{c.bits}{'' if c.signed else 'u'}"
)


def sample(code: BlockCode, numel: int) -> Tensor:
    """Numbers over many orders of magnitude."""
    x = torch.randn(numel) * torch.logspace(-6, 3, max(numel, 1))[:numel]
    return x if code.signed else x * x


def passed(code: BlockCode, x: Tensor, noise: Tensor | None = None) -> Tensor:
    """Encode and decode."""
    codes, scales = code.zeros(x.numel(), x.device)
    code.encode(x, codes, scales, noise)
    return code.decode(codes, scales, x.numel())


def grid(code: BlockCode) -> Tensor:
    """All magnitudes relative to the scale, in fp64, from the definition."""
    levels = torch.arange(code.top + 1, dtype=torch.float64) / code.top
    return levels**2 if code.signed else levels**4


def obvious(code: BlockCode, x: Tensor) -> Tensor:
    """Encode to nearest and decode, in fp64, by looking at every grid point."""
    out = torch.empty_like(x, dtype=torch.float64)
    points = grid(code)
    for start in range(0, len(x), code.block):
        block = x[start : start + code.block].double()
        scale = block.abs().max().float()
        word = (scale.view(torch.int32) + 0xFFFF) & ~0xFFFF
        scale = word.view(torch.float32).double()
        nearest = (block.abs()[:, None] / scale - points).abs().argmin(1)
        if not code.signed:
            nearest = nearest.clamp(min=1)
        out[start : start + code.block] = points[nearest] * scale * block.sign()
    return out


@every_code
@pytest.mark.parametrize("blocks", [0, 1, 2])
@pytest.mark.parametrize("extra", [-1, 0, 1])
def test_a_code_holds_exactly_the_bytes_it_announces(
    code: BlockCode, blocks: int, extra: int
) -> None:
    """Around every block boundary: bytes, dtype, shape and device of what is made and read."""
    numel = max(blocks * code.block + extra, 0)
    codes, scales = code.zeros(numel, CPU)
    x = sample(code, numel)
    code.encode(x, codes, scales, None)
    back = code.decode(codes, scales, numel)

    assert code.nbytes(numel) == codes.nbytes + scales.nbytes
    assert (back.dtype, back.shape, back.device) == (torch.float32, x.shape, x.device)


def test_bytes_per_element() -> None:
    """The figures that the byte targets rest on."""
    assert INT8_SIGNED.nbytes(1 << 20) / (1 << 20) == 1.0625
    assert INT8_UNSIGNED.nbytes(1 << 20) / (1 << 20) == 1.0625
    assert INT4_SIGNED.nbytes(1 << 20) / (1 << 20) == 0.53125
    assert INT4_UNSIGNED.nbytes(1 << 20) / (1 << 20) == 0.53125


@every_code
@pytest.mark.parametrize("numel", [1, 31, 32, 33, 63, 64, 65, 1000])
def test_nearest_rounding_finds_the_nearest_grid_point(code: BlockCode, numel: int) -> None:
    """Equal to a search over all grid points in fp64.

    Decoding rounds 1/C, its product with the code (2 half-ulps of fp32 together), each square
    (twice the error and one more: 5, then 11 for the fourth power), and the product with the scale:
    12 at most. A number within 1e-5 of a grid step of the middle may go either way; here none does.
    """
    x = sample(code, numel)

    torch.testing.assert_close(
        passed(code, x).double(), obvious(code, x), rtol=12 * 2.0**-24, atol=0.0
    )


@every_code
def test_the_error_is_below_the_announced_gap(code: BlockCode) -> None:
    """Between codes c and c + 1 a number moves by less than the gap; to nearest, half of it."""
    x = sample(code, 64 * 100)
    noise = noise16(mix(5), 0, len(x), CPU)
    points = grid(code)
    for found, share in ((passed(code, x, noise), 1.0), (passed(code, x), 0.5)):
        scale = torch.stack(
            [block.abs().max() for block in x.double().split(code.block)]
        ).repeat_interleave(code.block)
        # The scale in use is at most one bf16 step (2^-7) above the largest magnitude.
        scale = scale * (1 + 2.0**-7)
        low = torch.bucketize(x.double().abs() / scale, points, right=True) - 1
        widest = (points[(low + 2).clamp(max=code.top)] - points[low]) * scale
        error = (found.double() - x.double()).abs()
        is_floored = (~torch.tensor(code.signed)) & (low == 0)
        assert (error <= share * widest + 1e-12)[~is_floored].all()
        assert (error <= widest)[is_floored].all()


def test_relative_gaps() -> None:
    """Half a per cent at the top of int8's second moments, a quarter of an element in int4's."""
    assert INT8_UNSIGNED.relative_gap(254) == pytest.approx(0.0158, abs=1e-4)
    assert INT8_SIGNED.relative_gap(126) == pytest.approx(0.0159, abs=1e-4)
    assert INT4_UNSIGNED.relative_gap(14) == pytest.approx(0.318, abs=1e-3)
    assert INT4_SIGNED.relative_gap(6) == pytest.approx(0.361, abs=1e-3)


@every_code
def test_rounding_to_nearest_again_changes_nothing(code: BlockCode) -> None:
    """What was read can be written back: codes are a fixed point."""
    once = passed(code, sample(code, 1000))

    assert torch.equal(passed(code, once), once)


@every_code
def test_stochastic_rounding_has_the_right_expectation(code: BlockCode) -> None:
    """The mean over 4096 noises is within 6 standard errors of each of 64 numbers.

    A rounding between points at distance d has a standard deviation of at most d / 2. For normal
    means, one of 64 would be outside with probability 1.3e-7. Second moments below the first grid
    point are held at it, and are left out.
    """
    signs = torch.tensor([1.0, -1.0]).repeat(32) if code.signed else torch.ones(64)
    x = torch.linspace(0.01, 1.0, 64) * signs
    n = 4096
    found = passed(code, x.repeat(n), noise16(mix(7), 0, 64 * n, CPU))
    mean = found.view(n, 64).double().mean(0)
    points = grid(code)
    low = (torch.bucketize(x.double().abs(), points, right=True) - 1).clamp(max=code.top - 1)
    deviation = (points[low + 1] - points[low]) / 2
    is_held = low > 0 if not code.signed else torch.ones(64, dtype=torch.bool)
    error = (mean - x.double()).abs()
    # The probability itself is rounded to 2^-16 of a gap.
    bound = 6 * deviation / math.sqrt(n) + 2 * deviation * 2.0**-16

    assert (error <= bound)[is_held].all()


def test_small_second_moments_never_become_zero() -> None:
    """Beside a number 1e12 times as large, a second moment is held at the smallest code."""
    for code in (INT8_UNSIGNED, INT4_UNSIGNED):
        x = torch.full((code.block,), 1e-12)
        x[0], x[1] = 1.0, 0.0
        found = passed(code, x, torch.full((code.block,), 0xFFFF, dtype=torch.int32))

        assert (found[2:] > 0).all()
        assert found[1] == 0


@pytest.mark.parametrize(
    ("signed", "unsigned"),
    [(INT8_SIGNED, INT8_UNSIGNED), (INT4_SIGNED, INT4_UNSIGNED)],
    ids=["int8", "int4"],
)
def test_a_first_moment_over_the_root_of_a_second_stays_bounded(
    signed: BlockCode, unsigned: BlockCode
) -> None:
    """With all m rounded up and all v down: 16 times what it was, or 4.6 times that of the scales.

    From code q >= 2 rounding up takes m up by less than (q / (q - 1))^2 <= 4, and rounding down
    takes the root down by less than ((c + 1) / c)^2 <= 4. Below, m is at most one smallest step.
    """
    magnitudes = torch.logspace(-8, 0, 500, dtype=torch.float64).float()
    m, root = (t.flatten() for t in torch.meshgrid(magnitudes, magnitudes, indexing="ij"))
    v = root * root
    m[:: signed.block] = v[:: unsigned.block] = 1.0  # every block has scale 1
    up = torch.zeros(m.numel(), dtype=torch.int32)
    stored = passed(signed, m, up) / passed(unsigned, v, up + 65535).sqrt()
    least = (unsigned.top / signed.top) ** 2

    assert 4.0 < least < 4.6
    # A few roundings of fp32, in encoding and in the quotient, relative to a bound that is not met.
    bound = torch.maximum(16 * m / v.sqrt(), torch.tensor(least))
    assert (stored <= bound * (1 + 2.0**-20)).all()
    assert (stored / bound).max() > 0.9


@every_code
@pytest.mark.parametrize("value", [0.0, 1e-40, 1e-45, 3.4e38, 1.0])
def test_extreme_blocks(code: BlockCode, value: float) -> None:
    """Zeros stay zeros; subnormal blocks and blocks beyond bf16's range keep their magnitude."""
    x = torch.full((code.block,), value)
    found = passed(code, x)

    # The scale is a bf16 number: subnormal ones have few bits, and the top is 3.39e38.
    torch.testing.assert_close(found, x, rtol=0.02, atol=2.0**-133)


@every_code
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_number_that_is_not_finite_poisons_its_block_and_no_other(
    code: BlockCode, bad: float
) -> None:
    """Nothing turns into an innocent number."""
    x = torch.ones(2 * code.block)
    x[3] = bad
    found = passed(code, x, noise16(3, 0, len(x), CPU))

    assert not found[3].isfinite()
    assert found[code.block :].isfinite().all()


def test_the_sign_of_a_nan_pattern_does_not_matter() -> None:
    """CUDA's own NaN, 0x7fffffff, does not carry into a scale of zero."""
    x = torch.zeros(32, dtype=torch.int32)
    x[0] = 0x7FFFFFFF

    assert passed(INT8_SIGNED, x.view(torch.float32)).isnan().all()


def test_a_decaying_average_decays() -> None:
    """v <- 0.999 v falls as it should under stochastic rounding, and sticks under nearest.

    After 1000 steps from 1 the mean of 4096 elements is exp(-1), up to noise: each element's
    variance is below the gap times what it moved, 0.016, so the mean is within 0.01 at 5 sigma.
    """
    values = {}
    for name in ("stochastic", "nearest"):
        x = torch.rand(4096) * 0.5 + 0.25
        x[::32] = 1.0  # keeps the scales, as an element that goes on to get gradients does
        first = x.clone()
        for step in range(1000):
            x = x * 0.999
            x[::32] = 1.0
            noise = noise16(mix(step), 0, 4096, CPU) if name == "stochastic" else None
            x = passed(INT8_UNSIGNED, x, noise)
        keep = torch.ones(4096, dtype=torch.bool)
        keep[::32] = False
        values[name] = (x[keep] / first[keep]).mean().item()

    assert values["stochastic"] == pytest.approx(math.exp(-1), abs=0.01)
    assert values["nearest"] > 0.9
