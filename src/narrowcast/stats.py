"""The statistics of a comparison: how far an estimate can be trusted, and how many runs it takes.

Everything rests on Student's t. With the three to ten runs that people can afford, a percentile
bootstrap that claims 90 % covers 61 % (n = 3) to 84 % (n = 10); a t interval covers 90 %.

An estimate may come with several spreads (paired, unpaired). They share its centre, and the widest
always counts: a test that must pass under each of them errs no more often than the strictest one,
whatever made the others be looked at.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from scipy import special

__all__ = [
    "Estimate",
    "Spread",
    "bounds",
    "correlation",
    "detectable_ratio",
    "estimate_difference",
    "failure_rate_upper",
    "holm",
    "holm_bounds",
    "p_below",
    "p_within",
    "paired_spread",
    "power",
    "required_n",
    "unpaired_spread",
]

# Differences of doubles carry rounding errors of about one ulp of the values that were subtracted;
# a standard deviation below a few ulps is such noise and means "all equal".
_ROUNDING_ULPS = 8

# At or below this correlation over the seeds, pairing did not help (Narrowcast's protocol).
_PAIRING_HELPS_ABOVE = 0.2


@dataclass(frozen=True, kw_only=True)
class Spread:
    """The standard error of an estimate and the degrees of freedom it was estimated with."""

    error: float
    freedom: float


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """(second - first) over n >= 2 pairs, and every spread that its interval must withstand."""

    difference: float
    paired: Spread
    unpaired: Spread
    correlation: float | None
    counting: tuple[Spread, ...]


def estimate_difference(
    pairs: Sequence[tuple[float, float]], *, relative_margin: float | None = None
) -> Estimate:
    """Estimate the mean of (second - first) over n >= 2 pairs, with each spread that counts.

    Paired always; unpaired as well where the pairs' correlation is 0.2 or less.

    A margin relative to the mean of the first moves with that mean and so is itself an estimate:
    (difference -+ margin) varies as (second - s * first) does, with slope s = 1 +- margin. Adding
    these contrasts keeps the error rate exact; taking the margin for a constant would not where
    pairs agree so well that the margin's error is larger than the difference's.
    """
    first, second = [a for a, _ in pairs], [b for _, b in pairs]
    paired, unpaired = _both_spreads(first, second)
    together = correlation(first, second)
    pairing_helps = together is not None and together > _PAIRING_HELPS_ABOVE
    counting = [paired] if pairing_helps else [paired, unpaired]
    for slope in (1 + relative_margin, 1 - relative_margin) if relative_margin else ():
        tilted = _both_spreads([slope * a for a in first], second)
        counting += tilted[:1] if pairing_helps else tilted
    return Estimate(
        difference=statistics.fmean(b - a for a, b in pairs),
        paired=paired,
        unpaired=unpaired,
        correlation=together,
        counting=tuple(counting),
    )


def paired_spread(differences: Sequence[float], *, magnitude: float = 0.0) -> Spread:
    """Return the spread of the mean of n >= 2 differences (one-sample t, n - 1 degrees of freedom).

    `magnitude` is the size of the values that were subtracted: a spread that is nothing but their
    rounding error is returned as exactly 0.
    """
    error = _standard_deviation(differences, magnitude=magnitude) / math.sqrt(len(differences))
    return Spread(error=error, freedom=len(differences) - 1)


def unpaired_spread(first: Sequence[float], second: Sequence[float]) -> Spread:
    """Return the spread of mean(first) - mean(second) for independent samples of n >= 2 each.

    Welch 1947: unequal variances, with the Welch-Satterthwaite degrees of freedom.
    """
    a = _standard_deviation(first) ** 2 / len(first)
    b = _standard_deviation(second) ** 2 / len(second)
    if a + b == 0:
        return Spread(error=0.0, freedom=len(first) + len(second) - 2)
    freedom = (a + b) ** 2 / (a**2 / (len(first) - 1) + b**2 / (len(second) - 1))
    return Spread(error=math.sqrt(a + b), freedom=freedom)


def correlation(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Return Pearson's correlation of n >= 2 pairs; None where one side does not vary at all."""
    a, b = _standard_deviation(first), _standard_deviation(second)
    if not a or not b:
        return None
    x, y = statistics.fmean(first), statistics.fmean(second)
    products = math.fsum((u - x) * (v - y) for u, v in zip(first, second, strict=True))
    return max(-1.0, min(1.0, products / ((len(first) - 1) * a * b)))


def bounds(estimate: float, spreads: Sequence[Spread], alpha: float) -> tuple[float, float]:
    """Return the lower and the upper bound, each wrong with probability `alpha`.

    Together they are the two-sided interval of confidence 1 - 2 alpha. The widest spread counts.
    """
    reach = max(-float(special.stdtrit(s.freedom, alpha)) * s.error for s in spreads)
    return estimate - reach, estimate + reach


