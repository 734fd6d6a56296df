"""What kernels on a CPU allocate where the meta kernels behind fake tensors say something else.

Found by a survey of torch 2.13: its own operator samples (``common_methods_invocations.op_db``,
fp32 and bf16, forward and backward) and some forty modules and optimizers under autocast, every
operation run for real and fake side by side. What is left out is in docs/predict.md.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["CpuKernels"]

_aten = torch.ops.aten


class CpuKernels(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Above a FakeTensorMode: results get the storages that CPU kernels give them."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        rule = _RULES.get(func)
        return result if rule is None else rule(result, *args, **(kwargs or {}))


def _reduced_loss(result: Tensor, *operands: Any, **_: Any) -> Tensor:
    """Give a mean or sum the storage of its elementwise result.

    The output is made for that and resized to a scalar in the end, and a tensor that is resized to
    less keeps its storage (ATen/native/Loss.cpp).
    """
    if result.dim():
        return result
    elementwise = torch.broadcast_tensors(*operands[:2])[0]  # type: ignore[no-untyped-call]
    return result.new_empty(max(elementwise.numel(), 1)).as_strided((), ())


def _unfolded(result: Tensor, x: Tensor, *_: Any, **__: Any) -> Tensor:
    """Give the result the storage of the input where that is larger.

    It begins as ``empty_like(input)`` and is resized (ATen/native/Im2Col.cpp, Col2Im.cpp).
    """
    if x.numel() <= result.numel():
        return result
    stretch = torch.empty_like(result, memory_format=torch.contiguous_format).stride()
    return x.new_empty(x.numel()).as_strided(result.shape, stretch)


def _normalised(result: tuple[Tensor, ...], x: Tensor, *others: Any, **_: Any) -> Any:
    """Keep the statistics of a 16-bit input in fp32 if weights or running statistics are.

    ATen/native/cpu/mixed_data_type.h: ``param_scalar_type``, used by batch and group norm.
    """
    if not any(isinstance(t, Tensor) and t.dtype is torch.float32 for t in others):
        return result
    return result[0], *(t.to(torch.float32) for t in result[1:])


def _normalised_backward(
    result: tuple[Tensor | None, ...], gradient: Tensor, x: Tensor, *_: Any, **__: Any
) -> Any:
    """Return the gradient of a 16-bit input in 16 bits, whatever the weight's format."""
    first = result[0]
    return first if first is None else first.to(x.dtype), *result[1:]


def _bags(
    result: tuple[Tensor, ...], weight: Tensor, indices: Tensor, *others: Any, **_: Any
) -> Any:
    """Size the two index tensors that are made larger than they end up, or not at all for a sum.

    ATen/native/EmbeddingBag.cpp: ``_embedding_bag_cpu_impl_out``, ``make_offset2bag_out``.
    """
    output, offset2bag, bag_size, max_indices = result
    is_sum = len(others) < 3 or others[2] == 0
    held = 0 if is_sum else indices.numel() + 1
    offset2bag = offset2bag.new_empty(held)[: min(held, indices.numel())]
    bag_size = bag_size.new_empty(others[0].numel())[: bag_size.numel()]
    return output, offset2bag, bag_size, max_indices


def _recurrent(result: tuple[Tensor, ...], *args: Any, **_: Any) -> Any:
    """Ask oneDNN for the size of its workspace, by running the layer on zeros: no formula is known.

    Without gradients it needs none.
    """
    if not torch.is_grad_enabled():
        return result
    shapes = tuple((tuple(a.shape), a.dtype) if isinstance(a, Tensor) else _frozen(a) for a in args)
    return *result[:3], result[3].new_empty(_workspace_bytes(shapes))


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


@lru_cache(maxsize=64)
def _workspace_bytes(arguments: tuple[Any, ...]) -> int:
    with unset_fake_temporarily(), torch.utils._python_dispatch._disable_current_modes():
        real = [
            torch.zeros(a[0], dtype=a[1]) if _is_tensor(a) else list(a) if a == () else a
            for a in arguments
        ]
        workspace: Tensor = _aten.mkldnn_rnn_layer.default(*real)[3]
    return workspace.numel()


def _is_tensor(argument: Any) -> bool:
    return (
        isinstance(argument, tuple) and len(argument) == 2 and isinstance(argument[1], torch.dtype)
    )


def _recurrent_backward(result: tuple[Tensor, ...], *_: Any, **__: Any) -> Any:
    """Give each of two biases a gradient of its own."""
    return *result[:4], torch.empty_like(result[4]), *result[5:]


_RULES: dict[Any, Callable[..., Any]] = {
    _aten.mse_loss.default: _reduced_loss,
    _aten.smooth_l1_loss.default: _reduced_loss,
    _aten.soft_margin_loss.default: _reduced_loss,
    _aten.binary_cross_entropy.default: _reduced_loss,
    _aten.im2col.default: _unfolded,
    _aten.col2im.default: _unfolded,
    _aten.native_batch_norm.default: _normalised,
    _aten._native_batch_norm_legit.default: _normalised,
    _aten._native_batch_norm_legit.no_stats: _normalised,
    _aten.native_group_norm.default: _normalised,
    _aten.native_group_norm_backward.default: _normalised_backward,
    _aten._embedding_bag.default: _bags,
    _aten.mkldnn_rnn_layer.default: _recurrent,
    _aten.mkldnn_rnn_layer_backward.default: _recurrent_backward,
}
