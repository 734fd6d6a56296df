"""Which attention kernel is chosen for which call on which GPU, and what it takes besides."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel

from narrowcast.errors import UnknownName
from narrowcast.prediction.cuda_attention import (
    Attention,
    choose_backend,
    efficient_backward_scratch,
    flash_backward_scratch,
    flash_splits,
)
from narrowcast.prediction.gpus import GPUS, gpu_named

NEW, OLD = 91900, 91002
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def call(
    *,
    shape: tuple[int, ...] = (2, 4, 64, 64),
    key_shape: tuple[int, ...] | None = None,
    dtype: torch.dtype = BF16,
    mask: bool = False,
    **more: Any,
) -> Attention:
    with FakeTensorMode():
        query = torch.empty(shape, dtype=dtype, requires_grad=True)
        key, value = (torch.empty(key_shape or shape, dtype=dtype) for _ in range(2))
        bias = torch.empty(shape[-2], key.shape[-2], dtype=dtype) if mask else None
    return Attention(query=query, key=key, value=value, mask=bias, **more)


@pytest.mark.parametrize(
    ("gpu", "options", "cudnn", "backend"),
    [
        ("a100-80gb", {}, NEW, "flash"),
        ("a100-80gb", {"dtype": FP32}, NEW, "efficient"),
        ("a100-80gb", {"mask": True}, NEW, "efficient"),
        ("a100-80gb", {"dropout": 0.1, "is_causal": True}, NEW, "flash"),
        ("a100-80gb", {"shape": (2, 4, 64, 257)}, NEW, "math"),
        ("a100-80gb", {"shape": (2, 4, 64, 264)}, NEW, "efficient"),
        ("a100-80gb", {"shape": (2, 4, 64, 62)}, NEW, "flash"),
        ("a100-80gb", {"shape": (2, 4, 64, 62), "mask": True}, NEW, "math"),
        ("a100-80gb", {"shape": (2, 64, 64)}, NEW, "math"),
        ("a100-80gb", {"dtype": torch.float64}, NEW, "math"),
        ("a100-80gb", {"key_shape": (2, 4, 32, 64), "is_causal": True}, NEW, "efficient"),
        ("a100-80gb", {"key_shape": (2, 2, 64, 64), "shares_heads": True}, NEW, "flash"),
        ("a100-80gb", {"key_shape": (2, 2, 64, 64)}, NEW, "math"),
        ("t4", {}, NEW, "math"),
        ("t4", {"dtype": FP16}, NEW, "efficient"),
        ("t4", {"dtype": FP32}, NEW, "efficient"),
        ("t4", {"dtype": FP32, "shape": (2, 2, 32, 1)}, NEW, "efficient"),
        ("rtx4090", {"shape": (2, 4, 64, 208)}, NEW, "efficient"),
        ("rtx4090", {"shape": (2, 4, 64, 256)}, NEW, "flash"),
        ("rtx4090", {"shape": (2, 4, 64, 256), "dropout": 0.1}, NEW, "efficient"),
        ("h100", {}, NEW, "cudnn"),
        ("h100", {}, OLD, "flash"),
        ("h100", {"mask": True}, NEW, "cudnn"),
        ("h100", {"dtype": FP32}, NEW, "efficient"),
        ("h100", {"key_shape": (2, 4, 1, 64)}, NEW, "flash"),
        ("b200", {"shape": (2, 4, 64, 256)}, NEW, "flash"),
    ],
)
def test_the_kernel_is_chosen_as_torch_chooses_it(
    gpu: str, options: dict[str, Any], cudnn: int, backend: str
) -> None:
    """By GPU, format, mask, head size, dropout and heads (sdp_utils.cpp)."""
    assert choose_backend(call(**options), gpu_named(gpu), cudnn_version=cudnn) == backend


def test_sdpa_kernel_is_respected() -> None:
    """What the user switches off is not taken."""
    with sdpa_kernel(SDPBackend.MATH):
        assert choose_backend(call(), GPUS["a100-80gb"], cudnn_version=NEW) == "math"
    with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
        assert choose_backend(call(), GPUS["a100-80gb"], cudnn_version=NEW) == "efficient"


def test_a_strided_last_dimension_needs_the_formula() -> None:
    """No fused kernel reads heads whose elements are apart."""
    given = call()
    apart = given.query.detach().transpose(-1, -2)
    strided = Attention(query=apart, key=given.key, value=given.value)

    assert choose_backend(strided, GPUS["a100-80gb"], cudnn_version=NEW) == "math"


def test_a_mask_that_learns_is_not_for_cudnn() -> None:
    """Its kernel returns no gradient of the mask; the efficient one does."""
    given = call(mask=True)
    assert given.mask is not None
    with FakeTensorMode():
        bias = torch.empty(given.mask.shape, dtype=BF16, requires_grad=True)
    learns = Attention(query=given.query, key=given.key, value=given.value, mask=bias)

    assert choose_backend(learns, GPUS["h100"], cudnn_version=NEW) == "efficient"


@pytest.mark.parametrize(
    ("length", "size", "keys", "expected"),
    [
        # 4-byte sums of 2 x 4 heads: rows rounded up to 128, head size to 32 and above 192 to 256.
        (127, 64, 127, (4 * 8 * 128, 4 * 8 * 128 * 64)),
        (128, 64, 128, (4 * 8 * 128, 4 * 8 * 128 * 64)),
        (129, 64, 129, (4 * 8 * 256, 4 * 8 * 256 * 64)),
        (1, 40, 1, (4 * 8 * 128, 4 * 8 * 128 * 64)),
        (128, 200, 128, (4 * 8 * 128, 4 * 8 * 128 * 256)),
    ],
)
def test_flash_backward_sums_dq_in_fp32(
    length: int, size: int, keys: int, expected: tuple[int, ...]
) -> None:
    """softmax_d and dq_accum of flash_api.cpp, by hand."""
    given = call(shape=(2, 4, length, size), key_shape=(2, 4, keys, size))

    assert flash_backward_scratch(given.query, given.key) == expected


def test_flash_backward_expands_shared_heads() -> None:
    """With two heads of keys for four of queries, dk and dv are made for four."""
    given = call(shape=(2, 4, 64, 32), key_shape=(2, 2, 64, 32))

    assert flash_backward_scratch(given.query, given.key)[2:] == (2 * 2 * 64 * 4 * 32,) * 2


@pytest.mark.parametrize(
    ("length", "size", "dtype", "expected"),
    [
        # A tile is 64 x 64 sums and a lock of 16 bytes; 2 x 4 heads.
        (63, 64, FP32, (4 * 8 * 63, 4 * 8 * (4096 + 4))),
        (64, 64, FP32, (4 * 8 * 64, 4 * 8 * (4096 + 4))),
        (65, 64, FP32, (4 * 8 * 65, 4 * 8 * 2 * (4096 + 4))),
        (64, 65, FP32, (4 * 8 * 64, 4 * 8 * 2 * (4096 + 4))),
        (64, 136, FP16, (4 * 8 * 64, 4 * 8 * (3 * (4096 + 4) + 64 * 384))),
    ],
)
def test_efficient_backward_sums_dq_in_tiles(
    length: int, size: int, dtype: torch.dtype, expected: tuple[int, int]
) -> None:
    """delta and the workspace of kernel_backward.h, by hand."""
    tensors: tuple[Tensor, ...] = (
        (given := call(shape=(2, 4, length, size), dtype=dtype)).query,
        given.key,
        given.value,
    )

    assert efficient_backward_scratch(*tensors) == expected


@pytest.mark.parametrize(
    ("batch", "length", "keys", "dropout", "splits"),
    [(8, 1024, 1024, 0.0, 1), (1, 1, 8192, 0.1, 1), (1, 1, 256, 0.0, 1), (1, 1, 8192, 0.0, 16)],
)
def test_keys_are_split_only_for_few_queries(
    batch: int, length: int, keys: int, dropout: float, splits: int
) -> None:
    """12 heads of one query fill the 216 places of an A100 to 8/9 with 16 parts of 512 keys."""
    given = call(shape=(batch, 12, length, 64), key_shape=(batch, 12, keys, 64))

    assert flash_splits(given.query, given.key, GPUS["a100-80gb"], dropout=dropout) == splits


def test_an_unknown_gpu_gets_its_nearest_match() -> None:
    """A typing error names the GPU that was meant."""
    with pytest.raises(UnknownName, match="did you mean 'a100-80gb'"):
        gpu_named("a100-80g")
