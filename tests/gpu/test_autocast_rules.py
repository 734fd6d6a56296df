"""The proof of the rehearsal: real CUDA autocast and its rehearsal on a CPU agree, op by op."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from autocast_samples import CALLS, UNLISTED, Call, dtypes
from narrowcast.precision.autocast_rules import CUDA_LISTS, rehearse

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore::UserWarning"),  # some listed operations are deprecated
]

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
PAIRS = [(BF16, BF16), (BF16, FP32), (FP16, FP16), (FP16, FP32)]
ALL = {**CALLS, **UNLISTED}


def run(call: Call, device: str, dtype: torch.dtype, lower: torch.dtype) -> Any:
    """Make the call under the device's autocast with inputs of this dtype."""

    def floats(*shape: int) -> Tensor:
        return (torch.rand(*shape, device=device) * 0.8 + 0.1).to(dtype)

    with torch.autocast(device, lower):
        return call(floats, lambda values: torch.tensor(values, device=device))


@pytest.mark.parametrize("op", [op for op in ALL if CUDA_LISTS.rule_of(op) != "banned"])
def test_rehearsed_dtypes_are_cudas(op: str) -> None:
    """On bf16, fp16 and fp32 inputs, CUDA's results and the rehearsal's have the same dtypes."""
    for lower, dtype in PAIRS:
        try:
            real = dtypes(run(ALL[op], "cuda", dtype, lower))
        except NotImplementedError as error:
            pytest.skip(f"no CUDA kernel: {error}")
        with rehearse("cuda"):
            rehearsed = dtypes(run(ALL[op], "cpu", dtype, lower))

        assert rehearsed == real, f"autocast {lower}, inputs {dtype}"


def test_cuda_bans_what_the_rehearsal_bans() -> None:
    """binary_cross_entropy raises under CUDA's autocast."""
    x = torch.full((3,), 0.5, device="cuda")

    with torch.autocast("cuda", BF16), pytest.raises(RuntimeError, match="unsafe to autocast"):
        F.binary_cross_entropy(x, x)


class Block(nn.Module):
    """A transformer block, written out so that both devices run the same operations."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        return x + self.out(torch.softmax(q @ k.mT / 8**0.5, -1) @ v).exp()


class Casts(TorchDispatchMode):
    """Counts the conversions to 16 bits."""

    def __init__(self) -> None:
        super().__init__()
        self.made = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._to_copy.default and kwargs.get("dtype") in (BF16, FP16):
            self.made += 1
        return func(*args, **(kwargs or {}))


def saved_by(device: str) -> tuple[dict[int, set[torch.dtype]], int]:
    """Train one step; return the dtypes saved for backward by size, and the 16-bit casts made."""
    torch.manual_seed(0)
    model, x = Block().to(device), torch.ones(2, 4, 8, device=device)
    saved: dict[int, set[torch.dtype]] = defaultdict(set)

    def note(tensor: Tensor) -> Tensor:
        saved[tensor.numel()].add(tensor.dtype)
        return tensor

    hooks: Callable[..., Any] = torch.autograd.graph.saved_tensors_hooks
    with Casts() as casts, torch.autocast(device, BF16), hooks(note, lambda t: t):
        loss = F.mse_loss(model(x), x)
    loss.backward()
    return saved, casts.made


def test_the_rehearsal_saves_for_backward_what_cuda_saves() -> None:
    """Sizes and dtypes of the saved tensors agree, and so does the number of 16-bit casts."""
    with rehearse("cuda"):
        rehearsed = saved_by("cpu")

    assert rehearsed == saved_by("cuda")
