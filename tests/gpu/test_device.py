"""What a real CUDA device says about itself, and what is chosen and refused on it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from narrowcast.errors import UsageError
from narrowcast.policy import POLICIES
from narrowcast.precision.device import (
    choose_policy,
    device_at_hand,
    environment,
    measure_device,
    require,
    warnings_before_run,
)
from narrowcast.records.codec import dumps, loads
from narrowcast.records.device import DeviceRecord

pytestmark = pytest.mark.gpu


def test_the_gpu_is_at_hand() -> None:
    """Nothing asked: CUDA. An index beyond the last one is an error."""
    count = torch.cuda.device_count()

    assert device_at_hand().type == "cuda"
    assert device_at_hand("cpu").type == "cpu"
    with pytest.raises(UsageError, match=f"there is {count} cuda device"):
        device_at_hand(f"cuda:{count}")


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0),
    reason="a fact about Ampere and later",
)
def test_an_ampere_or_later_gpu_can_everything_and_is_given_bf16() -> None:
    """No policy is refused; auto chooses bf16 and names the compute capability."""
    device = device_at_hand("cuda")
    for policy in POLICIES.values():
        require(policy, device)

    policy, why = choose_policy(device)

    assert policy.name == "bf16"
    assert "compute capability" in why


def test_the_doctor_measures_a_gpu() -> None:
    """Every supported format has positive figures, in seconds, and the record survives JSON."""
    record = measure_device(device_at_hand("cuda"))

    measured = [f for f in record.formats if f.supported]
    assert {"fp32", "fp16"} <= {f.format for f in measured}
    assert all((f.matmul_gflops or 0) > 0 and (f.conv_relative or 0) > 0 for f in measured)
    assert record.name == torch.cuda.get_device_name()
    assert record.memory_bytes == torch.cuda.get_device_properties(0).total_memory
    assert record.seconds < 60
    assert loads(DeviceRecord, dumps(record)) == record


def test_what_is_said_before_a_run_is_text() -> None:
    """The measurement behind the warnings works on CUDA; how many there are, the GPU decides."""
    said = warnings_before_run(POLICIES["fp16"], device_at_hand("cuda"), nn.Conv2d(1, 1, 3))

    assert all("this device" in sentence for sentence in said)
    assert environment(device_at_hand("cuda")).device_name == torch.cuda.get_device_name()
