"""How fast this device multiplies and convolves in each format: short measurements on the spot.

Whether 16 bits are faster is not a property of a format but of the machine: a CPU without matrix
units for bf16 is slower in it than in fp32, and has no kernel at all for the weight gradient of an
fp16 convolution. So the question is asked of the machine, in fractions of a second.

On a CPU the measure is the processor time of one thread: other programs on the machine can then
neither slow a format down nor, by stopping the fp32 run beside it, make it look fast.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch.nn import functional as F

from narrowcast.policy import POLICIES
from narrowcast.precision.cast import numeric_settings, torch_dtype
from narrowcast.precision.float8 import FORWARD

__all__ = ["conv_training_seconds", "matmul_flops", "matmul_seconds", "thread_count"]

# Large enough that the product dominates the call, small enough for milliseconds.
_MATMUL_SIZE = {"cpu": 384, "cuda": 4096}
_CONV_SHAPE = {"cpu": (4, 48, 12), "cuda": (32, 128, 32)}  # batch, channels, height and width
_WARM_UP_SIZE = 32
_WARM_UP_SHAPE = (1, 8, 8)
_MAX_RUNS = 100
_PATIENCE_S = 0.05  # of each measurement: fifty runs of a fast one, a single run of a hopeless one


def matmul_flops(device: torch.device) -> float:
    """Return the floating-point operations of the product that `matmul_seconds` times."""
    return 2.0 * _MATMUL_SIZE[device.type] ** 3


def matmul_seconds(
    device: torch.device, format_name: str, *, patience_s: float = _PATIENCE_S
) -> float:
    """Time one square matrix product in a format: the shortest of many runs."""
    with torch.no_grad(), _undisturbed(device, format_name):
        _seconds(_matmul(device, format_name, _WARM_UP_SIZE), device)
        run = _matmul(device, format_name, _MATMUL_SIZE[device.type])
        return _shortest(run, device, patience_s)


def _matmul(device: torch.device, format_name: str, size: int) -> Callable[[], object]:
    dtype = torch_dtype(FORWARD if format_name == "fp8" else format_name)
    a, b = (torch.ones(size, size, device=device).to(dtype) for _ in range(2))
    if format_name != "fp8":
        return lambda: a @ b
    one = torch.ones((), device=device)
    # The second factor of an fp8 product lies in memory column by column.
    return lambda: torch._scaled_mm(a, b.t(), one, one, out_dtype=torch.bfloat16)


def conv_training_seconds(
    device: torch.device, format_name: str, *, patience_s: float = _PATIENCE_S
) -> float:
    """Time one 3x3 convolution forward and backward, to its input and to its weight."""
    with torch.enable_grad(), _undisturbed(device, format_name):
        _seconds(_conv_step(device, format_name, _WARM_UP_SHAPE), device)
        run = _conv_step(device, format_name, _CONV_SHAPE[device.type])
        return _shortest(run, device, patience_s)


def _conv_step(
    device: torch.device, format_name: str, shape: tuple[int, int, int]
) -> Callable[[], object]:
    (batch, channels, side), dtype = shape, torch_dtype(format_name)
    x = torch.ones(batch, channels, side, side, device=device).to(dtype).requires_grad_()
    weight = torch.ones(channels, channels, 3, 3, device=device).to(dtype).requires_grad_()

    def step() -> None:
        torch.autograd.grad(F.conv2d(x, weight, padding=1).sum(), (x, weight))

    return step


@contextmanager
def thread_count(count: int) -> Iterator[None]:
    """Compute with this many threads in the block: sums over threads round by their number."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _undisturbed(device: torch.device, format_name: str) -> Iterator[None]:
    """Nothing but the format decides: no autocast, TF32 as asked for, one thread on a CPU."""
    policy = POLICIES["tf32" if format_name == "tf32" else "fp32"]
    threads = thread_count(1) if device.type == "cpu" else nullcontext()
    with threads, numeric_settings(policy), torch.autocast(device.type, enabled=False):
        yield


def _shortest(run: Callable[[], object], device: torch.device, patience_s: float) -> float:
    """Return the shortest of as many runs as fit: noise only ever makes a run longer."""
    best = spent = _seconds(run, device)
    for _ in range(_MAX_RUNS):
        if spent > patience_s:
            break
        seconds = _seconds(run, device)
        best, spent = min(best, seconds), spent + seconds
    return best


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    if device.type == "cpu":
        start = time.thread_time()
        run()
        return time.thread_time() - start
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    run()
    torch.cuda.synchronize(device)
    return time.perf_counter() - start
