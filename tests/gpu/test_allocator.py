"""The simulated allocator and the emulated kernels, held against CUDA's own counters."""

from __future__ import annotations

import gc
import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from narrowcast.memory.measure import MemoryLedger
from narrowcast.memory.storages import Role
from narrowcast.prediction.allocator import CachingAllocator, Replay, replay
from narrowcast.prediction.cuda_ops import cuda_kernels
from narrowcast.prediction.gpus import Gpu

pytestmark = pytest.mark.gpu

MIB = 2**20


def this_gpu() -> Gpu:
    found = torch.cuda.get_device_properties(0)
    return Gpu(
        name="this",
        title=found.name,
        sm=10 * found.major + found.minor,
        multiprocessors=found.multi_processor_count,
        memory_bytes=found.total_memory,
    )


def empty_gpu() -> None:
    """Leave nothing cached, workspaces included, so that both start from an empty device."""
    gc.collect()
    torch.cuda.synchronize()
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    if torch.cuda.memory_reserved():
        pytest.skip("another test left memory on the device; run this file alone")


def counters() -> tuple[int, int, int]:
    stats = torch.cuda.memory_stats()
    return (
        stats["requested_bytes.all.current"],
        stats["allocated_bytes.all.current"],
        stats["reserved_bytes.all.current"],
    )


@pytest.mark.parametrize("seed", range(5))
def test_the_simulator_equals_the_allocator_after_every_step(seed: int) -> None:
    """500 allocations and frees of all sizes: requested, allocated and reserved are equal."""
    empty_gpu()
    chance = random.Random(seed)
    simulated, held = CachingAllocator(), []
    for _ in range(500):
        if held and chance.random() < 0.45:
            tensor, block = held.pop(chance.randrange(len(held)))
            del tensor
            simulated.free(block)
        else:
            size = chance.choice((chance.randint(1, 4096), chance.randint(1, 40 * MIB)))
            held.append(
                (torch.empty(size, dtype=torch.uint8, device="cuda"), simulated.malloc(size))
            )
        now = simulated.now

        assert (now.requested_bytes, now.allocated_bytes, now.reserved_bytes) == counters()
    held.clear()


def test_the_segments_of_a_recorded_step_are_reproduced() -> None:
    """A replay of the recorded allocations makes segments of the same sizes in the same order."""
    empty_gpu()
    torch.cuda.memory._record_memory_history(stacks="python")
    try:
        train(steps=2)
        gc.collect()
        trace = torch.cuda.memory._snapshot()["device_traces"][0]
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)
    recorded = [entry["size"] for entry in trace if entry["action"] == "segment_alloc"]
    run, made, reserved = Replay(), [], 0
    for entry in trace:
        if entry["action"] == "alloc":
            run.feed([(entry["addr"], entry["size"])])
        elif entry["action"] == "free_completed":
            run.feed([(entry["addr"], -entry["size"])])
        grown = run.allocator.now.reserved_bytes - reserved
        reserved += grown
        if grown:
            made.append(grown)

    assert made == recorded


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.feed = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width), nn.Dropout(0.1)
        )

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        parts = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, -1)
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        result: Tensor = x + self.feed(self.norm2(x))
        return result


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(8000, 512)
        self.blocks = nn.Sequential(*(Block(512, 8) for _ in range(4)))
        self.head = nn.Linear(512, 8000, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        result: Tensor = self.head(self.blocks(self.tokens(ids)))
        return result


def step_of(
    model: nn.Module, optimizer: torch.optim.Optimizer, ids: Tensor, dtype: torch.dtype | None
) -> None:
    device = ids.device.type
    optimizer.zero_grad()
    with torch.autocast(device, dtype=dtype or torch.bfloat16, enabled=dtype is not None):
        loss = F.cross_entropy(model(ids).flatten(0, 1), ids.flatten())
    loss.backward()
    optimizer.step()


def train(*, steps: int, dtype: torch.dtype | None = None, fused: bool | None = None) -> None:
    model = Decoder().cuda()
    optimizer = torch.optim.AdamW(model.parameters(), fused=fused)
    ids = torch.randint(0, 8000, (8, 256), device="cuda")
    for _ in range(steps):
        step_of(model, optimizer, ids, dtype)


class Answers(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return 1.0
        return func(*args, **(kwargs or {}))


def predicted(
    *, steps: int, dtype: torch.dtype | None = None, fused: bool | None = None
) -> tuple[int, int]:
    with FakeTensorMode():
        model = Decoder()
        optimizer = torch.optim.AdamW(model.parameters(), fused=fused)
        ids = torch.randint(0, 8000, (8, 256))
        ledger = MemoryLedger(model, optimizer, device="cpu")
        cudnn = torch.backends.cudnn.version() or 0
        with ledger, Answers(), cuda_kernels(this_gpu(), cudnn_version=cudnn):
            ledger.inputs(ids)
            for _ in range(steps):
                step_of(model, optimizer, ids, dtype)
    # Step counts, which are four bytes each, are in host memory unless the optimizer is fused.
    peaks = replay(
        event
        for event in ledger.events()
        if fused or event[0].role != Role.OPTIMIZER or abs(event[1]) > 4
    )
    return peaks.allocated_bytes, peaks.reserved_bytes


@pytest.mark.parametrize("fused", [None, True])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_a_transformer_peaks_where_it_is_predicted_to(
    dtype: torch.dtype | None, fused: bool | None
) -> None:
    """A decoder of 21 M parameters: within 2 % on allocated and 3 % on reserved.

    The bound of the plan for transformers (2 % in the worst case), and a segment of 20 MiB more on
    this small one for reserved.
    """
    empty_gpu()
    train(steps=3, dtype=dtype, fused=fused)
    found = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()

    expected = predicted(steps=3, dtype=dtype, fused=fused)

    assert expected[0] == pytest.approx(found[0], rel=0.02)
    assert expected[1] == pytest.approx(found[1], rel=0.03)
