"""How often the tool is wrong, measured on the very function that gives the verdicts.

The true harm is exactly the margin, so every NON-INFERIOR and every EQUIVALENT is an error. The
promise is at most 5 %. A true error rate of 5 % gives Binomial(TRIALS, 0.05) errors; the bound
below is exceeded by that with probability 1e-6 a cell, so by any of the 23 cells in at most one of
40,000 runs with fresh random numbers. (The generators are seeded: what passes, passes again.)
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from scipy.stats import binom

from comparisons import arm, protocol
from narrowcast.comparison.verdicts import judge

TRIALS = 5_000
PROMISED = 0.05
MOST_ERRORS = int(binom.isf(1e-6, TRIALS, PROMISED))

Draw = Callable[[np.random.Generator, int], list[np.ndarray]]


def errors(draw: Draw, n: int, *, bad: tuple[int, ...] = (0,), **changes: object) -> int:
    """Count trials in which any of the `bad` arms is called NON-INFERIOR or EQUIVALENT."""
    generator = np.random.default_rng(n)
    names = [f"arm{i}" for i in range(len(draw(generator, n)) - 1)]
    spec = protocol(n, *names, **changes)
    count = 0
    for _ in range(TRIALS):
        reference, *candidates = (values.tolist() for values in draw(generator, n))
        arms = [arm(name, values) for name, values in zip(names, candidates, strict=True)]
        verdicts = judge(spec, [arm("fp32", reference), *arms])
        count += any(verdicts[i].verdict in ("NON-INFERIOR", "EQUIVALENT") for i in bad)
    return count


def harmed(correlation: float, harm: float = 1.0) -> Draw:
    """Normal runs whose seeds correlate; the candidate is worse by the margin of 1."""

    def draw(generator: np.random.Generator, n: int) -> list[np.ndarray]:
        ours, theirs = generator.standard_normal((2, n))
        return [ours, correlation * ours + np.sqrt(1 - correlation**2) * theirs + harm]

    return draw


def test_the_bound_has_teeth() -> None:
    """A rule that errs in 7.5 % of trials passes one cell in 200 times, and 8 % in 20,000 times."""
    assert binom.cdf(MOST_ERRORS, TRIALS, 0.075) < 1 / 200
    assert binom.cdf(MOST_ERRORS, TRIALS, 0.08) < 1 / 20_000


@pytest.mark.slow
@pytest.mark.parametrize("correlation", [-0.5, 0.0, 0.2, 0.5, 0.95])
@pytest.mark.parametrize("n", [3, 5, 10])
def test_harm_as_large_as_the_margin_passes_in_at_most_5_percent(
    n: int, correlation: float
) -> None:
    """Whether or not the seeds correlate, the choice by the estimated correlation costs nothing."""
    assert errors(harmed(correlation), n) <= MOST_ERRORS


@pytest.mark.slow
@pytest.mark.parametrize("n", [3, 5, 10])
def test_several_harmful_arms_pass_no_more_often_than_one(n: int) -> None:
    """Two arms, both harmed by the margin: any wrong praise at all in at most 5 % (Holm)."""

    def draw(generator: np.random.Generator, n: int) -> list[np.ndarray]:
        reference, *noise = generator.standard_normal((3, n))
        return [reference, *(reference + e + 1.0 for e in noise)]

    assert errors(draw, n, bad=(0, 1)) <= MOST_ERRORS


@pytest.mark.slow
@pytest.mark.parametrize("n", [3, 5])
def test_a_good_arm_does_not_carry_a_harmful_one(n: int) -> None:
    """After a clearly good arm has passed, the harmful one is tested at 5 % and no more."""

    def draw(generator: np.random.Generator, n: int) -> list[np.ndarray]:
        reference, bad, good = generator.standard_normal((3, n))
        return [reference, reference + bad + 1.0, reference + 0.01 * good]

    assert errors(draw, n, bad=(0,)) <= MOST_ERRORS


@pytest.mark.slow
@pytest.mark.parametrize("correlation", [0.0, 0.9999])
def test_a_relative_margin_keeps_the_promise(correlation: float) -> None:
    """The margin is 1 % of an estimated mean: its own error is accounted for."""
    inner = harmed(correlation, harm=0.0)

    def draw(generator: np.random.Generator, n: int) -> list[np.ndarray]:
        ours, theirs = inner(generator, n)
        return [2 + 0.05 * ours, 2 * 1.01 + 0.05 * theirs]

    assert errors(draw, 5, margin=0.01, margin_kind="relative") <= MOST_ERRORS


@pytest.mark.slow
def test_an_accuracy_over_500_images_keeps_the_promise() -> None:
    """Accuracy moves in steps of 1/500, and the error rate holds for it as well."""

    def draw(generator: np.random.Generator, n: int) -> list[np.ndarray]:
        return [generator.binomial(500, p, n) / 500 for p in (0.86, 0.85)]

    assert errors(draw, 5, margin=0.01, direction="higher") <= MOST_ERRORS


@pytest.mark.slow
def test_no_harm_is_recognised_as_often_as_the_required_n_promises() -> None:
    """With the n for 80 % power and no true harm, 80 % of trials pass: caution has not eaten it.

    Margin 1.5 standard deviations of a difference, n = 5, power 0.86; the chance of fewer than 83 %
    of 5,000 trials is below 1e-8.
    """

    def draw(generator: np.random.Generator, n: int) -> list[np.ndarray]:
        reference, noise = generator.standard_normal((2, n))
        return [5 * reference, 5 * reference + noise / 1.5]

    assert errors(draw, 5) >= 0.83 * TRIALS
