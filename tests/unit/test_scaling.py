"""The loss scale as a value: bounds, torch's trajectory, options, saving and loading."""

from __future__ import annotations

import math
import warnings
from dataclasses import FrozenInstanceError, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from narrowcast.errors import CheckpointError, UsageError
from narrowcast.formats import float_format
from narrowcast.scaling.scales import (
    DynamicScale,
    LossScale,
    NoScale,
    StaticScale,
    loss_scale_from_dict,
    loss_scale_to_dict,
    sound_saved_scale,
)

FP32 = float_format("fp32")


def fp32_floats(low: float, high: float) -> st.SearchStrategy[float]:
    """Floats that fp32 holds exactly, as torch's scale tensor does."""
    low, high = (torch.tensor(x, dtype=torch.float32).item() for x in (low, high))
    return st.floats(low, high, width=32)


@st.composite
def dynamic_scales(draw: st.DrawFn) -> DynamicScale:
    """Any valid rule at any valid place, none of the options at its default in particular."""
    floor, scale, ceiling = sorted(draw(fp32_floats(FP32.tiny, FP32.max)) for _ in range(3))
    return DynamicScale(
        scale=scale,
        floor=floor,
        ceiling=ceiling,
        growth=draw(st.floats(1.001, 1e9)),
        backoff=draw(st.floats(1e-9, 0.999)),
        interval=draw(st.integers(1, 5)),
        hysteresis=draw(st.integers(1, 4)),
        window_overflows=draw(st.integers(0, 3)),
        calibration_interval=draw(st.none() | st.integers(1, 3)),
        good_steps=draw(st.integers(0, 5)),
        overflows_in_row=draw(st.integers(0, 5)),
        overflows_in_window=draw(st.integers(0, 3)),
        calibrated=draw(st.booleans()),
    )


def after_all(value: DynamicScale, finite: list[bool] | str) -> DynamicScale:
    """Apply one step after another; in a string, '.' is a finite step and 'x' an overflow."""
    for step in finite:
        value = value.after(finite=step in (True, "."))
    return value


@given(value=dynamic_scales(), steps=st.lists(st.booleans(), max_size=60))
def test_no_history_leads_out_of_the_bounds(value: DynamicScale, steps: list[bool]) -> None:
    """Whatever happens, the scale is finite, positive and within [floor, ceiling]."""
    for finite in steps:
        value = value.after(finite=finite)

        assert value.floor <= value.scale <= value.ceiling
        assert math.isfinite(1 / value.scale)


@given(
    init=fp32_floats(2.0**-20, 2.0**40),
    growth=st.floats(1.01, 64),
    backoff=st.floats(0.01, 0.99),
    interval=st.integers(1, 4),
    steps=st.lists(st.booleans(), max_size=80),
)
def test_the_trajectory_is_torchs_bit_for_bit(
    init: float, growth: float, backoff: float, interval: int, steps: list[bool]
) -> None:
    """Within the bounds, scale and counter equal those of torch's kernel after every step."""
    scale, tracker = torch.tensor(init), torch.tensor(0, dtype=torch.int32)
    value = DynamicScale(
        scale=init, growth=growth, backoff=backoff, interval=interval, floor=FP32.tiny
    )

    for finite in steps:
        found = torch.tensor(0.0 if finite else 1.0)
        torch._amp_update_scale_(scale, tracker, found, growth, backoff, interval)
        value = value.after(finite=finite)
        if scale.item() <= value.floor:
            return

        assert (scale.item(), tracker.item()) == (value.scale, value.good_steps)


def test_the_defaults_are_torchs() -> None:
    """DynamicScale() starts from the scale, factors and interval of torch.amp.GradScaler()."""
    torchs, ours = torch.amp.GradScaler("cpu"), DynamicScale()

    assert torchs.get_scale() == ours.scale
    assert torchs.get_growth_factor() == ours.growth
    assert torchs.get_backoff_factor() == ours.backoff
    assert torchs.get_growth_interval() == ours.interval
    assert ours.is_torch_rule


