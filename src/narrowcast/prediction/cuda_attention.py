"""Which attention kernel CUDA takes, and what that kernel allocates beyond its results.

``F.scaled_dot_product_attention`` chooses by GPU, format, mask, head size and dropout
(aten/src/ATen/native/transformers/cuda/sdp_utils.cpp, ``select_sdp_backend``), and the choice
decides what is kept for backward:

    flash       out, log-sum-exp                       no mask, 16 bits, sm_80 and later
    efficient   out, log-sum-exp padded to 32, mask    any float format that the GPU multiplies
    cudnn       out, log-sum-exp, mask                 Hopper and Blackwell, with a recent cuDNN
    math        every product of the formula           what the others refuse
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor

from narrowcast.prediction.gpus import Gpu

__all__ = [
    "Attention",
    "choose_backend",
    "efficient_backward_scratch",
    "flash_backward_scratch",
    "flash_splits",
]

_HALVES = (torch.float16, torch.bfloat16)
# sdp_utils.cpp, check_prefer_cudnn_attention: cuDNN 9.15.1, in which lengths that are no multiple
# of 128 were mended.
_CUDNN_PREFERRED_FROM = 91501
_FLASH_MOST_HEAD_SIZE = 256
# at::SDPBackend (ATen/SDPBackend.h), as torch._C._get_sdp_priority_order gives it.
_MATH, _FLASH, _EFFICIENT, _CUDNN = 0, 1, 2, 3
_NAMES = {_MATH: "math", _FLASH: "flash", _EFFICIENT: "efficient", _CUDNN: "cudnn"}


@dataclass(frozen=True, kw_only=True)
class Attention:
    """One call: (batch, heads, length, size) tensors and what else the choice looks at."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None = None
    dropout: float = 0.0
    is_causal: bool = False
    shares_heads: bool = False
    """``enable_gqa``: several query heads to one of keys and values."""

    @property
    def trains(self) -> bool:
        """Whether anything will be differentiated."""
        return torch.is_grad_enabled() and any(
            t.requires_grad for t in (self.query, self.key, self.value)
        )


def choose_backend(call: Attention, gpu: Gpu, *, cudnn_version: int) -> str:
    """Return ``flash``, ``efficient``, ``cudnn`` or ``math``, the user's own switches respected."""
    order = list(torch._C._get_sdp_priority_order())  # as sdpa_kernel sets it
    if gpu.sm in (90, 100, 103) and cudnn_version >= _CUDNN_PREFERRED_FROM and order[0] == _FLASH:
        order = [_CUDNN, *(b for b in order if b != _CUDNN)]
    fits = {_FLASH: _flash_fits, _EFFICIENT: _efficient_fits, _CUDNN: _cudnn_fits}
    for backend in order:
        if backend in fits and _enabled(backend) and fits[backend](call, gpu):
            return _NAMES[backend]
        if backend == _MATH:
            break
    return "math"


def _enabled(backend: int) -> bool:
    switches: dict[int, Callable[[], bool]] = {
        _FLASH: torch.backends.cuda.flash_sdp_enabled,
        _EFFICIENT: torch.backends.cuda.mem_efficient_sdp_enabled,
        _CUDNN: torch.backends.cuda.cudnn_sdp_enabled,
    }
    return switches[backend]()


def _well_formed(call: Attention, *, heads_may_be_shared: bool) -> bool:
    tensors = (call.query, call.key, call.value)
    if any(t.dim() != 4 or t.numel() == 0 or t.stride(-1) != 1 for t in tensors):
        return False
    if len({t.shape[0] for t in tensors}) > 1:
        return False
    heads = [t.shape[1] for t in tensors]
    if call.shares_heads and heads_may_be_shared:
        return heads[1] == heads[2] and heads[0] % heads[1] == 0
    return len(set(heads)) == 1


def _flash_fits(call: Attention, gpu: Gpu) -> bool:
    size = call.query.shape[-1]
    refuses_training = gpu.sm in (86, 87, 89, 120, 121) and (
        192 < size <= 224 or (size > 224 and call.dropout > 0)
    )
    return (
        gpu.sm >= 80
        and call.mask is None
        and call.query.dtype in _HALVES
        and _well_formed(call, heads_may_be_shared=True)
        and len({t.shape[-1] for t in (call.query, call.key, call.value)}) == 1
        and size <= _FLASH_MOST_HEAD_SIZE
        and not (call.trains and refuses_training)
        and not (call.is_causal and call.query.shape[-2] != call.key.shape[-2])
    )


