"""What a format would make of values, from their histogram, against rounding every one of them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from narrowcast.errors import UnknownName, UsageError
from narrowcast.formats import float_format
from narrowcast.precision.cast import torch_dtype
from narrowcast.ranges.histogram import measure
from narrowcast.ranges.what_if import (
    merged,
    scaled,
    would_be_subnormal,
    would_overflow,
    would_underflow,
)
from narrowcast.records.ranges import TensorRange

TARGETS = ("fp16", "bf16", "e4m3", "e5m2", "fp32")
POWERS = (-126, -40, -24, -9, -1, 0, 1, 8, 16, 31, 100)


def rounded(magnitudes: np.ndarray, name: str) -> np.ndarray:
    """Round positive fp64 numbers to a format, to nearest and ties to even; beyond it, infinity."""
    form = float_format(name)
    exponent = np.maximum(np.frexp(magnitudes)[1] - 1, form.min_exponent)
    step = np.ldexp(1.0, exponent - form.mantissa_bits)
    nearest = np.rint(magnitudes / step) * step
    return np.where(nearest > form.max, np.inf, nearest)


def shares(magnitudes: np.ndarray, name: str, scale: float) -> tuple[float, float, float]:
    """Return the shares that become zero, subnormal and infinite; all must be above 0."""
    form = float_format(name)
    found = rounded(magnitudes * scale, name)
    subnormal = (found > 0) & (found < form.tiny)
    return (found == 0).mean(), subnormal.mean(), np.isinf(found).mean()


def what_if(values: TensorRange, name: str, scale: float) -> tuple[float, float, float]:
    return (
        would_underflow(values, name, scale),
        would_be_subnormal(values, name, scale),
        would_overflow(values, name, scale),
    )


def magnitudes_of(tensor: Tensor) -> np.ndarray:
    numbers = np.abs(tensor.double().numpy())
    return numbers[(numbers > 0) & np.isfinite(numbers)]


def every_number(dtype: torch.dtype) -> Tensor:
    return torch.arange(1 << 15).to(torch.int16).view(dtype)


@pytest.mark.parametrize("target", ["fp16", "bf16", "e4m3", "e5m2"])
@pytest.mark.parametrize("source", ["fp16", "bf16"])
def test_the_oracle_rounds_as_torch_casts(source: str, target: str) -> None:
    """The slow rounding below every other test here is the rounding of the formats themselves."""
    numbers = every_number(torch_dtype(source))
    numbers = numbers[torch.isfinite(numbers.float()) & (numbers != 0)]

    cast = numbers.float().to(torch_dtype(target)).double().numpy()
    found = rounded(numbers.double().numpy(), target)
    # Without an infinity, torch makes NaN of it, and from 2.13 on (or before) the largest number.
    expected = cast if target != "e4m3" else np.where(np.isinf(found), np.inf, cast)
    assert np.array_equal(found, expected)
    if target == "e4m3":
        beyond = cast[np.isinf(found)]
        assert (np.isnan(beyond) | (beyond == 448)).all()


@pytest.mark.parametrize("power", POWERS)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("source", ["fp16", "bf16"])
def test_shares_over_all_numbers_of_a_format_are_exact(
    source: str, target: str, power: int
) -> None:
    """Every fp16 and bf16 number, at scales from 2^-126 to 2^100, ties included."""
    numbers = every_number(torch_dtype(source))

    found = what_if(measure(numbers), target, 2.0**power)
    expected = shares(magnitudes_of(numbers), target, 2.0**power)
    # Counts are whole numbers below 2^15, summed in fp64: only the division rounds.
    assert found == pytest.approx(expected, rel=2.0**-50, abs=2.0**-50)


@pytest.mark.parametrize("target", ["fp16", "bf16", "e4m3", "e5m2"])
@given(
    spread=st.floats(0.1, 40),
    center=st.floats(-60, 60),
    scale=st.floats(1e-6, 1e6),
    seed=st.integers(0, 1000),
)
def test_only_the_elements_in_the_limits_own_power_of_two_are_estimated(
    target: str, spread: float, center: float, scale: float, seed: int
) -> None:
    """fp32 values of any range at any scale: the error is below the count in that one bin."""
    random = np.random.default_rng(seed)
    exponents = random.normal(center, spread, 500).clip(-149, 127)  # what fp32 has
    tensor = torch.from_numpy(np.exp2(exponents).astype(np.float32))
    magnitudes = magnitudes_of(tensor)

    found = what_if(measure(tensor), target, scale)
    expected = shares(magnitudes, target, scale)
    form = float_format(target)
    limits = (
        form.smallest_subnormal / 2,
        form.tiny - form.smallest_subnormal / 2,
        form.max + form.ulp(form.max) / 2,
    )
    exponents = np.frexp(magnitudes)[1]
    inside = [float((exponents == np.frexp(limit / scale)[1]).mean()) for limit in limits]
    for got, true, allowed in zip(
        found, expected, (inside[0], inside[0] + inside[1], inside[2]), strict=True
    ):
        assert abs(got - true) <= allowed + 2.0**-40


@pytest.mark.parametrize(
    ("value", "target", "expected"),
    [
        (65504.0, "fp16", (0, 0, 0)),
        (65519.99, "fp16", (0, 0, 0)),
        (65520.0, "fp16", (0, 0, 1)),
        (2.0**-25, "fp16", (1, 0, 0)),
        (2.0**-25 * (1 + 2.0**-20), "fp16", (0, 1, 0)),
        (2.0**-14, "fp16", (0, 0, 0)),
        (2.0**-14 - 2.0**-25, "fp16", (0, 0, 0)),  # a tie that goes up to the normal number
        (2.0**-14 - 1.5 * 2.0**-25, "fp16", (0, 1, 0)),
        (464.0, "e4m3", (0, 0, 0)),
        (464.1, "e4m3", (0, 0, 1)),
        (1e-8, "fp16", (1, 0, 0)),
        (1e-8, "bf16", (0, 0, 0)),
        (3.4e38, "bf16", (0, 0, 1)),
    ],
)
def test_one_value_is_decided_by_the_limit_itself(
    value: float, target: str, expected: tuple[int, int, int]
) -> None:
    """Where the extremes settle a limit, nothing is estimated: ties and neighbours of ties."""
    assert what_if(measure(torch.tensor([value, -value])), target, 1.0) == expected


def test_overflow_is_zero_exactly_when_nothing_overflows() -> None:
    """The largest of a thousand elements decides, though most share its power of two."""
    crowd = torch.full((1000,), 65000.0)

    assert would_overflow(measure(crowd), "fp16") == 0
    crowd[3] = 65530.0
    assert would_overflow(measure(crowd), "fp16") >= 1 / 1000


def test_zeros_and_what_is_not_finite_are_in_no_share() -> None:
    """Shares are of the finite elements that are not 0; without any they are 0."""
    tensor = torch.tensor([0.0, -0.0, torch.inf, torch.nan, 1e-9, 1.0])

    assert would_underflow(measure(tensor), "fp16") == 0.5
    assert what_if(measure(torch.zeros(3)), "fp16", 1.0) == (0, 0, 0)
    assert what_if(measure(torch.tensor([])), "fp16", 1.0) == (0, 0, 0)
    assert what_if(measure(torch.tensor([torch.inf])), "e5m2", 1.0) == (0, 0, 0)


@pytest.mark.parametrize("scale", [0.0, -1.0, float("inf"), float("nan")])
def test_a_scale_that_is_none_is_refused(scale: float) -> None:
    """A loss scale is positive and finite."""
    for ask in (would_underflow, would_be_subnormal, would_overflow):
        with pytest.raises(UsageError, match="a scale of"):
            ask(measure(torch.ones(1)), "fp16", scale)
    with pytest.raises(UnknownName, match="fp17"):
        would_underflow(measure(torch.ones(1)), "fp17")


def test_ranges_counted_apart_give_what_is_counted_together() -> None:
    """Merged ranges equal the range of the joined tensors, in all but the shape."""
    parts = [torch.randn(n) * 10.0**k for n, k in ((7, -20), (0, 0), (100, 3), (1, 0))]
    parts.append(torch.tensor([0.0, torch.nan, -torch.inf]))

    together, apart = measure(torch.cat(parts)), merged([measure(part) for part in parts])
    assert apart.rms == pytest.approx(together.rms, rel=2.0**-45)
    assert replace(apart, rms=0) == replace(together, rms=0)
    assert merged([together]) is together
    with pytest.raises(UsageError, match="no ranges"):
        merged([])


def test_the_widest_format_stands_for_ranges_of_several() -> None:
    """fp16 and bf16 values beside fp32 ones count as fp32, and beside float64 as that."""
    some = [measure(torch.ones(2, dtype=d)) for d in (torch.float16, torch.float32)]

    assert merged(some).dtype == "fp32"
    assert merged([*some, measure(torch.ones(1, dtype=torch.float64))]).dtype == "float64"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_unscaling_a_range_is_unscaling_the_tensor(dtype: torch.dtype) -> None:
    """A power of two moves exponents and nothing else."""
    gradient = torch.randn(100).to(dtype) * 65536
    true = gradient / 65536

    assert scaled(measure(gradient), 2.0**-16) == measure(true)
    assert scaled(measure(torch.zeros(3)), 4.0) == measure(torch.zeros(3))
    with pytest.raises(UsageError, match="power of two"):
        scaled(measure(true), 1000.0)


def test_a_scaled_fp16_gradient_still_answers_exactly() -> None:
    """Numbers below fp16's own, as unscaled gradients are, at the scale that lifts them."""
    numbers = every_number(torch.float16)
    unscaled = scaled(measure(numbers), 2.0**-16)

    expected = shares(magnitudes_of(numbers) * 2.0**-16, "fp16", 2.0**10)
    assert what_if(unscaled, "fp16", 2.0**10) == pytest.approx(expected, abs=2.0**-9)
