"""Fused steps whose outcome stays on the device: the same rule, read late."""

from __future__ import annotations

import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import nn

from narrowcast.dropin.grad_scaler import GradScaler
from narrowcast.errors import (
    PrecisionError,
)
from scaler_loop import INF, NAN, Loop


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fused steps stay unread, as on CUDA."""
    monkeypatch.setattr(GradScaler, "_reads_are_free", lambda _: False)


HISTORY = [1.0, 1.0, "overflow", 1.0, "bad loss", 1.0, "broken", 1.0, 1.0, 1.0] * 2


def run_history(loop: Loop) -> list[Any]:
    seen = []
    for event in HISTORY:
        if event == "overflow":
            outcome = loop.overflow()
        elif event == "bad loss":
            outcome = loop.step(gradient=NAN, loss=NAN)
        elif event == "broken":
            outcome = loop.step(unscaled=lambda gradient: gradient.fill_(INF))
        else:
            outcome = loop.step(event)
        seen.append(outcome)
    return seen


@pytest.mark.usefixtures("unread")
def test_deciding_on_the_device_gives_the_same_scale_weights_and_ledger() -> None:
    """The rule carried out unread equals the one that reads, event for event."""
    unread, read = Loop(fused=True, growth_interval=2), Loop(growth_interval=2)
    unread_outcomes, outcomes = run_history(unread), run_history(read)

    assert unread.scaler.get_scale() == read.scaler.get_scale()
    assert unread.scaler._get_growth_tracker() == read.scaler._get_growth_tracker()
    assert unread.weight.tolist() == read.weight.tolist()
    assert [o.reason for o in unread_outcomes] == [o.reason for o in outcomes]
    assert [(s.step, s.reason, s.loss_scale) for s in unread.scaler.skips] == [
        (s.step, s.reason, s.loss_scale) for s in read.scaler.skips
    ]


@pytest.mark.usefixtures("unread")
def test_nothing_is_read_until_sixteen_steps_or_a_question() -> None:
    """Outcomes of fused steps wait on the device; asking one reads it and it alone."""
    loop = Loop(fused=True)
    outcomes = [loop.step() for _ in range(15)]

    assert all(outcome.flags is not None for outcome in outcomes)
    assert outcomes[3].applied
    assert [outcome.flags is None for outcome in outcomes].count(True) == 1
    loop.step()
    assert all(outcome.flags is None for outcome in outcomes)


@pytest.mark.usefixtures("unread")
def test_asking_within_the_step_changes_nothing() -> None:
    """Reading the outcome before `update` leads to the same scale."""
    loop = Loop(fused=True)
    loop.scaler.scale(loop.weight.sum()).backward()
    loop.weight.grad.fill_(INF)

    assert not loop.scaler.step(loop.optimizer)
    loop.scaler.update()
    assert loop.scaler.get_scale() == 2.0**15


@pytest.mark.usefixtures("unread")
def test_a_hopeless_row_raises_sixteen_steps_late_at_most() -> None:
    """The error comes with the next reading and says why; a loss is no parameter's fault."""
    loop = Loop(fused=True)
    loop.scaler = GradScaler("cpu", names=[("w", loop.weight)])

    for _ in range(15):
        loop.step(gradient=NAN, loss=NAN)
    with pytest.raises(PrecisionError, match=r"16 optimizer steps.*: non-finite loss\nhint"):
        loop.step(gradient=NAN, loss=NAN)
    assert loop.scaler.get_scale() == 2.0**16
    assert loop.weight.tolist() == [1.0, 1.0]


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize("options", [{"hysteresis": 2}, {"window_overflows": 1}])
def test_our_options_are_decided_on_the_host(options: dict[str, int]) -> None:
    """Torch's kernel does not know them, so the flags are read, and the result is the same."""
    unread = Loop(fused=True, growth_interval=2, **options)
    read = Loop(growth_interval=2, **options)
    run_history(unread)
    run_history(read)

    assert unread.scaler.value == read.scaler.value


@pytest.mark.usefixtures("unread")
def test_saving_reads_what_is_unread() -> None:
    """A checkpoint holds the ledger of all steps before it."""
    loop = Loop(fused=True)
    loop.overflow()

    assert len(loop.scaler.state_dict()["narrowcast"]["ledger"]["skips"]) == 1
    assert pickle.loads(pickle.dumps(loop.scaler)).skips[0].reason == "gradient overflow"


@pytest.mark.usefixtures("unread")
def test_a_fused_and_a_plain_optimizer_share_a_scaler() -> None:
    """What is known and what is unread are brought together at `update`."""
    fused, plain = Loop(fused=True), Loop()
    scaler = plain.scaler = fused.scaler
    for bad in (fused, plain):
        scaler.scale(fused.weight.sum() + plain.weight.sum()).backward()
        bad.weight.grad.fill_(INF)
        outcomes = [scaler.step(fused.optimizer), scaler.step(plain.optimizer)]
        scaler.update()
        fused.optimizer.zero_grad()
        plain.optimizer.zero_grad()

        assert [bool(o) for o in outcomes] == [bad is plain, bad is fused]
    assert scaler.get_scale() == 2.0**14


class TakesScaler(torch.optim.SGD):
    """The older contract of torch: the optimizer is handed the scaler and does as it likes."""

    _step_supports_amp_scaling = True

    def step(self, closure: object = None, *, grad_scaler: Any = None) -> None:  # type: ignore[override]
        grad_scaler.unscale_(self)


@pytest.mark.parametrize("device_side", [False, True])
def test_an_optimizer_that_takes_the_scaler_works(
    device_side: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It gets ours, which is one of torch's."""
    monkeypatch.setattr(GradScaler, "_reads_are_free", lambda _: not device_side)
    weight = nn.Parameter(torch.ones(2))
    scaler, optimizer = GradScaler("cpu"), TakesScaler([weight])
    scaler.scale(weight.sum()).backward()
    with pytest.warns(FutureWarning):
        outcome = scaler.step(optimizer)
    scaler.update()

    assert outcome
    assert weight.grad is not None
    assert weight.grad.tolist() == [1.0, 1.0]


def test_no_warning_is_raised_in_an_ordinary_loop() -> None:
    """A drop-in that warns where torch does not is no drop-in."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loop = Loop()
        for _ in range(3):
            loop.step()

    assert loop.scaler.skips == ()
