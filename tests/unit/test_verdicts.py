"""Each verdict word, and what it takes to get it."""

from __future__ import annotations

import math

import pytest

from comparisons import arm, protocol
from narrowcast.comparison.verdicts import judge, standard_deviation_of_difference
from narrowcast.records.codec import dumps, loads
from narrowcast.records.comparison import VerdictRecord

REFERENCE = (10.0, 11.0, 12.0, 13.0, 14.0)
NOISE = (0.10, -0.05, 0.02, -0.08, 0.04)


def shifted(harm: float, scale: float = 1.0) -> list[float]:
    return [r + harm + scale * e for r, e in zip(REFERENCE, NOISE, strict=True)]


def judge_one(values: list[float | None], **changes: object) -> VerdictRecord:
    return judge(
        protocol(len(values), **changes),
        [arm("fp32", REFERENCE[: len(values)]), arm("bf16", values)],
    )[0]


@pytest.mark.parametrize(
    ("harm", "word"),
    [(0.0, "EQUIVALENT"), (0.9, "EQUIVALENT"), (-5.0, "NON-INFERIOR"), (2.0, "WORSE")],
)
def test_clear_data_give_clear_words(harm: float, word: str) -> None:
    """With a margin of 1 and small noise the word follows from the harm."""
    assert judge_one(shifted(harm)).verdict == word


def test_noisy_data_decide_nothing_and_say_how_many_seeds_would() -> None:
    """The interval reaches beyond the margin: INCONCLUSIVE, with more seeds than were run."""
    verdict = judge_one(shifted(0.0, scale=30))

    assert verdict.verdict == "INCONCLUSIVE"
    assert verdict.n_needed is not None
    assert verdict.n_needed > 5
    assert str(verdict.n_needed) in verdict.why


def test_an_unreachable_margin_asks_for_no_number_of_seeds() -> None:
    """A margin a billion times below the spread: more than a million seeds, and no figure."""
    verdict = judge_one(shifted(0.0, scale=30), margin=1e-9)

    assert verdict.verdict == "INCONCLUSIVE"
    assert verdict.n_needed is None
    assert "more than a million" in verdict.why


def test_where_the_estimate_stands_in_the_way_n_is_that_of_the_estimate() -> None:
    """Five seeds would do if there were no harm; with 0.9 of the margin estimated, they do not."""
    verdict = judge_one(shifted(0.9, scale=3))

    assert verdict.verdict == "INCONCLUSIVE"
    assert verdict.n_needed is not None
    assert verdict.n_needed > 5


def test_real_harm_inside_the_margin_is_said() -> None:
    """An interval between 0 and the margin is acceptable by the user's own margin, and worse."""
    verdict = judge_one(shifted(0.5))

    assert verdict.verdict == "EQUIVALENT"
    assert "worse, but inside the margin" in verdict.why


def test_worse_needs_the_estimate_beyond_the_margin_and_the_interval_above_zero() -> None:
    """Harm that is certain but perhaps small is INCONCLUSIVE; that it is harm is said."""
    verdict = judge_one(shifted(0.9, scale=3))

    assert verdict.interval is not None
    assert verdict.interval[0] > 0
    assert verdict.interval[1] > 1
    assert verdict.verdict == "INCONCLUSIVE"
    assert "the arm is worse" in verdict.why


def test_the_sign_follows_the_direction() -> None:
    """Where higher is better, a drop is the harm; the difference stays (arm - reference)."""
    lower = judge_one(shifted(2.0))
    higher = judge_one(shifted(-2.0), direction="higher")

    assert higher.verdict == lower.verdict == "WORSE"
    assert higher.difference == pytest.approx(-1.994)
    assert higher.interval is not None
    assert higher.interval[0] < higher.difference < higher.interval[1] < 0


