"""CUDA's kernels on fake CPU tensors: the storages that a step would make on a GPU.

A GPU is not needed to know what a step allocates, but CUDA's choices are: other kernels are picked
than on a CPU, they keep other tensors for backward, and they take scratch memory and workspaces.

    with FakeTensorMode():
        model, optimizer = ...
        with MemoryLedger(model, optimizer) as ledger, cuda_kernels(gpu_named("a100-80gb")):
            ...one training step...

Entered inside a ledger, the ledger sees what CUDA would allocate, in CUDA's order, as if the fake
tensors were on the GPU. Three parts: autocast follows CUDA's lists (``precision.rehearse``),
composite operations decide as on CUDA (``cuda_composites``), and the rules below replace kernels
that make other tensors. Each rule names its source. What no source tells is not invented:
docs/allocator.md lists it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from narrowcast.errors import UsageError
from narrowcast.memory.modules import in_backward
from narrowcast.precision.autocast_rules import rehearse
from narrowcast.prediction.cuda_attention import (
    efficient_backward_scratch,
    flash_backward_scratch,
    flash_splits,
)
from narrowcast.prediction.cuda_composites import composites_of_cuda
from narrowcast.prediction.cuda_optimizers import optimizers_of_cuda
from narrowcast.prediction.gpus import Gpu

__all__ = ["CUDNN_VERSION", "RULES", "CudaKernels", "Rule", "cuda_kernels"]

_aten = torch.ops.aten
_HALVES = (torch.float16, torch.bfloat16)
_OPEN = threading.Lock()

# Embedding.cu, embedding_dense_backward_cuda, and NROWS_PER_THREAD of EmbeddingBackwardKernel.cu.
_FEW_INDICES = 3072
_ROWS_A_THREAD = 10

CUDNN_VERSION = 91900
"""9.19.0, which the wheels of torch 2.11 for CUDA 13 require (Requires-Dist in their metadata)."""

Rule = Callable[["CudaKernels", Any, tuple[Any, ...], dict[str, Any]], Any]


class CudaKernels(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees each operation below autograd and carries it out with the storages of CUDA's kernel."""

    def __init__(self, gpu: Gpu, *, rules: Mapping[Any, Rule] | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.gpu = gpu
        self.rules = {**RULES, **(rules or {})}
        self._workspaces: dict[tuple[str, bool], Tensor] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:
            return args[0].device
        if any(hasattr(kind, "__tensor_flatten__") for kind in types):
            return NotImplemented
        rule = self.rules.get(func)
        if rule is None:
            return func(*args, **(kwargs or {}))
        return rule(self, func, args, kwargs or {})

    def scratch(self, *sizes: int) -> None:
        """Allocate what a kernel needs while it runs, together, and free it."""
        held = [torch.empty(size, dtype=torch.uint8, device="cpu") for size in sizes if size]
        del held

    def workspace(self, library: str = "cublas") -> None:
        """Allocate what cuBLAS takes at a thread's first product, and keep it.

        CublasHandlePool.cpp: one for each handle, hence thread, and stream. Backward has a thread
        of its own. cublasLt's handle is cuBLAS's, so that its first use takes both.
        """
        if library == "cublaslt":
            self.workspace()
        key = (library, in_backward())
        if key not in self._workspaces:
            size = getattr(self.gpu, f"{library}_workspace_bytes")
            self._workspaces[key] = torch.empty(size, dtype=torch.uint8, device="cpu")

    @property
    def workspaces(self) -> list[Tensor]:
        """What is kept until the process ends."""
        return list(self._workspaces.values())

    def adopt_workspaces(self, other: CudaKernels) -> None:
        """Take over the workspaces that earlier steps of the process left."""
        self._workspaces = other._workspaces


def _product(kernels: CudaKernels, func: Any, args: Any, kwargs: Any) -> Tensor:
    """Multiply: the result is allocated before the workspace (structured kernels)."""
    result: Tensor = func(*args, **kwargs)
    kernels.workspace()
    return result


def _addmm(kernels: CudaKernels, func: Any, args: Any, kwargs: Any) -> Tensor:
    """Multiply and add. A bias of one dimension goes into cublasLt's epilogue.

    aten/src/ATen/native/cuda/Blas.cpp, addmm_out_cuda_impl.
    """
    bias, _, right = args[:3]
    result: Tensor = func(*args, **kwargs)
    fused = (
        bias.dim() == 1
        and bias.is_contiguous()
        and kwargs.get("beta", 1) == 1
        and bias.dtype in (torch.float32, torch.float64, *_HALVES)
        and min(right.shape) > 1
        and bias.numel() == result.shape[1]
    )
    kernels.workspace("cublaslt" if fused else "cublas")
    return result


def _like(tensor: Tensor, shape: Any = None, **options: Any) -> Tensor:
    if shape is None:
        return torch.empty_like(tensor, **options)
    return tensor.new_empty(shape, **options)


def _on_host(dtype: torch.dtype = torch.int64) -> Tensor:
    """Return a scalar that CUDA keeps in host memory: not on the device that is counted."""
    return torch.empty((), dtype=dtype, device="meta")


def _layer_norm(kernels: CudaKernels, func: Any, args: Any, kwargs: Any) -> Any:
    """Keep mean and rstd in fp32 for 16-bit inputs (layer_norm_kernel.cu, LayerNormKernelImpl)."""
    value = args[0]
    if value.dtype not in _HALVES:
        return func(*args, **kwargs)
    lead = value.shape[: value.dim() - len(args[1])]
    shape = (*lead, *(1 for _ in args[1]))
    result = _like(value, memory_format=torch.contiguous_format)
    return result, *(_like(value, shape, dtype=torch.float32) for _ in range(2))


def _batch_norm(kernels: CudaKernels, func: Any, args: Any, kwargs: Any) -> Any:
    """Keep mean and invstd in fp32 for 16-bit inputs (Normalization.cuh, batch_norm_cuda)."""
    value, training = args[0], args[5]
    if value.dtype not in _HALVES:
        return func(*args, **kwargs)
    result, count = _like(value), value.shape[1] if training else 0
    return result, *(_like(value, (count,), dtype=torch.float32) for _ in range(2))


def _flash(kernels: CudaKernels, func: Any, args: Any, kwargs: Any) -> Any:
    """Allocate out, log-sum-exp and the state of the random numbers (flash_api.cpp, mha_fwd)."""
    query, key = args[:2]
    dropout = args[3] if len(args) > 3 else kwargs.get("dropout_p", 0.0)
    batch, heads, length, size = query.shape
    out = _like(query)
    lse = _like(query, (batch, heads, length), dtype=torch.float32)
    state = _like(query, (2,), dtype=torch.uint64)
    unused = _like(query, (), dtype=torch.uint64)
    splits = flash_splits(query, key, kernels.gpu, dropout=dropout)
    if splits > 1:
        rows = 4 * splits * batch * heads * length
        kernels.scratch(rows, rows * (-(-size // 32) * 32))
    debug = _like(query, (0,))
    return out, lse, None, None, length, key.shape[2], state, unused, debug


def _flash_backward(kernels: CudaKernels, func: Any, args: Any, kwargs: Any) -> Any:
    """Allocate three gradients, and fp32 sums of dq (flash_api.cpp, mha_bwd)."""
    grad, query, key, value, out = args[:5]
    copies = [t.transpose(1, 2).contiguous() for t in (grad, out)]
    gradients = tuple(_like(t) for t in (query, key, value))
    kernels.scratch(*flash_backward_scratch(query, key))
    del copies
    return gradients


def _efficient(kernels: CudaKernels, func: Any, args: Any, kwargs: Any) -> Any:
    """Allocate out and log-sum-exp (attention.cu, _efficient_attention_forward).

    The state of the random numbers is in host memory. Above a head size of 128 16-bit kernels sum
    the output in fp32.
    """
    query, _, value, _, wants_lse = args[:5]
    batch, heads, length, _ = query.shape
    size = value.shape[-1]
    out = _like(query, (batch, length, heads, size)).transpose(1, 2)
    rows = -(-length // 32) * 32 if wants_lse else 0
    lse = _like(query, (batch, heads, rows), dtype=torch.float32)
    if query.dtype in _HALVES and size > 128:
        kernels.scratch(4 * out.numel())
    return out, lse, _on_host(), _on_host()


def _efficient_backward(kernels: CudaKernels, func: Any, args: Any, kwargs: Any) -> Any:
    """Allocate the gradients, delta and a workspace for sums (attention_backward.cu)."""
    grad, query, key, value, mask = args[:5]
    grad_t = grad.transpose(1, 2).contiguous()
    gradients = [
        _like(t, (t.shape[0], t.shape[2], t.shape[1], t.shape[3])).transpose(1, 2)
        for t in (query, key, value)
    ]
    grad_mask = None
    if mask is not None and args[10][3]:
        columns = -(-mask.shape[-1] // 16) * 16
        grad_mask = _like(mask, (*mask.shape[:-1], columns))[..., : mask.shape[-1]]
    delta, sums = efficient_backward_scratch(query, key, value)
    if query.dtype in _HALVES:
        kernels.scratch(delta, sums)
    else:  # kKernelComputesDelta is false: operations of its own make it
        held = (grad_t * args[5].transpose(1, 2)).sum(-1).transpose(-2, -1).contiguous()
        kernels.scratch(sums)
        del held
    return *gradients, grad_mask


def _cudnn(kernels: CudaKernels, func: Any, args: Any, kwargs: Any) -> Any:
    """Allocate out, in the layout of the query, and log-sum-exp (cudnn/MHA.cpp)."""
    query, key, value = args[:3]
    batch, heads, length, size = query.shape
    packed = (batch, length, heads, value.shape[-1])
    out = _like(query) if packed[-1] == size else _like(query, packed).transpose(1, 2)
    lse = _like(query, (batch, heads, length, 1), dtype=torch.float32)
    return out, lse, None, None, length, key.shape[2], _on_host(), _on_host(), None


def _cudnn_backward(kernels: CudaKernels, func: Any, args: Any, kwargs: Any) -> Any:
    """Allocate three gradients (attention_backward.cu, _cudnn_attention_backward).

    What cuDNN asks for as workspace is not documented; sums as flash attention's are assumed.
    """
    gradients = tuple(_like(t) for t in args[1:4])
    kernels.scratch(*flash_backward_scratch(args[1], args[2]))
    return gradients


def _embedding_backward(kernels: CudaKernels, func: Any, args: Any, kwargs: Any) -> Tensor:
    """Sort more than 3072 indices, then sum rows by segment (EmbeddingBackwardKernel.cu).

    Embedding.cu, embedding_dense_backward_cuda: sorted and original indices outlive the sort, whose
    second pair of buffers is cub's; the sums are fp32, one row for each segment of ten indices.
    """
    gradient, indices, rows = args[:3]
    count = indices.numel()
    if count <= _FEW_INDICES:
        result: Tensor = func(*args, **kwargs)
        return result
    size = count * indices.element_size()
    order = [torch.empty(size, dtype=torch.uint8, device="cpu") for _ in range(2)]
    kernels.scratch(size, 2 * size)
    result = func(*args, **kwargs)
    segments = min(count, rows)
    partial = count // _ROWS_A_THREAD + segments
    width = -(-gradient.shape[-1] // 32) * 32
    kernels.scratch(*[segments * indices.element_size()] * 3, 8 * partial, 4 * partial * width)
    del order
    return result


RULES: dict[Any, Rule] = {
    _aten.mm.default: _product,
    _aten.bmm.default: _product,
    _aten.baddbmm.default: _product,
    _aten.addmv.default: _product,
    _aten.mv.default: _product,
    _aten.dot.default: _product,
    _aten.addmm.default: _addmm,
    _aten.native_layer_norm.default: _layer_norm,
    _aten.native_batch_norm.default: _batch_norm,
    _aten._scaled_dot_product_flash_attention.default: _flash,
    _aten._scaled_dot_product_flash_attention_backward.default: _flash_backward,
    _aten._scaled_dot_product_efficient_attention.default: _efficient,
    _aten._scaled_dot_product_efficient_attention_backward.default: _efficient_backward,
    _aten._scaled_dot_product_cudnn_attention.default: _cudnn,
    _aten._scaled_dot_product_cudnn_attention_backward.default: _cudnn_backward,
    _aten.embedding_dense_backward.default: _embedding_backward,
}


@contextmanager
def cuda_kernels(
    gpu: Gpu, *, cudnn_version: int = CUDNN_VERSION, rules: Mapping[Any, Rule] | None = None
) -> Iterator[CudaKernels]:
    """Carry out operations on fake CPU tensors with the storages that they would have on `gpu`.

    `rules` replace those of single operations: kernels of other versions, or of the user's own.
    Process-wide like the kernels of a device. Raises UsageError inside another one.
    """
    if not _OPEN.acquire(blocking=False):
        raise UsageError("CUDA's kernels are being emulated already", hint="leave the other first")
    try:
        with ExitStack() as stack:
            stack.enter_context(rehearse("cuda"))
            stack.enter_context(composites_of_cuda(gpu, cudnn_version=cudnn_version))
            stack.enter_context(optimizers_of_cuda())
            yield stack.enter_context(CudaKernels(gpu, rules=rules))
    finally:
        _OPEN.release()
