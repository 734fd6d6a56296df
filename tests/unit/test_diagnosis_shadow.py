"""Losses against those of fp32: what is noise, what is far off, and what diverges."""

from __future__ import annotations

import math

import pytest

from narrowcast.diagnosis.shadow import deviation, divergence, progress

FALLING = [8.0, 7, 6, 5, 4, 3, 2, 1]


def test_equal_losses_are_no_deviation() -> None:
    """Not even where nothing was learnt."""
    for losses in (FALLING, [2.0] * 8, [2.0], [0.0]):
        found = deviation(losses, losses, losses, compute="bf16")
        assert found.gap == found.control == 0
        assert not found.is_far_off


def test_what_the_control_does_as_well_is_noise() -> None:
    """A gap of four times the control's distance is allowed, and no more."""
    control = [x + 1 for x in FALLING]

    assert not deviation([x + 4 for x in FALLING], FALLING, control, compute="bf16").is_far_off
    assert deviation([x + 4.1 for x in FALLING], FALLING, control, compute="bf16").is_far_off


def test_a_gap_of_a_few_units_in_the_last_place_is_rounding() -> None:
    """Four of them: a thirty-second of a bf16 loss, 1/256 of an fp16 one."""
    flat = [1.0] * 8

    for compute, ulp in (("bf16", 2**-7), ("fp16", 2**-10)):
        near, far = [1 + 3.9 * ulp] * 8, [1 + 4.1 * ulp] * 8
        assert not deviation(near, flat, flat, compute=compute).is_far_off
        assert deviation(far, flat, flat, compute=compute).is_far_off


def test_a_quarter_of_what_fp32_has_learnt_is_far_off() -> None:
    """Below that it may be noise; a loss below that of fp32 is never held against a training."""
    learnt = progress(FALLING)

    assert learnt == 6
    assert deviation([x + 1.6 for x in FALLING], FALLING, FALLING, compute="fp16").is_far_off
    assert not deviation([x + 1.4 for x in FALLING], FALLING, FALLING, compute="fp16").is_far_off
    assert not deviation([x - 5 for x in FALLING], FALLING, FALLING, compute="fp16").is_far_off


@pytest.mark.parametrize(
    ("losses", "times"),
    [
        (FALLING, 0.0),
        ([1.0] * 8, 0.0),
        ([1.0, 1, 1, 1, 1, 1, 6, 6], 5.0),
        ([-2.0, -2, -2, -2, -2, -2, 6, 6], 4.0),
        ([0.0, 0, 0, 0, 1, 1, 1, 1], math.inf),
        ([0.0, 2, 1, 1, 1, 1, 3, 3], 1.0),
        ([5.0], 0.0),
    ],
)
def test_divergence_is_the_rise_over_the_first_level(losses: list[float], times: float) -> None:
    """The level of a noisy or vanishing loss is its spread, so that little is no multiple of it."""
    assert divergence(losses) == pytest.approx(times)
