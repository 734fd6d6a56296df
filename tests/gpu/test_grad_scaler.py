"""GradScaler and autocast on CUDA: torch's bits, torch's (lack of) synchronisation, our causes."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import narrowcast
from narrowcast.errors import PrecisionError, UnsupportedPrecision

pytestmark = pytest.mark.gpu
SCALERS = [torch.amp.GradScaler, narrowcast.GradScaler]


@contextmanager
def no_synchronisation() -> Iterator[None]:
    """Any wait of the host for the device raises in here."""
    torch.cuda.synchronize()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls this mode a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


class Run:
    """A small network in fp16 autocast; AdamW, fused or not; inputs made beforehand."""

    def __init__(self, scaler: Any, *, fused: bool) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)).cuda()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01, fused=fused)
        self.scaler = scaler
        self.inputs = torch.randn(40, 8, 16, device="cuda")
        self.bad = torch.tensor(math.nan, device="cuda")
        self.last: Any = None

    def step(self, i: int, event: str = "", *, clip: bool = False) -> Any:
        """One step; `event`: '', 'overflow', 'bad loss', or 'broken' after unscaling."""
        self.optimizer.zero_grad()
        with torch.autocast("cuda", torch.float16):
            loss = self.model(self.inputs[i]).float().square().mean()
        if event == "bad loss":
            loss = loss * self.bad
        self.scaler.scale(loss).backward()
        gradient = self.model[2].weight.grad
        assert gradient is not None
        if event == "overflow":
            gradient[0].fill_(math.inf)
        if clip or event == "broken":
            self.scaler.unscale_(self.optimizer)
        if clip:
            nn.utils.clip_grad_norm_(self.model.parameters(), 0.01)
        if event == "broken":
            gradient[0].fill_(math.nan)
        outcome = self.scaler.step(self.optimizer)
        self.scaler.update()
        return outcome

    def weights(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.model.parameters()]


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("clip", [False, True])
def test_training_gives_torchs_bits(fused: bool, clip: bool) -> None:
    """Twenty fp16 steps with growth and two overflows: weights, scale and counter are equal."""
    runs = [Run(c("cuda", 256.0, growth_interval=3), fused=fused) for c in SCALERS]
    for run in runs:
        for i in range(20):
            run.step(i, "overflow" if i in (4, 5) else "", clip=clip)

    assert same(runs[0].weights(), runs[1].weights())
    assert runs[0].scaler.get_scale() == runs[1].scaler.get_scale()
    assert runs[0].scaler._get_growth_tracker() == runs[1].scaler._get_growth_tracker()
    assert [skip.step for skip in runs[1].scaler.skips] == [5, 6]


def test_a_fused_step_does_not_wait_for_the_device() -> None:
    """Fifteen steps with clipping and a skip, and the host has not waited once."""
    run = Run(narrowcast.GradScaler("cuda"), fused=True)
    run.step(0)
    run.scaler.state_dict()  # reads, so that the sixteen steps are counted from here
    with no_synchronisation():
        outcomes = [run.step(i, "overflow" if i == 5 else "", clip=i > 7) for i in range(1, 15)]

    assert [bool(outcome) for outcome in outcomes] == [i != 5 for i in range(1, 15)]
    assert run.scaler.get_scale() == 2.0**15


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(
    ("event", "reason", "scale"),
    [
        ("overflow", "gradient overflow", 2.0**15),
        ("bad loss", "non-finite loss", 2.0**16),
        ("broken", "non-finite gradient", 2.0**16),
    ],
)
def test_causes_are_told_apart(fused: bool, event: str, reason: str, scale: float) -> None:
    """Only an overflow lowers the scale; none of the three reaches the weights."""
    run = Run(narrowcast.GradScaler("cuda"), fused=fused)
    run.step(0)
    before = run.weights()
    outcome = run.step(1, event)

    assert same(before, run.weights())
    assert (outcome.reason, run.scaler.get_scale()) == (reason, scale)
    assert run.scaler._get_growth_tracker() == (0 if event == "overflow" else 1)
    assert run.step(2)
    assert not same(before, run.weights())


@pytest.mark.parametrize("fused", [False, True])
def test_the_scale_stays_at_the_floor(fused: bool) -> None:
    """Two hundred overflows leave 1, where torch's scale is 0, and a clean step is a good one."""
    run = Run(narrowcast.GradScaler("cuda", max_consecutive_skips=None), fused=fused)
    for i in range(200):
        run.step(i % 40, "overflow")

    assert run.scaler.get_scale() == 1.0
    assert run.step(0)
    assert all(weight.isfinite().all() for weight in run.weights())


