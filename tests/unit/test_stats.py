"""The statistics of a comparison, against published tables, scipy.stats and each other."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from narrowcast import stats
from narrowcast.stats import Spread

VALUES = [0.31, 0.28, 0.36, 0.30, 0.33]
OTHERS = [0.33, 0.29, 0.35, 0.34, 0.36]


@pytest.mark.parametrize(
    ("ratio", "at_80", "at_90"),
    [(0.5, 27, 36), (0.75, 13, 17), (1, 8, 11), (1.5, 5, 6), (2, 4, 4), (3, 3, 3)],
)
def test_required_n_is_the_table_of_the_protocol(ratio: float, at_80: int, at_90: int) -> None:
    """Pairs for one-sided non-inferiority at 5 %, true difference 0 (numerics.md 3.2.6)."""
    assert stats.required_n(ratio) == at_80
    assert stats.required_n(ratio, wanted=0.9) == at_90


@pytest.mark.parametrize(("n", "ratio"), [(3, 2.30), (5, 1.36), (10, 0.853)])
def test_the_smallest_testable_margins_are_those_of_the_protocol(n: int, ratio: float) -> None:
    """n = 3 tests margins from 2.3 standard deviations, 5 from 1.36, 10 from 0.85 (80 % power)."""
    assert stats.detectable_ratio(n) == pytest.approx(ratio, abs=0.005)
    assert stats.power(n, stats.detectable_ratio(n)) == pytest.approx(0.8, abs=1e-6)


@given(ratio=st.floats(0.02, 50), wanted=st.sampled_from([0.5, 0.8, 0.9, 0.99]))
def test_required_n_is_the_smallest_that_reaches_the_power(ratio: float, wanted: float) -> None:
    """One pair fewer would fall short, unless two pairs, the least possible, already do."""
    n = stats.required_n(ratio, wanted=wanted)

    assert n is not None
    assert stats.power(n, ratio) >= wanted
    assert n == 2 or stats.power(n - 1, ratio) < wanted


@pytest.mark.parametrize("ratio", [0.0, -1.0, math.nan, 1e-9])
def test_no_number_of_pairs_proves_what_is_not_so(ratio: float) -> None:
    """A true harm at or beyond the margin, or one a million pairs away from it, needs no n."""
    assert stats.required_n(ratio) is None


def test_power_agrees_with_scipys_distribution() -> None:
    """The non-central t of scipy.stats gives the same chance, also where the series gives NaN."""
    for n, ratio in itertools.product((2, 3, 5, 10, 100), (0.1, 1.0, 5.0, 22.066460304274244)):
        critical = scipy.stats.t.isf(0.05, n - 1)
        missed = scipy.stats.nct.cdf(critical, n - 1, ratio * math.sqrt(n))
        expected = 1.0 if math.isnan(missed) else 1 - missed

        assert stats.power(n, ratio) == pytest.approx(expected, abs=1e-6)


def test_the_paired_interval_is_scipys() -> None:
    """Bounds at 5 % each are scipy's two-sided 90 % interval of the one-sample t test."""
    differences = [b - a for a, b in zip(VALUES, OTHERS, strict=True)]

    lower, upper = stats.bounds(np.mean(differences), [stats.paired_spread(differences)], 0.05)

    expected = scipy.stats.ttest_1samp(differences, 0).confidence_interval(0.90)
    assert (lower, upper) == pytest.approx((expected.low, expected.high))


def test_the_unpaired_interval_is_welchs() -> None:
    """Unequal variances and sizes give scipy's Welch interval."""
    first, second = [*OTHERS, 0.9], VALUES

    spread = stats.unpaired_spread(first, second)

    expected = scipy.stats.ttest_ind(first, second, equal_var=False).confidence_interval(0.90)
    bounds = stats.bounds(np.mean(first) - np.mean(second), [spread], 0.05)
    assert bounds == pytest.approx((expected.low, expected.high))


def test_p_values_are_scipys_one_sided_ones() -> None:
    """`p_below` is the one-sided t test against the limit; `p_within` the worse of two of them."""
    differences = [b - a for a, b in zip(VALUES, OTHERS, strict=True)]
    spreads, mean = [stats.paired_spread(differences)], float(np.mean(differences))

    below = scipy.stats.ttest_1samp(differences, 0.04, alternative="less").pvalue
    above = scipy.stats.ttest_1samp(differences, -0.04, alternative="greater").pvalue
    assert stats.p_below(mean, spreads, 0.04) == pytest.approx(below)
    assert stats.p_within(mean, spreads, 0.04) == pytest.approx(max(below, above))


@given(
    estimate=st.floats(-3, 3),
    errors=st.lists(st.tuples(st.floats(1e-3, 3), st.integers(1, 30)), min_size=1, max_size=4),
    limit=st.floats(-5, 5),
    alpha=st.sampled_from([0.05, 0.025, 0.01]),
)
def test_the_bound_and_the_p_value_never_disagree(
    estimate: float, errors: list[tuple[float, int]], limit: float, alpha: float
) -> None:
    """The upper bound lies below a limit exactly if p is below alpha, whatever spreads count."""
    spreads = [Spread(error=e, freedom=f) for e, f in errors]
    upper = stats.bounds(estimate, spreads, alpha)[1]
    if math.isclose(upper, limit, rel_tol=1e-6, abs_tol=1e-6):
        return

    assert (upper < limit) == (stats.p_below(estimate, spreads, limit) < alpha)