def _efficient_fits(call: Attention, gpu: Gpu) -> bool:
    dtype, half = call.query.dtype, call.query.dtype in _HALVES
    if dtype not in (torch.float32, torch.float16) and not (dtype in _HALVES and gpu.sm >= 80):
        return False
    # minimum_gemm_alignment: 128 bits where tensor cores take the format.
    alignment = 4 if gpu.sm >= 80 else 1
    if gpu.sm >= 80 or (gpu.sm >= 70 and half):
        alignment = max(alignment, 128 // (16 if half else 32))
    return (
        gpu.sm >= 50
        and _well_formed(call, heads_may_be_shared=False)
        and (call.mask is None or call.mask.stride(-1) == 1)
        and call.query.shape[-1] == call.key.shape[-1]
        and call.query.shape[-1] % alignment == 0
        and call.value.shape[-1] % alignment == 0
    )


def _cudnn_fits(call: Attention, gpu: Gpu) -> bool:
    most = 256 if gpu.sm == 90 else 128
    return (
        gpu.sm >= 80
        and call.query.dtype in _HALVES
        and _well_formed(call, heads_may_be_shared=True)
        and _mask_broadcasts(call)
        and max(call.query.shape[-1], call.value.shape[-1]) <= most
        and call.query.shape[-1] % 8 == 0
        and call.value.shape[-1] % 8 == 0
        and call.key.shape[-2] > 1
        and not (call.query.shape[-2] == 1 and call.dropout > 0)
    )


def _mask_broadcasts(call: Attention) -> bool:
    """Whether a constant mask fits queries and keys as it is (check_attn_mask_shape)."""
    mask = call.mask
    if mask is None:
        return True
    if mask.requires_grad or mask.dim() not in (2, 4):
        return False
    whole = (*call.query.shape[:3], call.key.shape[2])[-mask.dim() :]
    return mask.shape[-2:] == whole[-2:] and all(
        mine in (1, full) for mine, full in zip(mask.shape, whole, strict=True)
    )


def flash_splits(query: Tensor, key: Tensor, gpu: Gpu, *, dropout: float) -> int:
    """Return into how many parts the keys are split when there are few queries (1: not).

    flash_api.cpp, ``set_params_splitkv`` and ``num_splits_heuristic``.
    """
    batch, heads, length, size = query.shape
    if dropout > 0:
        return 1
    block = 256 if size <= 64 else 128 if size <= 128 else 64
    key_blocks = ceil(key.shape[-2] / block)
    work = batch * heads * ceil(length / 64)
    units = 2 * gpu.multiprocessors
    if work >= 0.8 * units:
        return 1
    most = min(128, units, key_blocks)
    efficiency = {
        n: work * n / units / ceil(work * n / units)
        for n in range(1, most + 1)
        if n == 1 or ceil(key_blocks / n) != ceil(key_blocks / (n - 1))
    }
    best = max(efficiency.values())
    return next(n for n, value in efficiency.items() if value >= 0.85 * best)


def flash_backward_scratch(query: Tensor, key: Tensor) -> tuple[int, ...]:
    """Return the sizes of softmax_d, dq_accum and, with shared heads, dk and dv for every head.

    flash_api.cpp, ``mha_bwd``: sums of fp32 over the blocks of keys.
    """
    batch, heads, length, size = query.shape
    rounded = ceil(length / 128) * 128
    padded = ceil(size / 32) * 32 if size <= 192 else 256
    sizes = [4 * batch * heads * rounded, 4 * batch * heads * rounded * padded]
    if key.shape[1] != heads:
        sizes += [query.element_size() * batch * key.shape[-2] * heads * size] * 2
    return tuple(sizes)


def efficient_backward_scratch(query: Tensor, key: Tensor, value: Tensor) -> tuple[int, int]:
    """Return the sizes of delta and of the workspace for sums of dq (and of dk and dv).

    mem_eff_attention/kernel_backward.h, ``Params::workspace_size``: a tile of 64 x 64 sums and 16
    bytes for its lock; keys and values need sums of their own only above a head size of 128 in 16
    bits, where they do not stay in registers.
    """
    batch, heads, length, size = query.shape
    keys = key.shape[-2]
    tiles = ceil(length / 64) * ceil(size / 64)
    floats = tiles * (64 * 64 + 4)
    if query.dtype in _HALVES and max(size, value.shape[-1]) > 128:
        splits = max(min(ceil(keys / 64), 200 // (batch * heads)), 1)
        floats += splits * 64 * (ceil(size / 64) * 64 + ceil(value.shape[-1] / 64) * 64)
    return 4 * batch * heads * length, 4 * batch * heads * (ceil(floats / 4) * 4)
