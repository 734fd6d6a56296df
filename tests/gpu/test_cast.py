"""Policies carried out on CUDA: contexts, islands, full precision, TF32."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from narrowcast.policy import policy_named
from narrowcast.precision.cast import (
    backward_context,
    forward_context,
    full_precision,
    numeric_settings,
    prepare_model,
)

pytestmark = pytest.mark.gpu
BF16, FP32 = torch.bfloat16, torch.float32


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16), nn.Linear(16, 16), nn.Linear(16, 4))


@pytest.mark.parametrize("name", ["fp32", "fp16", "bf16", "bf16-true"])
def test_a_prepared_model_trains_on_cuda(name: str) -> None:
    """Weights live on the GPU in the storage format; gradients are finite and in that format."""
    policy, model = policy_named(name), net()
    prepare_model(model, policy, "cuda")

    with forward_context(policy, "cuda"):
        loss = model(torch.ones(8, 16, device="cuda")).float().square().mean()
    loss.backward()

    wanted = BF16 if name == "bf16-true" else FP32
    assert {p.dtype for p in model.parameters()} == {wanted}
    assert all(p.is_cuda and p.grad.dtype == wanted for p in model.parameters())
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", ["fp16", "bf16"])
def test_the_forward_context_is_torchs_autocast(name: str) -> None:
    """The same bits as under torch.autocast."""
    policy, model, x = policy_named(name), net().cuda(), torch.randn(8, 16, device="cuda")
    with torch.autocast("cuda", BF16 if name == "bf16" else torch.float16):
        expected = model(x)

    with forward_context(policy, "cuda"):
        found = model(x)

    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_islands_hold_in_forward_backward_and_recomputation(reentrant: bool | None) -> None:
    """An island's inputs and weight gradients are those of an fp32 layer, checkpointed or not."""
    policy, model = policy_named("bf16").keeping_fp32("2"), net()
    prepare_model(model, policy, "cuda")
    met: list[torch.dtype] = []
    model[2].register_forward_pre_hook(lambda _, args: met.append(args[0].dtype))
    x = torch.randn(8, 16, device="cuda", requires_grad=True)

    with forward_context(policy, "cuda"):
        y = model(x) if reentrant is None else checkpoint(model, x, use_reentrant=reentrant)
        loss = y.float().square().sum()
    with backward_context(policy, "cuda"):
        loss.backward()

    assert set(met) == {FP32}
    assert len(met) == (1 if reentrant is None else 2)
    assert y.dtype == BF16
    # bf16 gradients would be multiples of bf16 numbers: fp32 ones are not.
    gradient = model[2].weight.grad
    assert gradient is not None
    assert not torch.equal(gradient, gradient.bfloat16().float())


def test_full_precision_on_cuda() -> None:
    """bf16-true weights evaluate in fp32, inside an autocast, and come back bit for bit."""
    model = net()
    prepare_model(model, policy_named("bf16-true"), "cuda")
    before = [(p.data_ptr(), p.detach().clone()) for p in model.parameters()]
    plain = net().cuda()
    plain.load_state_dict({k: v.float() for k, v in model.state_dict().items()})
    x = torch.randn(8, 16, device="cuda")

    with torch.no_grad(), torch.autocast("cuda", BF16), full_precision(model):
        found = model(x)

    assert found.dtype == FP32
    with torch.no_grad():
        assert torch.equal(found, plain(x))
    for weight, (pointer, bits) in zip(model.parameters(), before, strict=True):
        assert weight.data_ptr() == pointer
        assert torch.equal(weight, bits)


def error_of(a: Tensor, b: Tensor) -> float:
    """Relative error of a product against fp64."""
    exact = a.double() @ b.double()
    return float((a @ b - exact).norm() / exact.norm())


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0),
    reason="TF32 needs compute capability 8.0",
)
def test_fp32_means_fp32_and_tf32_means_tf32() -> None:
    """The switches decide: errors near 2^-24 in fp32, near 2^-11 in tf32, and fp32 again after."""
    a, b = (torch.randn(512, 512, device="cuda") for _ in range(2))

    with numeric_settings(policy_named("tf32")):
        coarse = error_of(a, b)
        with numeric_settings(policy_named("fp32")):
            fine = error_of(a, b)
        again = error_of(a, b)

    # Rounding both factors to 11 significant bits leaves about 2^-11.5; fp32 stays below 2^-18.
    assert fine < 2**-18 < 2**-13 < coarse < 2**-9
    assert again == coarse


def test_cudnn_convolutions_follow_the_policy() -> None:
    """cuDNN would use TF32 by default; under policy fp32 a convolution keeps fp32's bits."""
    x, w = torch.randn(4, 32, 16, 16, device="cuda"), torch.randn(32, 32, 3, 3, device="cuda")
    exact = torch.conv2d(x.cpu().double(), w.cpu().double())

    with numeric_settings(policy_named("fp32")):
        found = torch.conv2d(x, w)

    # TF32 would leave 2^-11; cuDNN's Winograd kernels lose some of fp32's bits, but not that many.
    assert float((found.cpu() - exact).norm() / exact.norm()) < 2**-15
