"""Executed dtypes on CUDA, where backward runs in another thread and TF32 hides behind fp32."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from narrowcast.policy import policy_named
from narrowcast.precision.cast import forward_context, numeric_settings, prepare_model
from narrowcast.precision.executed import ExecutedDtypes, honoured

pytestmark = pytest.mark.gpu


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.conv = nn.Embedding(10, 64), nn.Conv1d(64, 64, 3, padding=1)
        self.head = nn.Linear(64, 10)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        heads = x.unflatten(-1, (1, 64)).transpose(1, 2)
        x = F.scaled_dot_product_attention(heads, heads, heads).transpose(1, 2).flatten(2)
        return self.head(self.conv(x.transpose(1, 2)).transpose(1, 2))


@pytest.mark.parametrize("name", ["fp32", "tf32", "fp16", "bf16", "bf16-true"])
def test_each_policy_is_carried_out_on_cuda(name: str) -> None:
    """Products and convolutions, forward and backward, execute in the policy's format."""
    if name == "tf32" and torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("TF32 needs compute capability 8.0")
    policy, model = policy_named(name), Net()
    prepare_model(model, policy, "cuda")
    ids = torch.arange(10, device="cuda").repeat(2, 4)

    with numeric_settings(policy), ExecutedDtypes() as executed:
        with forward_context(policy, "cuda"):
            loss = F.cross_entropy(model(ids).flatten(0, 1).float(), ids.flatten())
        loss.backward()

    counts = executed.counts
    assert counts["conv"] == {policy.compute: 2}, "forward and, from the other thread, backward"
    assert counts["matmul"][policy.compute] >= 3
    assert honoured(policy, counts) == (True, ())


def test_tf32_under_the_name_of_fp32_is_found_out() -> None:
    """With TF32 on, a run that calls itself fp32 is not honoured."""
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("TF32 needs compute capability 8.0")
    a = torch.ones(16, 16, device="cuda")

    with numeric_settings(policy_named("tf32")), ExecutedDtypes() as executed:
        a @ a

    kept, notes = honoured(policy_named("fp32"), executed.counts)
    assert not kept
    assert notes[0] == "1 of 1 matmul calls executed in tf32, not in fp32"
