"""Kernels of torch versions older than the supported ones, for rows measured on them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from narrowcast.prediction.cuda_ops import RULES, CudaKernels

__all__ = ["BEFORE_2_2", "BEFORE_2_7"]

_aten = torch.ops.aten


def _addmm(kernels: CudaKernels, func: Any, args: Any, kwargs: Any) -> Tensor:
    """Free cublasLt's workspace after each product (up to 2.6 a tensor in gemm_and_bias)."""
    bias = args[0]
    if bias.dim() != 1:
        return RULES[func](kernels, func, args, kwargs)
    result = func(*args, **kwargs)
    workspace = torch.empty(kernels.gpu.cublaslt_workspace_bytes, dtype=torch.uint8)
    kernels.workspace()
    del workspace
    return result


def _packed(value: Tensor) -> Tensor:
    """Bring (batch, heads, length, size) into rows of (heads, size), by a copy unless it is so."""
    return value.transpose(1, 2).reshape(-1, value.shape[1], value.shape[3])


def _flash1(kernels: CudaKernels, func: Any, args: Any, kwargs: Any) -> Any:
    """FlashAttention 1, in torch up to 2.1: packed copies of its inputs, a packed output."""
    query, key, value = args[:3]
    packed = [_packed(t) for t in (query, key, value)]
    batch, heads, length, size = query.shape
    out = query.new_empty((batch, length, heads, size))
    rows = -(-length // 16) * 16
    lse = query.new_empty((batch, heads, rows), dtype=torch.float32)
    del packed
    random = [torch.empty((), dtype=torch.int64, device="meta") for _ in range(2)]
    debug = query.new_empty((0,))
    return out.transpose(1, 2), lse, None, None, length, key.shape[2], *random, debug


def _flash1_backward(kernels: CudaKernels, func: Any, args: Any, kwargs: Any) -> Any:
    grad, query, key, value, out = args[:5]
    packed = [_packed(t) for t in (grad, query, key, value, out)]
    gradients = [torch.empty_like(t) for t in packed[1:4]]
    batch, heads, length, _ = query.shape
    kernels.scratch(4 * batch * heads * (-(-length // 16) * 16))
    del packed
    return tuple(
        g.view(t.shape[0], t.shape[2], t.shape[1], t.shape[3]).transpose(1, 2)
        for g, t in zip(gradients, (query, key, value), strict=True)
    )


BEFORE_2_7 = {_aten.addmm.default: _addmm}
BEFORE_2_2 = {
    **BEFORE_2_7,
    _aten._scaled_dot_product_flash_attention.default: _flash1,
    _aten._scaled_dot_product_flash_attention_backward.default: _flash1_backward,
}
