"""The GPUs that a peak can be predicted for: what of each decides which kernels run, and its size.

Compute capability, multiprocessors and memory are NVIDIA's figures (CUDA programming guide, data
sheets). Of the memory, drivers and the context of a process take a few hundred MiB, so what a
training can have is less; ``usable_bytes`` says how much less is assumed.
"""

from __future__ import annotations

from dataclasses import dataclass

from narrowcast.errors import UnknownName

__all__ = ["GPUS", "Gpu", "gpu_known_as", "gpu_named"]

_MIB, _GIB = 2**20, 2**30

# aten/src/ATen/cuda/CublasHandlePool.cpp, parseChosenWorkspaceSize: the default of cuBLAS
# (:4096:2:16:8 in its notation) and what NVIDIA asks for on Hopper.
_CUBLAS_BYTES = 4096 * 1024 * 2 + 16 * 1024 * 8
_CUBLAS_HOPPER_BYTES = 4096 * 8 * 1024
# The same file and CUDABlas.cpp: _parseChosenWorkspaceSize, 1024 KiB.
_CUBLASLT_BYTES = _MIB


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One model of GPU."""

    name: str
    title: str
    sm: int
    """Compute capability times ten: 80 for 8.0."""
    multiprocessors: int
    memory_bytes: int
    """All of it, as sold."""

    @property
    def cublas_workspace_bytes(self) -> int:
        """What each thread that multiplies takes once and keeps."""
        return _CUBLAS_HOPPER_BYTES if self.sm == 90 else _CUBLAS_BYTES

    @property
    def cublaslt_workspace_bytes(self) -> int:
        """What a product with a fused bias takes: once a thread, and kept."""
        return _CUBLASLT_BYTES

    @property
    def usable_bytes(self) -> int:
        """An assumption, not a figure: 4 % of the memory goes to driver, context and kernels."""
        return self.memory_bytes * 96 // 100


def _gpu(name: str, title: str, sm: int, multiprocessors: int, gib: int) -> Gpu:
    return Gpu(
        name=name, title=title, sm=sm, multiprocessors=multiprocessors, memory_bytes=gib * _GIB
    )


GPUS: dict[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        _gpu("t4", "NVIDIA T4", 75, 40, 15),
        _gpu("v100-16gb", "NVIDIA V100 16 GB", 70, 80, 16),
        _gpu("v100-32gb", "NVIDIA V100 32 GB", 70, 80, 32),
        _gpu("rtx2080ti", "NVIDIA GeForce RTX 2080 Ti", 75, 68, 11),
        _gpu("a100-40gb", "NVIDIA A100 40 GB", 80, 108, 40),
        _gpu("a100-80gb", "NVIDIA A100 80 GB", 80, 108, 80),
        _gpu("a800-80gb", "NVIDIA A800 80 GB", 80, 108, 80),
        _gpu("a30", "NVIDIA A30", 80, 56, 24),
        _gpu("a10", "NVIDIA A10", 86, 72, 24),
        _gpu("a6000", "NVIDIA RTX A6000", 86, 84, 48),
        _gpu("rtx3060", "NVIDIA GeForce RTX 3060 12 GB", 86, 28, 12),
        _gpu("rtx3070", "NVIDIA GeForce RTX 3070", 86, 46, 8),
        _gpu("rtx3080", "NVIDIA GeForce RTX 3080 10 GB", 86, 68, 10),
        _gpu("rtx3090", "NVIDIA GeForce RTX 3090", 86, 82, 24),
        _gpu("l4", "NVIDIA L4", 89, 58, 24),
        _gpu("l40s", "NVIDIA L40S", 89, 142, 48),
        _gpu("rtx4070", "NVIDIA GeForce RTX 4070", 89, 46, 12),
        _gpu("rtx4080", "NVIDIA GeForce RTX 4080", 89, 76, 16),
        _gpu("rtx4090", "NVIDIA GeForce RTX 4090", 89, 128, 24),
        _gpu("h100", "NVIDIA H100 80 GB SXM", 90, 132, 80),
        _gpu("h100-pcie", "NVIDIA H100 80 GB PCIe", 90, 114, 80),
        _gpu("gh200", "NVIDIA GH200 96 GB", 90, 132, 96),
        _gpu("h200", "NVIDIA H200", 90, 132, 141),
        _gpu("b200", "NVIDIA B200", 100, 148, 180),
        _gpu("rtx5080", "NVIDIA GeForce RTX 5080", 120, 84, 16),
        _gpu("rtx5090", "NVIDIA GeForce RTX 5090", 120, 170, 32),
    )
}


def gpu_named(name: str) -> Gpu:
    """Return the GPU of this name. Raises UnknownName with the nearest match."""
    found = gpu_known_as(name)
    if found is None:
        raise UnknownName.of("GPU", name, GPUS)
    return found


def gpu_known_as(name: str) -> Gpu | None:
    """Return the GPU of this name or title, however it is spaced: ``RTX 4090``, ``A100-80GB``."""
    if name in GPUS:
        return GPUS[name]
    asked = _bare(name)
    return next((gpu for gpu in GPUS.values() if asked in map(_bare, (gpu.name, gpu.title))), None)


def _bare(name: str) -> str:
    """Return a name without what its maker's own writing adds to it."""
    words = name.lower().replace("-", " ").split()
    return "".join(word for word in words if word not in ("nvidia", "geforce"))
