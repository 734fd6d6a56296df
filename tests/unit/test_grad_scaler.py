"""What our GradScaler adds to torch's; that it keeps the rest is shown in tests/numerics."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from narrowcast.dropin.grad_scaler import GradScaler
from narrowcast.errors import (
    PrecisionError,
    UnknownName,
    UnsupportedPrecision,
    UsageError,
)
from narrowcast.scaling.scales import DynamicScale, NoScale
from narrowcast.scaling.skips import StepOutcome
from scaler_loop import INF, NAN, Loop


@pytest.fixture(params=[False, True], ids=["plain", "fused"])
def fused(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.mark.parametrize(
    "build",
    [
        lambda: GradScaler("cpu", 8.0, 3.0, 0.25, 7, True),
        lambda: GradScaler(device="cpu", init_scale=8.0, growth_factor=3.0, backoff_factor=0.25,
                           growth_interval=7, enabled=True),
        lambda: GradScaler("cpu", 8.0, growth_factor=3.0, backoff_factor=0.25, growth_interval=7),
        lambda: GradScaler(torch.device("cpu"), 8.0, 3.0, 0.25, 7),
        lambda: GradScaler("cpu:0", 8.0, 3.0, 0.25, 7),
        lambda: GradScaler(8.0, 3.0, 0.25, 7, True),
        lambda: GradScaler(8, 3.0, 0.25, growth_interval=7),
    ],
)  # fmt: skip
def test_both_of_torchs_signatures_are_accepted(build: Callable[[], GradScaler]) -> None:
    """`torch.amp`'s begins with the device, the deprecated `torch.cuda.amp`'s with the scale."""
    scaler = build()

    assert isinstance(scaler, torch.amp.GradScaler)
    assert scaler.is_enabled()
    assert scaler.value == DynamicScale(scale=8.0, growth=3.0, backoff=0.25, interval=7)


def test_without_arguments_the_device_is_the_one_at_hand() -> None:
    """Tutorials write GradScaler(); on a machine without CUDA torch's would disable itself."""
    scaler = GradScaler()
    loss = scaler.scale(torch.ones((), device="cuda" if torch.cuda.is_available() else "cpu"))

    assert scaler.is_enabled()
    assert loss.item() == 2.0**16


@pytest.mark.parametrize(
    ("args", "options"),
    [((8.0, 2.0, 0.5, 1, True, True), {}), (("cpu", 8.0), {"init_scale": 4.0}), ((), {"flor": 1})],
)
def test_a_call_that_torchs_signature_refuses_is_a_type_error(
    args: tuple[Any, ...], options: dict[str, Any]
) -> None:
    """Too many arguments, one given twice, an unknown one."""
    with pytest.raises(TypeError):
        GradScaler(*args, **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is present")
def test_an_absent_device_is_an_error() -> None:
    """Torch's warns and disables itself, and a run labelled fp16 goes on without scaling."""
    with pytest.raises(UnsupportedPrecision, match="'cuda'") as caught:
        GradScaler("cuda")

    assert "cpu" in caught.value.hint
    assert not GradScaler("cuda", enabled=False).is_enabled()


def test_an_unknown_device_is_an_error() -> None:
    """The nearest valid names are in the hint."""
    with pytest.raises(UnknownName, match="gpu"):
        GradScaler("gpu")


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"growth_factor": 1.0}, AssertionError),
        ({"backoff_factor": 1.0}, AssertionError),
        ({"backoff_factor": 0.0}, UsageError),
        ({"init_scale": 0.0}, UsageError),
        ({"init_scale": INF}, UsageError),
        ({"init_scale": NAN}, UsageError),
        ({"floor": 0.0}, UsageError),
        ({"floor": 2.0**17}, UsageError),
        ({"ceiling": 2.0}, UsageError),
        ({"hysteresis": 0}, UsageError),
        ({"window_overflows": -1}, UsageError),
        ({"growth_interval": 0}, UsageError),
        ({"max_consecutive_skips": 0}, UsageError),
        ({"max_consecutive_skips": -1}, UsageError),
        ({"max_consecutive_skips": "x"}, UsageError),
        ({"max_consecutive_skips": 1.5}, UsageError),
    ],
    ids=str,
)
def test_settings_that_make_no_sense_are_refused(
    options: dict[str, Any], error: type[Exception]
) -> None:
    """What torch asserts stays torch's error; the rest is ours."""
    with pytest.raises(error):
        GradScaler("cpu", **options)