@pytest.mark.parametrize(("fused", "steps"), [(False, 8), (True, 16)])
def test_a_hopeless_row_raises(fused: bool, steps: int) -> None:
    """Eight NaN losses; with a fused optimizer at the next reading, sixteen steps in."""
    run = Run(narrowcast.GradScaler("cuda"), fused=fused)
    run.scaler = narrowcast.GradScaler("cuda", names=run.model.named_parameters())
    for i in range(steps - 1):
        run.step(i, "bad loss")

    with pytest.raises(PrecisionError, match=r"non-finite loss in 2\.bias"):
        run.step(0, "bad loss")


@pytest.mark.parametrize("fused", [False, True])
def test_options_of_ours_work_on_cuda(fused: bool) -> None:
    """Hysteresis decides on the host: the first overflow of a row is forgiven."""
    run = Run(narrowcast.GradScaler("cuda", hysteresis=2, growth_interval=4), fused=fused)
    scales = []
    for i, event in enumerate(["overflow", "", "overflow", "overflow", "", "", "", ""]):
        run.step(i, event)
        scales.append(run.scaler.get_scale())

    assert scales == [2.0**16] * 3 + [2.0**15] * 4 + [2.0**16]


def test_state_travels_between_fused_and_torchs() -> None:
    """Saved from a fused run with unread steps, loaded into torch's and into a new one of ours."""
    run = Run(narrowcast.GradScaler("cuda", growth_interval=2), fused=True)
    for i in range(5):
        run.step(i, "overflow" if i == 2 else "")
    state = run.scaler.state_dict()
    torchs, ours = torch.amp.GradScaler("cuda"), narrowcast.GradScaler("cuda")
    torchs.load_state_dict(state)
    ours.load_state_dict(state)

    assert torchs.get_scale() == ours.get_scale() == 2.0**17
    assert [skip.step for skip in ours.skips] == [3]
    assert ours.state_dict() == state


def test_defaults_take_the_gpu() -> None:
    """Called as tutorials call the deprecated pair: the device at hand is CUDA, the dtype fp16."""
    ones = torch.ones(2, 2, device="cuda")
    with narrowcast.autocast():
        assert (ones @ ones).dtype == torch.float16
    with narrowcast.autocast(True, torch.bfloat16):
        assert (ones @ ones).dtype == torch.bfloat16
    scaled = narrowcast.GradScaler().scale(torch.ones((), device="cuda"))

    assert (scaled.device.type, scaled.item()) == ("cuda", 2.0**16)
    with pytest.raises(UnsupportedPrecision):
        narrowcast.autocast("cuda", torch.float32)


@pytest.mark.parametrize("shape", [(), (1,), (1000,)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1.0])
def test_losses_are_watched_without_waiting(
    shape: tuple[int, ...], dtype: torch.dtype, value: float
) -> None:
    """One bad element is found on the device, in any shape, and reading waits."""
    loss = torch.ones(shape, dtype=dtype, device="cuda")
    loss.view(-1)[-1] = value
    scaler = narrowcast.GradScaler("cuda")
    with no_synchronisation():
        scaler.scale([loss, loss])
        bad = scaler._watch.was_bad(loss.device)

    assert bool(bad) == (not math.isfinite(value))
