"""Composite operations that decide by device, made to decide on a CPU as on CUDA.

A composite operation is torch code that calls others; autograd sees only those. Where it asks for
the device (dropout, attention, softmax of fp16, rms_norm), a kernel of ours for the key
``AutogradCPU`` answers as CUDA's branch does, for as long as the context is open. Recurrent layers
go to cuDNN there, which tells nobody how much it keeps for backward: they are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch import Tensor

from narrowcast.errors import RecipeError
from narrowcast.prediction.cuda_attention import Attention, choose_backend
from narrowcast.prediction.gpus import Gpu

__all__ = ["composites_of_cuda"]

_aten = torch.ops.aten
# attention.cpp, pad_bias<8>.
_MASK_ALIGNMENT = 8
# RNN.cpp: each with a tensor for every sequence, and with packed sequences.
_RECURRENT = {"lstm": "LSTM", "gru": "GRU", "rnn_tanh": "RNN", "rnn_relu": "RNN"}


def _as_composed(op: Any, *args: Any) -> Any:
    """Call torch's own composite kernel: ``decompose`` would prefer a Python one that differs."""
    return op._op_dk(torch._C.DispatchKey.CompositeImplicitAutograd, *args)


def _dropout(value: Tensor, p: float, train: bool) -> Tensor:  # noqa: FBT001 -- aten's signature
    """Drop out with one kernel and a mask of bools (Dropout.cpp, is_fused_kernel_acceptable)."""
    if train and 0 < p < 1 and value.numel() > 0:
        result: Tensor = _aten.native_dropout(value, p, train)[0]
        return result
    plain: Tensor = _as_composed(_aten.dropout.default, value, p, train)
    return plain


def _of_half(op: Any, inner: Any) -> Callable[..., Tensor]:
    """Build softmax or log_softmax: fp16 to fp32 in one kernel (SoftMax.cpp, half_to_float)."""

    def kernel(value: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
        if value.dtype == torch.float16 and dtype == torch.float32:
            result: Tensor = inner(value, dim, True)
            return result
        plain: Tensor = _as_composed(op, value, dim, dtype)
        return plain

    return kernel


class _FusedRmsNorm(torch.autograd.Function):
    """``_fused_rms_norm`` of CUDA: keeps its input and rstd, one per row, in fp32."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, weight: Tensor | None, rows: tuple[int, ...]) -> Tensor:
        result = torch.empty_like(value, memory_format=torch.contiguous_format)
        rstd = value.new_empty(rows, dtype=torch.float32)
        ctx.save_for_backward(value, weight, rstd)
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        value, weight, _ = ctx.saved_tensors
        return torch.empty_like(value), None if weight is None else torch.empty_like(weight), None


def _rms_norm(
    value: Tensor, shape: list[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    """Normalise with CUDA's fused kernel where it is taken (layer_norm.cpp, rms_norm_symint)."""
    if weight is not None and weight.dtype != value.dtype:
        plain: Tensor = _as_composed(_aten.rms_norm.default, value, shape, weight, eps)
        return plain
    lead = value.shape[: value.dim() - len(shape)]
    rows = (*lead, *(1 for _ in shape))
    result: Tensor = _FusedRmsNorm.apply(value, weight, rows)  # type: ignore[no-untyped-call]
    return result


def _float_mask(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Turn a mask of bools into one of 0 and -inf (attention.cpp, convert_boolean_attn_mask)."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.where(mask, 0.0, mask.new_full((), float("-inf"), dtype=dtype))


def _padded_mask(mask: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """Align the rows of a mask and give it every batch and head (preprocess_mask)."""
    last = mask.shape[-1]
    if last % _MASK_ALIGNMENT:
        padded = torch.nn.functional.pad(mask, (0, _MASK_ALIGNMENT - last % _MASK_ALIGNMENT))
        mask = padded[..., :last]
    return mask.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])


def _pad_heads(value: Tensor) -> Tensor:
    """Make the head size a multiple of 8 (pad_last_dim)."""
    last = value.shape[-1]
    return value if last % 8 == 0 else torch.nn.functional.pad(value, (0, 8 - last % 8))


def _attention(gpu: Gpu, *, cudnn_version: int) -> Callable[..., Tensor]:
    def kernel(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *options: Any,  # attn_mask, dropout_p and is_causal, as far as given
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        defaults: tuple[Any, ...] = (None, 0.0, False)
        attn_mask, dropout_p, is_causal = (*options, *defaults[len(options) :])
        call = Attention(
            query=query,
            key=key,
            value=value,
            mask=attn_mask,
            dropout=dropout_p,
            is_causal=is_causal,
            shares_heads=enable_gqa,
        )
        backend = choose_backend(call, gpu, cudnn_version=cudnn_version)
        if backend == "math":
            return _aten._scaled_dot_product_attention_math(  # type: ignore[no-any-return]
                query, key, value, attn_mask, dropout_p, is_causal,
                scale=scale, enable_gqa=enable_gqa,
            )[0]  # fmt: skip
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        if backend == "flash":
            padded = [_pad_heads(t) for t in (query, key, value)]
            out: Tensor = _aten._scaled_dot_product_flash_attention(
                *padded, dropout_p, is_causal, False, scale=scale
            )[0]
            return out[..., : query.shape[-1]] if out.shape[-1] != query.shape[-1] else out
        mask = _float_mask(attn_mask, query.dtype)
        if backend == "efficient":
            if mask is not None:
                mask = _padded_mask(mask, query, key)
            op = _aten._scaled_dot_product_efficient_attention
        else:
            op = _aten._scaled_dot_product_cudnn_attention
        result: Tensor = op(
            query, key, value, mask, call.trains, dropout_p, is_causal, scale=scale
        )[0]
        return result

    return kernel


def _refused(layer: str, gpu: Gpu) -> Callable[..., NoReturn]:
    """Build what stands for a recurrent layer, whose reserve only a run could tell."""

    def kernel(*_: Any) -> NoReturn:
        raise RecipeError(
            f"a recurrent layer (nn.{layer}) is not predicted for {gpu.title}: what cuDNN keeps of "
            "it for backward was never measured",
            hint="predict it for the CPU (--device cpu), or on the GPU measure it with `narrowcast "
            "memory --device cuda`",
        )

    return kernel


@contextmanager
def composites_of_cuda(gpu: Gpu, *, cudnn_version: int) -> Iterator[None]:
    """Override the composite operations that decide by device while open."""
    library = torch.library.Library("aten", "IMPL", "AutogradCPU")  # type: ignore[no-untyped-call]
    kernels = {
        "dropout": _dropout,
        "softmax.int": _of_half(_aten.softmax.int, _aten._softmax),
        "log_softmax.int": _of_half(_aten.log_softmax.int, _aten._log_softmax),
        "rms_norm": _rms_norm,
        "scaled_dot_product_attention": _attention(gpu, cudnn_version=cudnn_version),
        **{
            f"{name}.{overload}": _refused(layer, gpu)
            for name, layer in _RECURRENT.items()
            for overload in ("input", "data")
        },
    }
    for name, kernel in kernels.items():
        library.impl(name, kernel)  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        library._destroy()  # type: ignore[no-untyped-call]