def test_the_interval_and_the_verdict_never_contradict_each_other() -> None:
    """One arm: NON-INFERIOR or EQUIVALENT exactly if the harmful bound lies below the margin."""
    for harm in (-2, 0, 0.5, 0.8, 0.9, 0.95, 1.0, 1.2):
        for scale in (0.5, 1, 5, 20):
            verdict = judge_one(shifted(harm, scale))

            assert verdict.interval is not None
            passes = verdict.verdict in ("NON-INFERIOR", "EQUIVALENT")
            assert passes == (verdict.interval[1] < 1)
            assert verdict.smallest_margin == pytest.approx(max(0, verdict.interval[1]))


def test_where_pairing_did_not_help_the_wider_interval_counts() -> None:
    """Uncorrelated seeds: the interval is no narrower than either of the two."""
    verdict = judge_one([12.0, 10.5, 14.2, 10.1, 12.9])

    assert verdict.correlation is not None
    assert verdict.correlation <= 0.2
    assert verdict.paired_interval is not None
    assert verdict.unpaired_interval is not None
    assert verdict.interval in (verdict.paired_interval, verdict.unpaired_interval)
    assert verdict.interval[1] == max(verdict.paired_interval[1], verdict.unpaired_interval[1])


def test_where_pairing_helped_the_paired_interval_counts() -> None:
    """Seeds that go together are compared pair by pair, though both intervals are recorded."""
    verdict = judge_one(shifted(0.0))

    assert verdict.interval == verdict.paired_interval != verdict.unpaired_interval


def test_a_run_that_diverged_alone_is_a_failure() -> None:
    """One diverged run of five on a seed where fp32 stood is FAILED, however good the others."""
    values: list[float | None] = [*shifted(-5.0)]
    values[2] = None

    verdict = judge_one(values)

    assert verdict.verdict == "FAILED"
    assert verdict.failed_runs == 1
    assert verdict.failure_rate_upper == pytest.approx(0.657, abs=1e-3)
    assert verdict.interval is None
    assert verdict.difference is None


def test_all_diverged_is_a_failure_without_a_number() -> None:
    """Nothing to average gives no NaN: the record travels as plain JSON."""
    verdict = judge_one([None] * 5, margin=0.01, margin_kind="relative")

    assert verdict.verdict == "FAILED"
    assert verdict.failure_rate_upper == 1.0
    assert loads(VerdictRecord, dumps(verdict)) == verdict
    assert "NaN" not in dumps(verdict)


def test_where_fp32_fails_too_it_is_not_a_precision_problem() -> None:
    """The arm diverged on no other seed than the reference did."""
    reference = arm("fp32", [10.0, None, 12.0])

    (verdict,) = judge(protocol(3), [reference, arm("bf16", [10.1, None, 12.1])])

    assert verdict.verdict == "NOT A PRECISION PROBLEM"


def test_the_perturbed_control_is_fp32_as_well() -> None:
    """A seed on which only the control diverged shows that fp32 is unstable on it."""
    reference, candidate = arm("fp32", [10.0, 11.0, 12.0]), arm("bf16", [10.1, None, 12.1])
    control = arm("fp32", [10.0, None, 12.0])

    with_control = judge(protocol(3), [reference, candidate], control)[0]
    without = judge(protocol(3), [reference, candidate])[0]

    assert (with_control.verdict, without.verdict) == ("NOT A PRECISION PROBLEM", "FAILED")


def test_failing_on_other_seeds_than_fp32_is_a_failure_that_names_fp32s() -> None:
    """Both are unstable, on different seeds: the arm failed, and the reason says that fp32 did."""
    reference, candidate = arm("fp32", [None, 11.0, 12.0]), arm("bf16", [10.0, None, 12.0])

    (verdict,) = judge(protocol(3), [reference, candidate])

    assert verdict.verdict == "FAILED"
    assert "fp32 diverged on 1 of 3 seeds itself" in verdict.why


def test_an_arm_that_stood_where_the_reference_diverged_is_not_thereby_good() -> None:
    """A pair without its reference value is not dropped: there is no verdict on the rest."""
    reference = arm("fp32", [10.0, None, 12.0, 13.0])

    (verdict,) = judge(protocol(4), [reference, arm("bf16", [10.0, 11.0, 12.0, 13.0])])

    assert verdict.verdict == "INCONCLUSIVE"
    assert verdict.interval is None