def test_persistent_overflow_stops_at_the_floor() -> None:
    """After 16 overflows 2^16 is 1, and a thousand more leave it there; torch's is 0 after 166."""
    assert after_all(DynamicScale(), "x" * 15).scale == 2.0
    assert after_all(DynamicScale(), "x" * 15).is_at_floor is False
    assert after_all(DynamicScale(), "x" * 16).scale == 1.0
    assert after_all(DynamicScale(), "x" * 1016).scale == 1.0
    assert after_all(DynamicScale(), "x" * 1016).is_at_floor


def test_the_scale_recovers_from_the_floor() -> None:
    """At the floor growth still works."""
    assert after_all(DynamicScale(scale=1.0, interval=2), "....").scale == 4.0


def test_growth_stops_at_the_ceiling_and_never_at_infinity() -> None:
    """A ceiling caps growth; growth that is not finite in fp32 is left out, as in torch."""
    assert after_all(DynamicScale(interval=1, ceiling=100_000.0), "...").scale == 100_000.0
    assert after_all(DynamicScale(interval=1, scale=1e38, growth=16.0), "...").scale == 1e38


def test_hysteresis_forgives_the_first_overflows_of_a_row() -> None:
    """With 2, a lone overflow changes nothing; the second in a row lowers, as does the third."""
    value = DynamicScale(scale=8.0, hysteresis=2)

    assert after_all(value, "x").scale == 8.0
    assert after_all(value, "x.x.x.").scale == 8.0
    assert after_all(value, "xx").scale == 4.0
    assert after_all(value, "xxx").scale == 2.0


def test_a_forgiven_overflow_still_ends_the_run_of_finite_steps() -> None:
    """Hysteresis and the growth window are separate: without `window_overflows` it starts anew."""
    assert after_all(DynamicScale(hysteresis=2, interval=3), "..x..").scale == 2.0**16
    assert after_all(DynamicScale(hysteresis=2, interval=3), "..x...").scale == 2.0**17


def test_a_window_may_hold_overflows() -> None:
    """With one allowed, finite steps on both sides of an overflow add up; a second starts anew."""
    value = DynamicScale(scale=8.0, interval=4, window_overflows=1)

    assert after_all(value, "..x.").scale == 4.0
    assert after_all(value, "..x..").scale == 8.0
    assert after_all(value, "..xx..").scale == 2.0
    assert after_all(value, "..xx....").scale == 4.0


def test_rare_overflows_starve_torchs_rule() -> None:
    """One overflow in ten, interval ten: torch's rule falls 12 times, the options less or not."""
    history = ("." * 9 + "x") * 12

    assert after_all(DynamicScale(interval=10), history).scale == 2.0**4
    assert after_all(DynamicScale(interval=10, window_overflows=1), history).scale == 2.0**13
    assert after_all(DynamicScale(interval=10, hysteresis=2), history).scale == 2.0**16


def test_calibration_is_short_until_the_first_overflow() -> None:
    """The calibration interval is in force before the first overflow and never again."""
    value = DynamicScale(scale=1.0, interval=100, calibration_interval=2)

    assert after_all(value, "......").scale == 8.0
    assert after_all(value, "......x" + "." * 99).scale == 4.0
    assert after_all(value, "......x" + "." * 100).scale == 8.0


@pytest.mark.parametrize("value", [NoScale(), StaticScale(scale=8.0), DynamicScale(good_steps=7)])
def test_a_nonfinite_loss_leaves_every_scale_alone(value: LossScale) -> None:
    """A scale is not the cause of a loss that is NaN before scaling, so nothing moves."""
    assert value.after_nonfinite_loss() == value


@pytest.mark.parametrize("value", [NoScale(), StaticScale(scale=8.0)])
@pytest.mark.parametrize("finite", [True, False])
def test_only_the_dynamic_scale_moves(value: LossScale, finite: bool) -> None:
    """No step changes the absent or the static scale."""
    assert value.after(finite=finite) == value


def test_no_scale_is_one() -> None:
    """The null object multiplies by 1."""
    assert NoScale().scale == 1.0


def test_a_scale_is_a_value() -> None:
    """Nothing can be assigned; change is a new value."""
    with pytest.raises(FrozenInstanceError):
        DynamicScale().scale = 2.0  # type: ignore[misc]


