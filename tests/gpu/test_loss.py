"""Chunked cross-entropy on CUDA: bounds, memory, no waiting for the device."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from loss_oracle import BF16, FP16, FP32, FP64, Case, check
from narrowcast.loss.cross_entropy import CHUNK_BYTES, linear_cross_entropy
from narrowcast.loss.heads import chunked_logits
from narrowcast.policy import policy_named
from narrowcast.precision.cast import forward_context, prepare_model
from narrowcast.precision.executed import ExecutedDtypes, honoured
from narrowcast.recipes import austen

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [FP64, FP32, BF16, FP16])
@pytest.mark.parametrize(
    ("tokens", "classes", "width"),
    [(0, 5, 8), (1, 1, 1), (65, 257, 16), (300, 63, 20), (64, 64, 7)],
)
def test_loss_and_gradients_are_within_the_bounds(
    dtype: torch.dtype, tokens: int, classes: int, width: int
) -> None:
    """16-bit factors are multiplied into fp32 as they are: dz is rounded once more."""
    check(
        Case(
            tokens=tokens,
            classes=classes,
            width=width,
            dtype=dtype,
            chunk_bytes=24_576,
            device="cuda",
            rounds_dz=dtype.itemsize == 2,
        )
    )


@pytest.fixture
def _no_waiting() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.usefixtures("_no_waiting")
def test_the_device_is_never_waited_for() -> None:
    """Targets are checked by the device; forward and backward queue their work and return."""
    hidden = torch.randn(300, 64, device="cuda", dtype=BF16, requires_grad=True)
    weight = torch.randn(1_000, 64, device="cuda", dtype=BF16, requires_grad=True)
    target = torch.randint(0, 1_000, (300,), device="cuda")

    linear_cross_entropy(
        hidden, weight, target, label_smoothing=0.1, chunk_bytes=200_000
    ).backward()

    assert hidden.grad is not None


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_the_allocator_peaks_within_the_promise(dtype: torch.dtype) -> None:
    """GPT-2's head at 4 x 1,024 tokens: both gradients, one fp32 sum at most, and the chunk."""
    tokens, classes, width = 4_096, 50_304, 768
    hidden = torch.randn(tokens, width, device="cuda", dtype=dtype, requires_grad=True)
    weight = torch.randn(classes, width, device="cuda", dtype=dtype, requires_grad=True)
    target = torch.randint(0, classes, (tokens,), device="cuda")
    linear_cross_entropy(hidden[:9], weight, target[:9]).backward()  # workspaces of cuBLAS
    hidden.grad = weight.grad = None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()

    linear_cross_entropy(hidden, weight, target).backward()

    found = torch.cuda.max_memory_allocated() - before
    sums = 4 * tokens * width if dtype == BF16 else 0
    small = 128 * tokens + 8 * classes + 2**20  # a few numbers each; blocks of 512 bytes
    assert found <= hidden.nbytes + weight.nbytes + sums + CHUNK_BYTES + small


@pytest.mark.parametrize("policy_name", ["fp32", "bf16", "fp16", "bf16-true"])
def test_the_built_in_gpt_trains_the_same(policy_name: str) -> None:
    """Same loss and gradients as the whole version, whose logits are 16-bit, in every policy."""
    policy = policy_named(policy_name)
    losses: list[Tensor] = []
    gradients: list[list[Tensor]] = []
    for chunked in (False, True):
        torch.manual_seed(0)
        model = austen.model(austen.Options(vocabulary=1_000, context=32))
        prepare_model(model, policy, "cuda")
        batch = (torch.randint(0, 256, (4, 33), dtype=torch.uint8).cuda(),)
        handle = chunked_logits(model, chunk_bytes=200_000) if chunked else None
        with ExecutedDtypes() as executed:
            with forward_context(policy, "cuda"):
                loss = austen.loss(model, batch)
            loss.backward()
        losses.append(loss.detach().float())
        gradients.append([p.grad.float() for p in model.parameters() if p.grad is not None])

    assert handle is not None
    assert (handle.chunked_calls, handle.materialised, handle.widened_products) == (1, [], 0)
    assert honoured(policy, executed.counts)[0]
    narrow = policy_name != "fp32"
    torch.testing.assert_close(losses[1], losses[0], rtol=2**-9 if narrow else 1e-5, atol=0)
    for a, b in zip(*gradients, strict=True):
        assert float((a - b).norm() / b.norm()) < (2**-5 if narrow else 1e-3)


def test_a_whole_version_in_fp32_agrees_under_autocast() -> None:
    """Factors rounded to bf16, logits in fp32: F.cross_entropy of those logits agrees."""
    hidden = torch.randn(100, 64, device="cuda")
    weight = torch.randn(500, 64, device="cuda") / 8
    target = torch.randint(0, 500, (100,), device="cuda")
    exact = F.linear(hidden.to(BF16).double(), weight.to(BF16).double())

    with torch.autocast("cuda", BF16):
        found = linear_cross_entropy(hidden, weight, target, chunk_bytes=100_000)

    assert found.dtype == FP32
    # Sums of 64 products and of 500 exponentials in fp32: (64 + 500) x 2^-24 at worst.
    torch.testing.assert_close(found.double(), F.cross_entropy(exact, target), rtol=5e-5, atol=0)
