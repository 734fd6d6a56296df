"""Float formats against torch's own finfo, and against their definitions."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from narrowcast.errors import UnknownName
from narrowcast.formats import FORMATS, float_format

TORCH = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "e5m2": torch.float8_e5m2,
    "e4m3": torch.float8_e4m3fn,
}


@pytest.mark.parametrize("name", TORCH)
def test_limits_equal_torch_finfo(name: str) -> None:
    """Maximum, eps and smallest numbers follow from the bits alone and equal torch's."""
    info, known = torch.finfo(TORCH[name]), FORMATS[name]

    assert (known.max, known.eps, known.tiny) == (info.max, info.eps, info.tiny)
    assert known.smallest_subnormal == info.smallest_normal * info.eps
    assert known.storage_bytes == torch.empty(0, dtype=TORCH[name]).element_size()


@given(st.floats(allow_nan=False, allow_infinity=False, width=32))
def test_fp32_ulp_is_the_distance_to_the_next_number(x: float) -> None:
    """ulp(x) is the gap above |x|, at subnormals too; the largest number has none above."""
    x = abs(x)
    if x == FORMATS["fp32"].max:
        return
    above = torch.nextafter(torch.tensor(x), torch.tensor(math.inf)).item()

    assert FORMATS["fp32"].ulp(x) == above - x


def test_ulp_of_a_non_number_is_refused() -> None:
    """There is no spacing at infinity."""
    with pytest.raises(ValueError, match="undefined"):
        FORMATS["fp32"].ulp(math.inf)


def test_an_unknown_format_names_the_nearest() -> None:
    """The hint says what was probably meant."""
    with pytest.raises(UnknownName, match="did you mean 'bf16'"):
        float_format("bf61")