def p_below(estimate: float, spreads: Sequence[Spread], limit: float) -> float:
    """Return the p value against "the true value is `limit` or more"; the largest one counts."""
    return max(_p_below(estimate - limit, s) for s in spreads)


def p_within(estimate: float, spreads: Sequence[Spread], limit: float) -> float:
    """Return the p value against "the true value is outside (-limit, limit)".

    Two one-sided tests (Schuirmann 1987): both must reject, so the larger p value counts.
    """
    return max(p_below(estimate, spreads, limit), p_below(-estimate, spreads, limit))


def power(n: int, ratio: float, *, alpha: float = 0.05) -> float:
    """Return the chance that n pairs prove non-inferiority, from the non-central t distribution.

    `ratio` is (margin - true harm) / standard deviation of one pair's difference.
    """
    critical = -float(special.stdtrit(n - 1, alpha))
    missed = float(special.nctdtr(n - 1, ratio * math.sqrt(n), critical))
    # scipy's series gives NaN some 30 standard errors out, where the chance to miss is below 1e-6.
    return 1.0 if math.isnan(missed) else 1.0 - missed


def required_n(ratio: float, *, alpha: float = 0.05, wanted: float = 0.8) -> int | None:
    """Return the smallest number of pairs whose ``power`` reaches `wanted`.

    None where no number does (`ratio` <= 0) or it is beyond a million.
    """
    if ratio <= 0 or math.isnan(ratio):
        return None
    high = 2
    while power(high, ratio, alpha=alpha) < wanted:
        high *= 2
        if high > 1 << 20:
            return None
    low = high // 2 if high > 2 else 1
    while high - low > 1:
        middle = (low + high) // 2
        if power(middle, ratio, alpha=alpha) < wanted:
            low = middle
        else:
            high = middle
    return high


def detectable_ratio(n: int, *, alpha: float = 0.05, wanted: float = 0.8) -> float:
    """Return the effect, in standard deviations of a difference, that n pairs show with this power.

    n = 3 shows 2.3 standard deviations, n = 5 shows 1.36, n = 10 shows 0.85.
    """
    critical = -float(special.stdtrit(n - 1, alpha))
    return float(special.nctdtrinc(n - 1, 1 - wanted, critical)) / math.sqrt(n)


def holm(p_values: Sequence[float]) -> tuple[float, ...]:
    """Return Holm's adjusted p values (Holm 1979), in the order given.

    Rejecting those below alpha rejects any true hypothesis with probability at most alpha,
    whatever the dependence between the tests: arms share their reference.
    """
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = highest
    return tuple(adjusted)


def holm_bounds(upper: Sequence[Callable[[float], float]], alpha: float) -> tuple[float, ...]:
    """Return, per test, the smallest common limit at which Holm's procedure would reject.

    ``upper[i](a)`` is the upper bound of test i at error rate a. Raising the limit from below,
    the first test falls at the smallest bound at level alpha / m, the next at the smallest
    remaining bound at level alpha / (m - 1) or at once, and so on.
    """
    left, limits, reached = set(range(len(upper))), [math.inf] * len(upper), -math.inf
    while left:
        level = alpha / len(left)
        bound, index = min((upper[i](level), i) for i in left)
        reached = max(reached, bound)
        limits[index] = reached
        left.remove(index)
    return tuple(limits)


def failure_rate_upper(failures: int, runs: int, *, confidence: float = 0.95) -> float:
    """Return the one-sided upper bound on a failure rate (Clopper-Pearson 1934; exact, never 0).

    No failure in 5 runs still allows a rate of 45 % at 95 % confidence.
    """
    if failures >= runs:
        return 1.0
    return float(special.betaincinv(failures + 1, runs - failures, confidence))


def _both_spreads(first: Sequence[float], second: Sequence[float]) -> tuple[Spread, Spread]:
    differences = [b - a for a, b in zip(first, second, strict=True)]
    magnitude = max(map(abs, (*first, *second)))
    return paired_spread(differences, magnitude=magnitude), unpaired_spread(second, first)


def _standard_deviation(values: Sequence[float], *, magnitude: float = 0.0) -> float:
    """Return the sample standard deviation, with pure rounding error reported as exactly 0."""
    centre = statistics.fmean(values)
    deviation = math.hypot(*(v - centre for v in values)) / math.sqrt(len(values) - 1)
    largest = max(magnitude, *(abs(v) for v in values))
    return 0.0 if deviation <= _ROUNDING_ULPS * math.ulp(largest) else deviation


def _p_below(distance: float, spread: Spread) -> float:
    if spread.error == 0:
        return 0.0 if distance < 0 else 1.0
    return float(special.stdtr(spread.freedom, distance / spread.error))
