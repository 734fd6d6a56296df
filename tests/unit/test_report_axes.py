"""Axes hold their values and carry few round numbers."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from narrowcast.report.axes import Axis, axis_over
from narrowcast.report.charts import figures_of
from narrowcast.report.shapes import Chart, LinePanel, Series, Unit

UNITS: list[Unit] = ["number", "bytes", "seconds", "scale"]


def _position(axis: Axis, value: float) -> float:
    return math.log10(value) if axis.kind == "log" else value


@given(
    st.lists(st.floats(1e-9, 1e12), min_size=1, max_size=20),
    st.sampled_from(UNITS),
    st.booleans(),
)
def test_an_axis_holds_all_its_values(values: list[float], unit: Unit, from_zero: bool) -> None:
    """No value is cut off, there are at most a dozen ticks, and each lies on the axis."""
    axis = axis_over(values, unit, from_zero=from_zero)
    low, high = axis.range
    slack = 1e-9 * max(abs(low), abs(high))

    assert all(low - slack <= _position(axis, v) <= high + slack for v in values)
    assert all(low - slack <= _position(axis, t) <= high + slack for t in axis.ticks)
    assert 1 <= len(axis.ticks) == len(axis.names) <= 12
    assert low < high


@pytest.mark.parametrize("values", [[], [math.nan], [math.inf, -math.inf], [3.0, 3.0], [0.0]])
@pytest.mark.parametrize("unit", UNITS)
def test_an_axis_exists_for_any_values(values: list[float], unit: Unit) -> None:
    """Nothing, one value and no finite value still make a picture."""
    low, high = axis_over(values, unit).range

    assert math.isfinite(low)
    assert math.isfinite(high)
    assert low < high


def test_bytes_begin_at_zero_and_have_round_binary_ticks() -> None:
    """70 MiB is read off an axis of 0, 20, 40 and 60 MiB."""
    axis = axis_over([70 * 2**20], "bytes")

    assert axis.names == ("0", "20 MiB", "40 MiB", "60 MiB")
    assert axis.range[0] == 0


def test_ticks_show_the_decimals_that_tell_them_apart() -> None:
    """0.86 and 0.87 at steps of 0.005 have three decimals; zero has none."""
    assert axis_over([0.858, 0.872], "number").names == ("0.860", "0.865", "0.870")
    assert axis_over([-0.01, 0.01], "number").names == ("-0.010", "-0.005", "0", "0.005", "0.010")


@pytest.mark.parametrize(("last", "ticks"), [(3, {"dtick": 1}), (40, {"nticks": 6})])
def test_no_figure_stands_between_two_steps(last: int, ticks: dict[str, int]) -> None:
    """A run of three steps has three figures below its curves, and none at 1.5."""
    steps = tuple(float(step) for step in range(1, last + 1))
    series = Series(name="fp32", group="fp32", colour="p-fp32", x=steps, y=steps)
    panel = LinePanel(title="", x_title="step", unit="number", series=(series,))

    (figure,) = figures_of(Chart(key="loss", title="", summary="", panels=(panel,)))

    axis = figure["layout"]["xaxis"]
    assert {name: axis[name] for name in ("dtick", "nticks") if name in axis} == ticks


def test_an_accuracy_of_one_has_no_figures_above_it() -> None:
    """There is nothing better than all right."""
    assert axis_over([1.0, 1.0], "number").ticks[-1] == 1.0
    assert axis_over([2.0, 2.0], "number").ticks[-1] > 2.0


def test_a_diverging_loss_gets_a_logarithmic_axis() -> None:
    """A run at a million would flatten those below ten."""
    axis = axis_over([0.3, 1e6], "number")

    assert axis.kind == "log"
    assert axis_over([0.3, 2.3], "number").kind == "linear"
    assert axis_over([-0.3, 1e6], "number").kind == "linear"


def test_one_slow_step_does_not_flatten_the_others() -> None:
    """Step times of 40 and 400 ms stand on a logarithmic axis with times for names."""
    axis = axis_over([0.04, 0.4], "seconds")

    assert axis.kind == "log"
    assert axis.names == ("50 ms", "100 ms", "200 ms")


def test_loss_scales_have_powers_of_two_for_ticks() -> None:
    """A scale is never between two powers, so neither is a tick."""
    axis = axis_over([1.0, 65536.0], "scale")

    assert axis.kind == "log"
    assert axis.names == ("1", "16", "256", "4,096", "65,536")
