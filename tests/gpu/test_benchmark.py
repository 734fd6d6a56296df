"""The pieces of the GPU benchmark that a CPU cannot try."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from recorded_traces import import_benchmarks, replayed

import_benchmarks()
from gpu_parts.clock import Clock  # noqa: E402 -- the path is set above
from gpu_parts.device import Peaks, gpu_at_hand, machine  # noqa: E402
from gpu_parts.optimizer import copy_bandwidth  # noqa: E402
from gpu_parts.sheet import Ask, is_fatal  # noqa: E402
from gpu_parts.traces import CASES, recorded  # noqa: E402

from narrowcast.prediction.gpus import GPUS  # noqa: E402

pytestmark = pytest.mark.gpu

MIB = 2**20
CUDA = torch.device("cuda")


def ask(tmp_path: Path) -> Ask:
    return Ask(run="test", output=tmp_path, clock=Clock(2**40), rehearse=False)


def test_peaks_are_those_since_the_steady_step_and_reserved_since_the_start() -> None:
    """50 MiB go before the steady step: they count as reserved, and not as allocated."""
    peaks = Peaks(CUDA)
    if peaks.already_reserved:
        pytest.skip("another test left memory on the device")
    before = torch.empty(50 * MIB, dtype=torch.uint8, device=CUDA)
    del before
    torch.cuda.empty_cache()
    peaks.steady()
    kept = torch.empty(30 * MIB, dtype=torch.uint8, device=CUDA)
    found = peaks.read()

    assert found["allocated_bytes"] == kept.nbytes
    assert found["requested_bytes"] == kept.nbytes
    assert found["reserved_bytes"] == 50 * MIB


def test_running_out_of_memory_leaves_the_device_usable() -> None:
    """It is told from an error that ends a process."""
    with pytest.raises(torch.OutOfMemoryError) as caught:
        torch.empty(2**50, dtype=torch.uint8, device=CUDA)

    assert not is_fatal(caught.value)
    assert torch.ones(3, device=CUDA).sum() == 3


def test_this_gpu_is_known_and_described() -> None:
    """A record says on which GPU it was made, and predictions know its name."""
    found = machine(CUDA)

    assert found["gpu"] == torch.cuda.get_device_name(0)
    assert gpu_at_hand() in GPUS


def test_a_copy_moves_less_than_the_fastest_memory_could() -> None:
    """Between a hundredth and one and a half of what HBM3e is sold for (8 TB/s on a B200)."""
    assert 8e10 < copy_bandwidth(CUDA) < 1.2e13


@pytest.mark.parametrize("case", range(len(CASES)))
def test_recorded_segments_are_reproduced(case: int, tmp_path: Path) -> None:
    """The traces that the benchmark keeps, on the models in small."""
    name, arm = CASES[case]
    tiny = Ask(run="test", output=tmp_path, clock=Clock(2**40), rehearse=False)
    try:
        found = recorded(name, arm, tiny, tiny=True)
    except RuntimeError as error:
        if "not empty" in str(error):
            pytest.skip("another test left memory on the device")
        raise
    segments, peaks = replayed(found["events"])

    assert segments == found["segments"]
    assert peaks.allocated_bytes == found["peak"]["allocated_bytes"]


def test_a_model_is_built_where_that_is_fast_and_kept_on_the_host(tmp_path: Path) -> None:
    """Weights of a subject are on the CPU, so that each arm has the device to itself."""
    from gpu_parts.training import subject_of, workload_recipe

    subject = subject_of(workload_recipe("gpt2-124m", tiny=True), ask(tmp_path).device)

    assert isinstance(subject.model, nn.Module)
    assert all(not p.is_cuda for p in subject.model.parameters())
