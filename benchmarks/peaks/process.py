"""One Python process on a GPU that is not there: what its caching allocator would report.

    process = Process(gpu_named("t4"))
    with process.run():
        model = process.to_gpu(build)
        ...a step...
        process.counters().allocated_bytes

Everything inside a run is plain PyTorch on fake tensors; counters are those of torch.cuda at that
line. A run ends with everything freed but the workspaces; the next one finds the segments as they
were left, as in a notebook.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from narrowcast.memory.measure import MemoryLedger
from narrowcast.memory.storages import Holding, Role
from narrowcast.prediction.allocator import AllocatorConfig, AllocatorPeaks, Counters, Replay
from narrowcast.prediction.cuda_ops import CudaKernels, Rule, cuda_kernels
from narrowcast.prediction.gpus import Gpu

__all__ = ["Process"]

Module = TypeVar("Module", bound=nn.Module)


class _Answers(TorchDispatchMode):
    """Reads of a value get one: step counts, and losses that a loop prints."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return 1.0 if args[0].is_floating_point() else 1
        return func(*args, **(kwargs or {}))


class Process:
    def __init__(self, gpu: Gpu, *, rules: Mapping[Any, Rule] | None = None) -> None:
        self.gpu, self.rules = gpu, rules
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._replay = Replay(AllocatorConfig(device_bytes=gpu.memory_bytes))
        self._ledger = MemoryLedger(device="cpu")
        self._kernels: CudaKernels | None = None
        self._held: dict[Holding, int] = defaultdict(int)
        self._fed = 0

    @contextmanager
    def run(self) -> Iterator[None]:
        """Watch what is done inside; then free what is left of it."""
        self._ledger, self._fed = MemoryLedger(device="cpu"), 0
        with ExitStack() as stack:
            for context in (self._fake, self._ledger, _Answers()):
                stack.enter_context(context)
            kernels = stack.enter_context(cuda_kernels(self.gpu, rules=self.rules))
            if self._kernels is not None:
                kernels.adopt_workspaces(self._kernels)
            self._kernels = kernels
            yield
            self._feed()
            kept = {self._ledger._book.find(t) for t in kernels.workspaces}  # None if older
        for holding in kept - {None}:
            holding.module = _KEPT
        self._replay.feed((h, -size) for h, size in self._held.items() if h.module != _KEPT)
        self._held = defaultdict(int, {h: s for h, s in self._held.items() if h.module == _KEPT})

    def to_gpu(self, build: Callable[[], Module]) -> Module:
        """Build a module in host memory and move it as ``Module.to`` does."""
        with torch.device("meta"):
            module = build()
        _move(module, {})
        return module

    def counters(self) -> Counters:
        """Return what torch.cuda would report now."""
        self._feed()
        return self._replay.allocator.now

    def peaks(self) -> AllocatorPeaks:
        """Return the peaks since the last reset."""
        self._feed()
        return self._replay.allocator.peaks

    def reset_peaks(self) -> None:
        self._feed()
        self._replay.allocator.reset_peaks()

    def empty_cache(self) -> None:
        self._feed()
        self._replay.allocator.empty_cache()

    def _feed(self) -> None:
        events = self._ledger.events()
        fresh = [event for event in events[self._fed :] if not _on_host(*event)]
        for holding, change in fresh:
            self._held[holding] += change
        self._replay.feed(fresh)
        self._fed = len(events)


_KEPT = "(workspaces)"


def _on_host(holding: Holding, change: int) -> bool:
    """Whether this is a step count, which foreach and plain optimizers keep in host memory."""
    return holding.role == Role.OPTIMIZER and abs(change) <= 8


def _move(module: nn.Module, moved: dict[int, Tensor]) -> None:
    """Allocate a module's tensors in the order of ``Module._apply``: children first."""
    for child in module.children():
        _move(child, moved)
    for name, parameter in module._parameters.items():
        if parameter is not None:
            if id(parameter) not in moved:
                there = torch.empty_like(parameter, device="cpu")
                moved[id(parameter)] = nn.Parameter(there, requires_grad=parameter.requires_grad)
            module._parameters[name] = moved[id(parameter)]
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = torch.empty_like(buffer, device="cpu")