def test_an_initial_scale_below_one_lowers_the_floor() -> None:
    """A loop that asks for such a scale gets it; with `floor` given, the two must agree."""
    assert GradScaler("cpu", init_scale=0.25).value.floor == 0.25
    with pytest.raises(UsageError, match=r"0\.25"):
        GradScaler("cpu", init_scale=0.25, floor=1.0)


def test_step_says_whether_it_stepped(fused: bool) -> None:
    """True and the weight moves, or false, the reason, and the weight stays."""
    loop = Loop(fused=fused)

    assert loop.step()
    assert loop.weight.tolist() == [0.5, 0.5]
    outcome = loop.overflow()
    assert isinstance(outcome, StepOutcome)
    assert not outcome
    assert (outcome.step, outcome.reason) == (2, "gradient overflow")
    assert outcome.parameters == ("group 0 parameter 0 of shape (2,)",)
    assert loop.scaler.last_outcome is outcome
    assert loop.weight.tolist() == [0.5, 0.5]


class Answering(torch.optim.SGD):
    """An optimizer whose step returns something."""

    def step(self, closure: object = None) -> str:  # type: ignore[override]
        super().step()
        return "answer"


def test_what_the_optimizer_returns_is_returned() -> None:
    """As with torch; whether it stepped then stands in `last_outcome`."""
    weight = nn.Parameter(torch.ones(2))
    loop = Loop(optimizer=Answering([weight], lr=0.5))
    loop.weight = weight

    assert loop.step() == "answer"
    assert loop.scaler.last_outcome
    assert not loop.overflow()
    assert loop.scaler.last_outcome is not None
    assert not loop.scaler.last_outcome.applied


def test_arguments_of_step_reach_the_optimizer() -> None:
    """Accelerate passes its closure, None, by position; by name torch refuses one."""
    loop = Loop()
    loop.scaler.scale(loop.weight.sum()).backward()

    assert loop.scaler.step(loop.optimizer, None)
    with pytest.raises(RuntimeError, match="Closure"):
        loop.scaler.step(loop.optimizer, closure=lambda: 0.0)


def test_the_ledger_lists_skips_with_step_reason_scale_and_names() -> None:
    """Step numbers count all steps, from 1; names are those given."""
    loop = Loop()
    loop.scaler = GradScaler("cpu", names=[("w", loop.weight)])
    loop.step()
    loop.overflow()
    loop.step()
    loop.step(gradient=NAN, loss=NAN)

    found = [(s.step, s.reason, s.loss_scale, s.parameters) for s in loop.scaler.skips]
    assert found == [
        (2, "gradient overflow", 2.0**16, ("w",)),
        (4, "non-finite loss", 2.0**15, ("w",)),
    ]


def test_overflow_never_takes_the_scale_below_the_floor(fused: bool) -> None:
    """After a thousand overflows torch's scale is 0 and the next clean step writes NaN."""
    loop = Loop(fused=fused, max_consecutive_skips=None)
    for _ in range(1000):
        loop.overflow()

    assert loop.scaler.get_scale() == 1.0
    assert loop.step()
    assert loop.weight.tolist() == [0.5, 0.5]


def test_the_floor_can_be_chosen(fused: bool) -> None:
    """Users' cure for pytorch#40497: a floor of 128."""
    loop = Loop(fused=fused, floor=128.0, max_consecutive_skips=None)
    for _ in range(50):
        loop.overflow()

    assert loop.scaler.get_scale() == 128.0


def test_growth_stops_at_the_ceiling(fused: bool) -> None:
    """The ceiling caps the scale, step after step."""
    loop = Loop(fused=fused, ceiling=2.0**17, growth_interval=1)
    for _ in range(5):
        loop.step()

    assert loop.scaler.get_scale() == 2.0**17


@pytest.mark.parametrize("bad", [NAN, INF])
def test_a_bad_loss_leaves_the_scale_alone(fused: bool, bad: float) -> None:
    """Lowering the scale cannot cure a forward pass; neither scale nor growth counter moves."""
    loop = Loop(fused=fused, growth_interval=3)
    loop.step()
    loop.step()
    outcome = loop.step(gradient=bad, loss=bad)

    assert outcome.reason == "non-finite loss"
    assert loop.scaler.get_scale() == 2.0**16
    assert loop.scaler._get_growth_tracker() == 2
    loop.step()
    assert loop.scaler.get_scale() == 2.0**17