def test_the_widest_spread_counts() -> None:
    """Adding a spread never narrows an interval and never lowers a p value."""
    narrow, wide = Spread(error=0.1, freedom=9), Spread(error=0.3, freedom=9)

    assert stats.bounds(0.0, [narrow, wide], 0.05) == stats.bounds(0.0, [wide], 0.05)
    assert stats.p_below(0.0, [narrow, wide], 0.2) == stats.p_below(0.0, [wide], 0.2)


def test_rounding_error_is_no_spread() -> None:
    """Equal differences of doubles, apart by their last bits, have a spread of exactly 0."""
    first = [0.1, 0.3, 0.7, 1.1]
    second = [value + 0.01 for value in first]
    differences = [b - a for a, b in zip(first, second, strict=True)]

    assert len(set(differences)) > 1
    assert stats.paired_spread(differences, magnitude=1.11).error == 0


def test_a_constant_sample_has_no_correlation() -> None:
    """Correlation is undefined, not zero and not NaN, where one side does not vary."""
    assert stats.correlation([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]) is None
    assert stats.correlation([1.0, 2.0, 4.0], [2.0, 4.0, 8.0]) == pytest.approx(1.0)


def test_unpaired_counts_only_where_pairing_did_not_help() -> None:
    """Correlation 0.2 or less brings the unpaired spread in; a higher one leaves it out."""
    paired = stats.estimate_difference([(1, 1.1), (2, 2.3), (3, 3.2)])
    alone = stats.estimate_difference([(1, 2.0), (2, 1.0), (3, 2.1), (4, 0.9)])

    assert paired.counting == (paired.paired,)
    assert alone.correlation is not None
    assert alone.correlation < 0.2
    assert alone.counting == (alone.paired, alone.unpaired)


def test_a_relative_margin_brings_its_own_spread() -> None:
    """With perfectly paired seeds the margin's error exceeds the difference's, and counts."""
    pairs = [(1.0, 1.0), (2.0, 2.0001), (3.0, 2.9999)]

    fixed = stats.estimate_difference(pairs)
    relative = stats.estimate_difference(pairs, relative_margin=0.1)

    assert relative.difference == fixed.difference
    widest = max(s.error for s in relative.counting)
    # The contrast second - 1.1 first varies as 0.1 first does: SD 0.1, over sqrt(3).
    assert widest == pytest.approx(0.1 / math.sqrt(3), rel=1e-2)
    assert fixed.paired.error < widest / 500


@given(st.lists(st.floats(0, 1), min_size=1, max_size=6))
def test_holm_adjusts_no_less_than_nothing_and_no_more_than_bonferroni(ps: list[float]) -> None:
    """Adjusted values keep the order, stay in [p, m p], and never exceed 1."""
    adjusted = stats.holm(ps)

    for (p, a), (q, b) in itertools.combinations(zip(ps, adjusted, strict=True), 2):
        assert (p - q) * (a - b) >= 0
    assert all(p <= a <= min(1, len(ps) * p) for p, a in zip(ps, adjusted, strict=True))


def test_holm_is_the_textbook_example() -> None:
    """0.01, 0.04, 0.03, 0.005 become 0.03, 0.06, 0.06, 0.02 (step-down, made monotone)."""
    assert stats.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx((0.03, 0.06, 0.06, 0.02))


@given(
    harms=st.lists(st.tuples(st.floats(-1, 1), st.floats(0.01, 1)), min_size=1, max_size=4),
    margin=st.floats(0.01, 3),
)
def test_the_smallest_margin_is_where_holm_begins_to_reject(
    harms: list[tuple[float, float]], margin: float
) -> None:
    """For any common margin, Holm rejects exactly the tests whose smallest limit lies below it."""
    cases = [(h, [Spread(error=e, freedom=4)]) for h, e in harms]
    limits = stats.holm_bounds(
        [lambda a, h=h, s=s: stats.bounds(h, s, a)[1] for h, s in cases], alpha=0.05
    )
    if any(math.isclose(limit, margin, rel_tol=1e-6) for limit in limits):
        return

    adjusted = stats.holm([stats.p_below(h, s, margin) for h, s in cases])
    assert [p < 0.05 for p in adjusted] == [limit < margin for limit in limits]


@pytest.mark.parametrize(
    ("failures", "runs", "upper"), [(0, 5, 0.4507), (1, 5, 0.6574), (0, 3, 0.6316), (5, 5, 1.0)]
)
def test_the_failure_rate_is_bounded_exactly(failures: int, runs: int, upper: float) -> None:
    """No failure in 5 runs still allows a rate of 45 % (Clopper-Pearson, one-sided 95 %)."""
    assert stats.failure_rate_upper(failures, runs) == pytest.approx(upper, abs=1e-4)


@given(failures=st.integers(0, 9), runs=st.integers(10, 12))
def test_at_the_bound_so_few_failures_are_as_rare_as_promised(failures: int, runs: int) -> None:
    """With the bound for the true rate, seeing so few failures or fewer has probability 5 %."""
    upper = stats.failure_rate_upper(failures, runs)

    assert scipy.stats.binom.cdf(failures, runs, upper) == pytest.approx(0.05, abs=1e-9)