def test_one_seed_shows_failures_and_nothing_else() -> None:
    """n = 1 gives no interval, no NaN, and the words that numerics.md 3.2.7 allows."""
    verdict = judge_one([10.0])

    assert verdict.verdict == "INCONCLUSIVE"
    assert "not evidence of equality" in verdict.why
    assert verdict.difference == 0.0
    assert verdict.interval is None
    assert judge_one([None]).verdict == "FAILED"


def test_equal_differences_are_no_certainty() -> None:
    """Three equal differences of a coarse metric do not give an interval of no width."""
    verdict = judge_one([10.5, 11.5, 12.5])

    assert verdict.verdict == "INCONCLUSIVE"
    assert verdict.interval is None
    assert "too coarse" in verdict.why


def test_the_same_computation_is_equivalent() -> None:
    """Runs whose every loss equals the reference's differ by 0: that is known, not estimated."""
    same = arm("tf32", REFERENCE, same_as_reference=(True,) * 5)

    (verdict,) = judge(protocol(5, "tf32"), [arm("fp32", REFERENCE), same])

    assert verdict.verdict == "EQUIVALENT"
    assert verdict.interval == (0.0, 0.0)
    assert "bit for bit" in verdict.why


def test_equal_metrics_alone_do_not_make_the_same_computation() -> None:
    """Zero differences with other losses come from a coarse metric, and decide nothing."""
    partly = arm("bf16", REFERENCE, same_as_reference=(True, True, True, True, False))

    (verdict,) = judge(protocol(5), [arm("fp32", REFERENCE), partly])

    assert verdict.verdict == "INCONCLUSIVE"


def test_without_a_margin_there_is_no_verdict() -> None:
    """The smallest margin that the data support is given instead, and failures are still said."""
    verdict = judge_one(shifted(0.0), margin=None)

    assert verdict.verdict == "NO MARGIN"
    assert verdict.interval is not None
    assert verdict.smallest_margin == pytest.approx(verdict.interval[1])
    assert verdict.p_value is None
    assert judge_one([None, *shifted(0)[1:]], margin=None).verdict == "FAILED"
    assert judge_one([10.0], margin=None).verdict == "NO MARGIN"


def test_a_margin_above_the_smallest_supported_one_gives_the_verdict() -> None:
    """The smallest margin of three arms is where each of them begins to pass, Holm included."""
    arms = [
        arm("fp32", REFERENCE),
        *(arm(name, shifted(h, s)) for name, h, s in (("a", 0, 1), ("b", 0.1, 6), ("c", 0.3, 9))),
    ]
    limits = [v.smallest_margin for v in judge(protocol(5, "a", "b", "c", margin=None), arms)]

    for factor, passes in ((1.001, True), (0.999, False)):
        for index, limit in enumerate(limits):
            assert limit is not None
            verdict = judge(protocol(5, "a", "b", "c", margin=limit * factor), arms)[index]
            assert (verdict.verdict in ("NON-INFERIOR", "EQUIVALENT")) == passes


def test_holm_withholds_what_an_arm_alone_would_get() -> None:
    """The same data pass alone and not beside a second arm that fails, and the reason says so."""
    close = arm("a", shifted(0.88, scale=1.4))
    bad = arm("b", shifted(5.0))
    reference = arm("fp32", REFERENCE)

    (alone,) = judge(protocol(5, "a"), [reference, close])
    beside, _ = judge(protocol(5, "a", "b"), [reference, close, bad])

    assert alone.verdict == "EQUIVALENT"
    assert beside.verdict == "INCONCLUSIVE"
    assert "Holm" in beside.why
    assert beside.p_value == alone.p_value
    assert beside.p_value_holm == pytest.approx(2 * (alone.p_value or math.nan))


def test_a_failed_arm_still_counts_in_the_family() -> None:
    """How many arms Holm corrects for is fixed by the protocol, not by which of them survive."""
    close, reference = arm("a", shifted(0.88, scale=1.4)), arm("fp32", REFERENCE)

    beside, _ = judge(protocol(5, "a", "b"), [reference, close, arm("b", [None] * 5)])

    assert beside.verdict == "INCONCLUSIVE"