def test_an_overflow_of_the_scaled_loss_is_an_overflow() -> None:
    """1e35 is a finite loss; times 2^16 it is not, and a lower scale cures that."""
    loop = Loop()
    outcome = loop.step(gradient=1e35)

    assert outcome.reason == "gradient overflow"
    assert loop.scaler.get_scale() == 2.0**15


def test_a_bad_loss_with_good_gradients_is_no_skip() -> None:
    """An infinite constant in the loss has no gradient; torch steps, and so do we."""
    loop = Loop()

    assert loop.step(loss=INF)


def test_one_bad_micro_batch_is_enough() -> None:
    """Losses are watched over the whole accumulation."""
    loop = Loop()
    for value in (0.0, NAN, 0.0):
        loop.scaler.scale((loop.weight * (1.0 + value)).sum()).backward()
    outcome = loop.scaler.step(loop.optimizer)
    loop.scaler.update()

    assert outcome.reason == "non-finite loss"
    assert loop.scaler.get_scale() == 2.0**16
    assert loop.step(), "the next step starts anew"


@pytest.mark.parametrize("bad", [NAN, INF])
def test_gradients_broken_after_unscaling_do_not_reach_the_weights(fused: bool, bad: float) -> None:
    """Torch checks in `unscale_` and steps with whatever is made of the gradients since."""
    loop = Loop(fused=fused)
    outcome = loop.step(unscaled=lambda gradient: gradient[0].fill_(bad))

    assert outcome.reason == "non-finite gradient"
    assert loop.weight.tolist() == [1.0, 1.0]
    assert loop.scaler.get_scale() == 2.0**16, "the scale was not the cause"


def test_gradients_changed_after_unscaling_are_used(fused: bool) -> None:
    """Clipping still works."""
    loop = Loop(fused=fused)

    assert loop.step(unscaled=lambda gradient: gradient.mul_(0.5))
    assert loop.weight.tolist() == [0.75, 0.75]


def test_unscaling_that_overflows_is_noticed(fused: bool) -> None:
    """Below 1 the scale divides up: a finite scaled gradient is infinite for the optimizer."""
    loop = Loop(fused=fused, init_scale=2.0**-20, floor=2.0**-30)
    loop.scaler.scale(loop.weight.sum()).backward()
    loop.weight.grad.fill_(1e38)
    outcome = loop.scaler.step(loop.optimizer)
    loop.scaler.update()

    assert outcome.reason == "non-finite gradient"
    assert loop.weight.tolist() == [1.0, 1.0]
    assert loop.scaler.get_scale() == 2.0**-20


def test_a_scale_below_one_works(fused: bool) -> None:
    """Whoever lowers the floor gets correct steps there."""
    loop = Loop(fused=fused, init_scale=0.25)

    assert loop.step()
    assert loop.weight.tolist() == [0.5, 0.5]


