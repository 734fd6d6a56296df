"""What FSDP2 cannot cut is refused before the first step."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from narrowcast.errors import UsageError
from narrowcast.parallel.cutting import require_shardable


class _Held(nn.Module):
    def __init__(self, values: torch.Tensor) -> None:
        super().__init__()
        self.held = nn.Parameter(values)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_a_complex_parameter_is_refused_by_name(dtype: torch.dtype) -> None:
    """And the message says what to do."""
    with pytest.raises(UsageError, match=r"parameter held of shape \(2, 3\) is torch.complex") as e:
        require_shardable(_Held(torch.zeros(2, 3, dtype=dtype)))

    assert "torch.view_as_complex" in (e.value.hint or "")


def test_a_parameter_that_is_not_contiguous_is_refused_by_name() -> None:
    """Rows of memory are cut."""
    with pytest.raises(UsageError, match=r"parameter held of shape \(3, 2\) is not contiguous"):
        require_shardable(_Held(torch.zeros(2, 3).t()))


def test_real_contiguous_parameters_are_taken() -> None:
    """Of every format and number of dimensions."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for shape in ((), (0, 2), (3,), (2, 3)):
            require_shardable(_Held(torch.zeros(shape, dtype=dtype)))