@pytest.mark.parametrize(
    "bad",
    [
        {"scale": 0.0},
        {"scale": -1.0},
        {"scale": math.inf},
        {"scale": math.nan},
        {"scale": 0.5},
        {"floor": 0.0},
        {"floor": -1.0},
        {"floor": FP32.tiny / 2},
        {"floor": math.nan},
        {"floor": 2.0**17},
        {"ceiling": 0.5},
        {"ceiling": math.inf},
        {"ceiling": 2.0**15},
        {"growth": 1.0},
        {"growth": math.inf},
        {"growth": math.nan},
        {"backoff": 0.0},
        {"backoff": 1.0},
        {"backoff": -0.5},
        {"interval": 0},
        {"hysteresis": 0},
        {"window_overflows": -1},
        {"calibration_interval": 0},
    ],
    ids=str,
)
def test_settings_that_make_no_sense_are_refused(bad: dict[str, float]) -> None:
    """The error names the value, and nothing is corrected on the quiet."""
    with pytest.raises(UsageError, match=str(next(iter(bad.values())))):
        DynamicScale(**bad)  # type: ignore[arg-type]


@pytest.mark.parametrize("scale", [0.0, -2.0, math.inf, math.nan])
def test_a_static_scale_must_be_positive_and_finite(scale: float) -> None:
    """A scale that cannot be divided by again is refused."""
    with pytest.raises(UsageError, match="positive and finite"):
        StaticScale(scale=scale)


@given(value=st.one_of(dynamic_scales(), st.just(NoScale()), st.just(StaticScale(scale=3.0))))
def test_saving_and_loading_gives_the_same_value(value: LossScale) -> None:
    """All fields survive, with none at its default: they are listed nowhere by hand."""
    assert loss_scale_from_dict(loss_scale_to_dict(value)) == value


@pytest.mark.parametrize(
    "saved",
    [
        {},
        {"kind": "adaptive"},
        {"kind": "dynamic", "scale": 0.0},
        {"kind": "dynamic", "scale": math.nan},
        {"kind": "dynamic", "scale": "65536"},
        {"kind": "static", "scale": math.inf},
        {"kind": "dynamic", "loss_scale": 2.0},
    ],
    ids=str,
)
def test_a_damaged_saved_scale_is_refused(saved: dict[str, object]) -> None:
    """Loading checks what constructing checks and raises CheckpointError with a hint."""
    with pytest.raises(CheckpointError) as caught:
        loss_scale_from_dict(saved)

    assert caught.value.hint


@pytest.mark.parametrize("saved", [0.0, -1.0, math.inf, -math.inf, math.nan, None, "65536"])
def test_a_dead_scale_in_a_checkpoint_is_refused(saved: object) -> None:
    """0, inf and NaN are not repaired: the weights beside them are suspect."""
    with pytest.raises(CheckpointError, match="saved loss scale"):
        sound_saved_scale(saved, floor=1.0, ceiling=FP32.max)


@pytest.mark.parametrize(("saved", "expected"), [(2.0**-9, 1.0), (2.0**30, 2.0**20)])
def test_a_scale_out_of_bounds_is_moved_with_a_warning(saved: float, expected: float) -> None:
    """A scale that torch let fall below the floor is raised to it, and the user is told."""
    with pytest.warns(UserWarning, match="outside"):
        moved = sound_saved_scale(saved, floor=1.0, ceiling=2.0**20)

    assert moved == expected


def test_a_sound_scale_is_taken_over_without_a_word() -> None:
    """The ordinary case warns of nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")

        assert sound_saved_scale(1024, floor=1.0, ceiling=FP32.max) == 1024.0


def test_the_torch_rule_is_the_one_without_options() -> None:
    """Each option that torch's kernel does not know makes the rule ours."""
    plain = DynamicScale(floor=2.0, ceiling=2.0**20, growth=3.0)

    assert plain.is_torch_rule
    assert not replace(plain, hysteresis=2).is_torch_rule
    assert not replace(plain, window_overflows=1).is_torch_rule
    assert not replace(plain, calibration_interval=5).is_torch_rule