def test_several_ranks_back_off_as_torch_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """A decision by one rank's loss would set its scale apart from the others'."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    loop = Loop()

    assert loop.step(gradient=NAN, loss=NAN).reason == "gradient overflow"
    assert loop.scaler.get_scale() == 2.0**15


def test_two_optimizers_share_a_scale_and_each_has_an_outcome() -> None:
    """One overflows and skips, the other steps, and the shared scale backs off, as with torch."""
    first, second = Loop(), Loop()
    scaler = second.scaler = first.scaler
    scaler.scale(first.weight.sum() + second.weight.sum()).backward()
    second.weight.grad.fill_(INF)
    outcomes = [scaler.step(first.optimizer), scaler.step(second.optimizer)]
    scaler.update()

    assert [bool(outcome) for outcome in outcomes] == [True, False]
    assert [outcome.step for outcome in outcomes] == [1, 1]
    assert scaler.get_scale() == 2.0**15
    assert len(scaler.skips) == 1


@pytest.mark.parametrize(("bad", "expected"), [(1.0, 2.0**17), (INF, 2.0**15)])
def test_gradients_unscaled_and_never_stepped_with_count(bad: float, expected: float) -> None:
    """As in torch: `unscale_` and `update` without `step` move the scale."""
    loop = Loop(growth_interval=1)
    loop.scaler.scale(loop.weight.sum()).backward()
    loop.weight.grad.fill_(bad)
    loop.scaler.unscale_(loop.optimizer)
    loop.scaler.update()

    assert loop.scaler.get_scale() == expected
    assert loop.scaler.skips == ()


def test_calibration_from_the_default_scale_never_raises() -> None:
    """Sixteen skips from 2^16 down to 1 are ordinary, and the seventeenth step may succeed."""
    loop = Loop()
    for _ in range(16):
        assert not loop.overflow()

    assert loop.step()


@pytest.mark.parametrize("init_scale", [2.0**16, 2.0**40])
def test_overflow_at_the_floor_raises_eight_skips_later(fused: bool, init_scale: float) -> None:
    """However high the scale began: the error names steps, scale, parameter and a way out."""
    loop = Loop(fused=fused)
    loop.scaler = GradScaler("cpu", init_scale, names=[("encoder.w", loop.weight)])
    to_floor = int(math.log2(init_scale))
    for _ in range(to_floor + 7):
        loop.overflow()

    with pytest.raises(PrecisionError) as caught:
        loop.overflow()
    for part in (f"{to_floor + 8} optimizer steps", "scale 1:", "gradient overflow", "encoder.w"):
        assert part in caught.value.message
    assert "bf16" in caught.value.hint


def test_eight_bad_losses_in_a_row_raise(fused: bool) -> None:
    """No scale cures them, so there is nothing to wait for."""
    loop = Loop(fused=fused)
    for _ in range(7):
        loop.step(gradient=NAN, loss=NAN)

    with pytest.raises(PrecisionError, match="non-finite loss"):
        loop.step(gradient=NAN, loss=NAN)
    assert loop.scaler.get_scale() == 2.0**16


def test_a_number_of_skips_can_be_chosen() -> None:
    """It counts all skips in a row, curable or not."""
    loop = Loop(max_consecutive_skips=3)
    loop.overflow()
    loop.overflow()
    loop.step()
    loop.overflow()
    loop.overflow()

    with pytest.raises(PrecisionError, match="3 optimizer steps"):
        loop.overflow()


def test_whoever_catches_the_error_can_go_on() -> None:
    """The scaler is left in order: the step is closed and the row begins anew."""
    loop = Loop(max_consecutive_skips=2)
    loop.overflow()
    with pytest.raises(PrecisionError):
        loop.overflow()

    assert not loop.overflow()
    assert loop.step()
    assert len(loop.scaler.skips) == 3


@given(
    steps=st.lists(st.sampled_from("..x"), max_size=60),
    options=st.fixed_dictionaries(
        {
            "floor": st.sampled_from([1.0, 64.0]),
            "ceiling": st.sampled_from([2.0**17, 2.0**100]),
            "hysteresis": st.integers(1, 3),
            "window_overflows": st.integers(0, 2),
            "calibration_interval": st.none() | st.just(1),
        }
    ),
    fused=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_the_scaler_follows_the_value(
    steps: list[str], options: dict[str, Any], fused: bool
) -> None:
    """With any options the scaler goes where `DynamicScale.after` goes, counters and all."""
    loop = Loop(fused=fused, growth_interval=2, max_consecutive_skips=None, **options)
    value = DynamicScale(interval=2, **options)
    for step in steps:
        loop.overflow() if step == "x" else loop.step()
        value = value.after(finite=step == ".")

        assert (loop.scaler.get_scale(), loop.scaler._get_growth_tracker()) == (
            (value.scale, value.good_steps)
        )
    if not value.is_torch_rule:
        assert loop.scaler.value == value


def test_bad_losses_do_not_use_up_hysteresis() -> None:
    """What is not an overflow does not count towards lowering the scale."""
    loop = Loop(hysteresis=2)
    loop.overflow()
    loop.step(gradient=NAN, loss=NAN)

    assert loop.scaler.get_scale() == 2.0**16
    loop.overflow()
    assert loop.scaler.get_scale() == 2.0**15


def test_a_disabled_scaler_is_torchs() -> None:
    """Nothing is scaled, watched or recorded, and `step` returns what the optimizer does."""
    loop = Loop(enabled=False)
    loss = torch.ones(2)

    assert loop.scaler.scale(loss) is loss
    assert loop.step() is None
    assert loop.weight.tolist() == [0.5, 0.5]
    assert loop.scaler.get_scale() == 1.0
    assert loop.scaler.value == NoScale()
    assert loop.scaler.state_dict() == {}
    assert loop.scaler.last_outcome is None
    assert loop.scaler.skips == ()
    loop.scaler.load_state_dict({"scale": 0.0})
    assert pickle.loads(pickle.dumps(loop.scaler)).is_enabled() is False