def test_an_alarm_is_not_corrected_away() -> None:
    """WORSE does not depend on how many other arms were compared."""
    bad, reference = arm("a", shifted(1.3, scale=12)), arm("fp32", REFERENCE)
    names = ("a", "b", "c", "d")

    (alone,) = judge(protocol(5, "a"), [reference, bad])
    beside = judge(protocol(5, *names), [reference, bad, *(arm(n, shifted(0)) for n in names[1:])])

    assert alone.verdict == beside[0].verdict == "WORSE"


def test_a_relative_margin_is_resolved_with_the_references_mean() -> None:
    """10 % of a mean of 12 is a margin of 1.2, and its own uncertainty widens the interval."""
    absolute = judge_one(shifted(0.0), margin=1.2)
    relative = judge_one(shifted(0.0), margin=0.1, margin_kind="relative")

    assert relative.margin == pytest.approx(1.2)
    assert relative.difference == absolute.difference
    assert relative.interval is not None
    assert absolute.interval is not None
    assert relative.interval[1] > absolute.interval[1]


def test_a_relative_margin_of_a_zero_mean_decides_nothing() -> None:
    """A percentage of nothing is a margin of 0, which no data satisfy."""
    reference = arm("fp32", [-1.0, 0.0, 1.0])
    spec = protocol(3, margin=0.1, margin_kind="relative")

    (verdict,) = judge(spec, [reference, arm("bf16", [-1.1, 0.1, 0.9])])

    assert verdict.margin == 0.0
    assert verdict.verdict == "INCONCLUSIVE"


def test_an_arm_that_ran_in_another_precision_is_not_praised_silently() -> None:
    """A verdict on operations that did not execute in the asked precision says that."""
    candidate = arm("bf16", shifted(0.0), precision_honoured=False)

    (verdict,) = judge(protocol(5), [arm("fp32", REFERENCE), candidate])

    assert "not all operations executed in bf16" in verdict.why


def test_the_training_precision_is_shown_beside_and_decides_nothing() -> None:
    """The verdict rests on the fp32 evaluation; the other difference has its own fields."""
    candidate = arm("bf16", shifted(0.0), training_precision_metrics={"loss": tuple(shifted(7.0))})

    (verdict,) = judge(protocol(5), [arm("fp32", REFERENCE), candidate])

    assert verdict.verdict == "EQUIVALENT"
    assert verdict.training_precision_difference == pytest.approx(7.006)
    assert verdict.training_precision_interval is not None
    assert verdict.training_precision_interval[0] > 6


def test_a_metric_that_broke_only_in_the_training_precision_gives_no_difference() -> None:
    """A value missing on one seed is not averaged over; the fp32 verdict stands."""
    beside = (None, *shifted(0.0)[1:])
    candidate = arm("bf16", shifted(0.0), training_precision_metrics={"loss": beside})

    (verdict,) = judge(protocol(5), [arm("fp32", REFERENCE), candidate])

    assert verdict.verdict == "EQUIVALENT"
    assert verdict.training_precision_difference is None


def test_every_number_of_a_verdict_is_finite() -> None:
    """No input that a comparison can produce makes NaN or infinity in a record."""
    cases: list[list[float | None]] = [
        [10.0], [10.0, 11.0], [3e38, -3e38, 3e38], [10.0, 11.0, 12.0], [None, None],
        [0.0, 0.0, 0.0], [1e-300, 2e-300, 1e-300],
    ]  # fmt: skip
    for values in cases:
        for margin in (None, 1e-12, 1.0, 1e12):
            text = dumps(judge_one(values, margin=margin))

            assert "NaN" not in text
            assert "Infinity" not in text


def test_the_noise_floor_is_the_spread_of_the_controls_differences() -> None:
    """The standard deviation over seeds with a difference; none below two of them."""
    assert standard_deviation_of_difference((0.1, 0.3, None, 0.2)) == pytest.approx(0.1)
    assert standard_deviation_of_difference((0.1, None)) is None
