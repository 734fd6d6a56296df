"""autocast: torch's, called in either of its ways, and an error where it would do nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from narrowcast.dropin.autocast import autocast
from narrowcast.errors import UnknownName, UnsupportedPrecision

WITHOUT_CUDA = pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is present")
HERE = "cuda" if torch.cuda.is_available() else "cpu"


def dtype_inside(context: Any) -> torch.dtype:
    """The dtype in which a matrix product runs, on the device of the context."""
    ones = torch.ones(2, 2, device=context.device)
    with context:
        return (ones @ ones).dtype


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "build",
    [
        lambda dtype: autocast("cpu", dtype),
        lambda dtype: autocast("cpu", dtype, True, True),
        lambda dtype: autocast("cpu", dtype=dtype, cache_enabled=False),
        lambda dtype: autocast(device_type="cpu", dtype=dtype, enabled=True),
        lambda dtype: autocast(enabled=True, device_type="cpu", dtype=dtype),
    ],
)
def test_torchs_signature_is_accepted(
    build: Callable[[torch.dtype], autocast], dtype: torch.dtype
) -> None:
    """Products inside run in the dtype asked for."""
    context = build(dtype)

    assert isinstance(context, torch.autocast)
    assert dtype_inside(context) == dtype


def test_the_deprecated_signature_is_accepted() -> None:
    """`torch.cuda.amp.autocast(enabled, dtype, cache_enabled)`: the device is the one at hand."""
    context = autocast(True, torch.bfloat16, False)
    with context:
        cached = torch.is_autocast_cache_enabled()

    assert (context.device, cached) == (HERE, False)
    assert dtype_inside(context) == torch.bfloat16
    assert dtype_inside(autocast(False)) == torch.float32
    assert dtype_inside(autocast(enabled=False)) == torch.float32


@pytest.mark.parametrize("build", [autocast, lambda: autocast(True), lambda: autocast(HERE)])
def test_without_a_dtype_it_is_the_devices(build: Callable[[], autocast]) -> None:
    """fp16 on CUDA and bf16 on a CPU, as torch sets them."""
    assert dtype_inside(build()) == torch.get_autocast_dtype(HERE)


@pytest.mark.parametrize(
    ("args", "options"),
    [
        (("cpu", None, True, None, 1), {}),
        ((True, None, True, None), {}),
        ((True,), {"enabled": True}),
        (("cpu",), {"device_type": "cpu"}),
        (("cpu",), {"precision": "bf16"}),
    ],
)
def test_a_call_that_torchs_signature_refuses_is_a_type_error(
    args: tuple[Any, ...], options: dict[str, Any]
) -> None:
    """Too many arguments, one given twice, an unknown one."""
    with pytest.raises(TypeError):
        autocast(*args, **options)


def test_a_device_that_is_no_string_is_torchs_error() -> None:
    """Torch's own check comes through."""
    with pytest.raises(ValueError, match="device_type"):
        autocast(torch.device("cpu"))


@WITHOUT_CUDA
@pytest.mark.parametrize("device", ["cuda", "cuda:0", "xpu"])
def test_an_absent_device_is_an_error(device: str) -> None:
    """Torch warns and computes in fp32; a hint says how to mean that, or to get what is there."""
    with pytest.raises(UnsupportedPrecision, match=device) as caught:
        autocast(device)

    assert "cpu" in caught.value.hint
    assert "enabled=False" in caught.value.hint


@pytest.mark.parametrize("device", ["npu", "tpu", "meta"])
def test_a_device_that_autocast_does_not_know_is_an_error(device: str) -> None:
    """The hint lists the valid ones."""
    with pytest.raises(UnknownName, match=device):
        autocast(device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int8])
def test_a_dtype_that_is_not_cast_to_is_an_error(dtype: torch.dtype) -> None:
    """Torch warns and computes in the inputs' dtype."""
    with pytest.raises(UnsupportedPrecision, match=str(dtype)) as caught:
        autocast("cpu", dtype)

    assert "enabled=False" in caught.value.hint


def test_disabled_it_may_name_anything() -> None:
    """An island of fp32 inside autocast, written for another device, stays valid."""
    for context in (
        autocast("cuda", enabled=False),
        autocast("cpu", torch.float32, enabled=False),
    ):
        with context:
            pass

        assert isinstance(context, torch.autocast)


def test_it_nests() -> None:
    """Inside out: each region has its dtype, and the state before it comes back."""
    ones, seen = torch.ones(2, 2), []
    with autocast("cpu", torch.bfloat16):
        with autocast("cpu", enabled=False):
            seen.append((ones @ ones).dtype)
            with autocast("cpu", torch.float16):
                seen.append((ones @ ones).dtype)
        with torch.autocast("cpu", torch.float16):
            seen.append((ones @ ones).dtype)
        seen.append((ones @ ones).dtype)
    seen.append((ones @ ones).dtype)

    assert seen == [torch.float32, torch.float16, torch.float16, torch.bfloat16, torch.float32]


def test_an_error_inside_leaves_autocast_off() -> None:
    """The state is restored when the region raises."""
    with pytest.raises(ZeroDivisionError), autocast("cpu"):
        _ = 1 / 0

    assert not torch.is_autocast_enabled("cpu")


class Decorated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)

    @autocast("cpu", torch.bfloat16)
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """A forward of one's own."""
        return self.linear(x)


def test_it_decorates() -> None:
    """On `forward`, call after call, keeping name and docstring; gradients are fp32."""
    model = Decorated()
    for _ in range(2):
        output = model(torch.ones(1, 2))
        output.sum().backward()

        assert output.dtype == torch.bfloat16
        assert model.linear.weight.grad is not None
        assert model.linear.weight.grad.dtype == torch.float32
        assert not torch.is_autocast_enabled("cpu")
    assert Decorated.forward.__name__ == "forward"
    assert Decorated.forward.__doc__ == "A forward of one's own."


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_numbers_are_torchs_bit_for_bit(dtype: torch.dtype) -> None:
    """Casting itself is not touched: output and gradients equal those under torch.autocast."""
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 4))
    x, results = torch.randn(16, 8), []
    for context in (autocast("cpu", dtype), torch.autocast("cpu", dtype)):
        model.zero_grad()
        with context:
            output = model(x)
            loss = output.float().square().mean()
        loss.backward()
        results.append([output, *(p.grad.clone() for p in model.parameters())])

    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
