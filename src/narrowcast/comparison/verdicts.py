"""From the runs of a comparison to its verdict words: a pure function of protocol and arms.

Because it reads nothing but records, the verdicts of a finished comparison can be given again from
``comparison.json``, and a simulation can ask the function that users rely on how often it errs.

    for each arm, harm_i = (arm - reference) on seed i, its sign turned so that positive is worse
    FAILED                   a run diverged on a seed on which fp32 did not
    NOT A PRECISION PROBLEM  runs diverged, and fp32 diverged on the same seeds
    EQUIVALENT               both one-sided tests reject: -margin < harm < margin
    NON-INFERIOR             the one-sided 95 % bound of the harm is below the margin
    WORSE                    the interval lies above 0 and the estimate beyond the margin
    INCONCLUSIVE             anything else: the data do not decide, or are of another precision
    NO MARGIN                none was fixed beforehand: the smallest supportable one, no verdict

Reassuring words (EQUIVALENT, NON-INFERIOR) take three seeds and must survive Holm's correction over
the arms. WORSE need not: an alarm should not grow quieter because more arms were compared.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

from narrowcast import stats
from narrowcast.records.comparison import ArmRecord, Protocol, Verdict, VerdictRecord
from narrowcast.records.run import policy_in
from narrowcast.stats import Spread

__all__ = ["differences_per_seed", "judge", "standard_deviation_of_difference"]

# The kinds of operation that a precision is about, as precision.executed counts them.
_HEAVY = ("matmul", "conv", "attention", "rnn")

# Two differences say next to nothing of how they are distributed, and t rests on that.
_FEWEST_SEEDS = 3

Differences = tuple[float | None, ...]
Pairs = Sequence[tuple[float, float]]


@dataclass(frozen=True, kw_only=True)
class _Case:
    """One candidate before it is judged beside the others."""

    arm: ArmRecord
    record: VerdictRecord
    """All that one arm's own data say; the verdict and Holm's values are still to come."""
    harm: float = math.nan
    spreads: tuple[Spread, ...] = ()
    """Empty where there is nothing to test; Holm then still counts the arm, with p = 1."""
    settled: tuple[Verdict, str] | None = None
    """The verdict and its reason, where no test is needed or possible."""

    def upper(self, alpha: float) -> float:
        """Return the bound that the harm exceeds with probability `alpha`."""
        return stats.bounds(self.harm, self.spreads, alpha)[1] if self.spreads else math.inf

    def p_below(self) -> float:
        """Return the p value of non-inferiority."""
        margin = self.record.margin
        return stats.p_below(self.harm, self.spreads, margin) if self.spreads and margin else 1.0

    def p_within(self) -> float:
        """Return the p value of equivalence."""
        margin = self.record.margin
        return stats.p_within(self.harm, self.spreads, margin) if self.spreads and margin else 1.0


@dataclass(frozen=True, kw_only=True)
class _Joint:
    """What one arm's evidence is worth beside the other arms' (Holm)."""

    smallest_margin: float
    p_below: float
    p_within: float
    first_alpha: float
    """What Holm's first step asks of the best arm: alpha / number of arms."""


def judge(
    protocol: Protocol, arms: Sequence[ArmRecord], control: ArmRecord | None = None
) -> tuple[VerdictRecord, ...]:
    """Give every arm but the first, which is the reference, its verdict.

    `control` is the perturbed reference: as another fp32 training, its divergence is fp32's.
    """
    reference, *candidates = arms
    cases = [_examine(protocol, reference, arm, control) for arm in candidates]
    alpha = 1 - protocol.confidence
    joint = zip(
        stats.holm_bounds([case.upper for case in cases], alpha),
        stats.holm([case.p_below() for case in cases]),
        stats.holm([case.p_within() for case in cases]),
        strict=True,
    )
    return tuple(
        _conclude(
            case,
            protocol,
            _Joint(smallest_margin=s, p_below=b, p_within=w, first_alpha=alpha / len(cases)),
        )
        for case, (s, b, w) in zip(cases, joint, strict=True)
    )


def standard_deviation_of_difference(differences: Differences) -> float | None:
    """Return the standard deviation over the seeds that have a difference; None below two."""
    known = [d for d in differences if d is not None]
    return statistics.stdev(known) if len(known) >= 2 else None


def differences_per_seed(metric: str, reference: ArmRecord, other: ArmRecord) -> Differences:
    """Return (other - reference) per seed; None where either diverged."""
    both = zip(reference.metrics[metric], other.metrics[metric], strict=True)
    return tuple(None if r is None or c is None else c - r for r, c in both)


def _pairs(reference: Sequence[float | None], arm: Sequence[float | None]) -> Pairs:
    both = zip(reference, arm, strict=True)
    return [(r, c) for r, c in both if r is not None and c is not None]


def _examine(
    protocol: Protocol, reference: ArmRecord, arm: ArmRecord, control: ArmRecord | None
) -> _Case:
    """Gather what one arm's own runs say: failures first, then differences and their spreads."""
    pairs = _pairs(reference.metrics[protocol.metric], arm.metrics[protocol.metric])
    blank = VerdictRecord(
        precision=arm.precision,
        verdict="INCONCLUSIVE",
        why="",
        difference=None,
        interval=None,
        paired_interval=None,
        unpaired_interval=None,
        correlation=None,
        margin=_margin_in_units(protocol, [r for r, _ in pairs]),
        n=len(pairs),
        smallest_margin=None,
        failed_runs=len(arm.diverged),
        failure_rate_upper=stats.failure_rate_upper(
            len(arm.diverged), len(protocol.seeds), confidence=protocol.confidence
        ),
        differences=differences_per_seed(protocol.metric, reference, arm),
    )
    settled = _settled_by_failures(protocol, reference, arm, control)
    if settled:
        return _Case(arm=arm, record=blank, settled=settled)
    beside = _add_training_precision(protocol, reference, arm, blank)
    return _examine_values(protocol, pairs, beside, arm)


def _settled_by_failures(
    protocol: Protocol, reference: ArmRecord, arm: ArmRecord, control: ArmRecord | None
) -> tuple[Verdict, str] | None:
    """Settle what diverged runs decide: no average ever leaves out a pair without a value."""
    fp32 = {*reference.diverged, *(control.diverged if control else ())}
    n, name, own = len(protocol.seeds), protocol.reference, set(arm.diverged)
    if own - fp32:
        also = f"; {name} diverged on {len(fp32)} of {n} seeds itself" if fp32 else ""
        return "FAILED", (
            f"{len(own)} of {n} runs {_failed(arm)}, {len(own - fp32)} of them on seeds on which "
            f"{name} did not{also}"
        )
    if own:
        return "NOT A PRECISION PROBLEM", (
            f"{len(own)} of {n} runs {_failed(arm)}, and {name} diverged on the same seeds: "
            "the training itself is unstable"
        )
    if reference.diverged:
        return _undecided(protocol), (
            f"{name} diverged on {len(reference.diverged)} of {n} seeds and {arm.precision} on "
            "none: without the reference's values there is nothing to compare with"
        )
    return None


def _failed(arm: ArmRecord) -> str:
    """Say how an arm's runs failed: a recipe that raises tells nothing of its numbers."""
    raised, others = len(arm.raised), len(arm.diverged) - len(arm.raised)
    if raised and others:
        return f"failed (the recipe raised in {raised}, {others} diverged)"
    return "ended because the recipe raised" if raised else "diverged"


def _undecided(protocol: Protocol) -> Verdict:
    return "NO MARGIN" if protocol.margin is None else "INCONCLUSIVE"


def _margin_in_units(protocol: Protocol, reference: Sequence[float]) -> float | None:
    if protocol.margin is None or protocol.margin_kind == "absolute":
        return protocol.margin
    return protocol.margin * abs(statistics.fmean(reference)) if reference else None


def _relative_margin(protocol: Protocol) -> float | None:
    return protocol.margin if protocol.margin_kind == "relative" else None


def _examine_values(
    protocol: Protocol, pairs: Pairs, record: VerdictRecord, arm: ArmRecord
) -> _Case:
    """Estimate the harm, unless the values cannot show how it varies."""
    difference = statistics.fmean(c - r for r, c in pairs)
    record = replace(record, difference=difference)
    if len(pairs) == 1:
        why = "no failure seen in one run, which is not evidence of equality: take 3 seeds or more"
        return _Case(arm=arm, record=record, settled=(_undecided(protocol), why))
    estimate = stats.estimate_difference(pairs, relative_margin=_relative_margin(protocol))
    identical = len(arm.same_as_reference) == len(pairs) and all(arm.same_as_reference)
    if estimate.paired.error == 0 and not identical:
        why = (
            f"all {len(pairs)} differences are exactly {difference:.4g}: {protocol.metric} is too "
            "coarse to show how they vary, and an interval of no width would claim certainty; "
            "take a finer metric, such as loss, or more evaluation data"
        )
        return _Case(arm=arm, record=record, settled=(_undecided(protocol), why))
    counting = (estimate.paired,) if identical else estimate.counting
    alpha = 1 - protocol.confidence
    record = replace(
        record,
        interval=stats.bounds(difference, counting, alpha),
        paired_interval=stats.bounds(difference, (estimate.paired,), alpha),
        unpaired_interval=stats.bounds(difference, (estimate.unpaired,), alpha),
        correlation=estimate.correlation,
        detectable_harm=_deviation(counting, len(pairs))
        * stats.detectable_ratio(len(pairs), alpha=alpha),
    )
    harm = difference if protocol.direction == "lower" else -difference
    return _Case(arm=arm, record=record, harm=harm, spreads=counting)


def _deviation(spreads: Sequence[Spread], n: int) -> float:
    """Return the standard deviation of one pair's difference that the widest spread amounts to."""
    return max(spread.error for spread in spreads) * math.sqrt(n)


def _add_training_precision(
    protocol: Protocol, reference: ArmRecord, arm: ArmRecord, record: VerdictRecord
) -> VerdictRecord:
    """Add the difference with the metric evaluated in each arm's own precision: shown only."""
    pairs = _pairs(
        reference.training_precision_metrics[protocol.metric],
        arm.training_precision_metrics[protocol.metric],
    )
    if len(pairs) < len(protocol.seeds):
        return record
    mean = statistics.fmean(c - r for r, c in pairs)
    record = replace(record, training_precision_difference=mean)
    if len(pairs) == 1:
        return record
    counting = stats.estimate_difference(pairs).counting
    interval = stats.bounds(mean, counting, 1 - protocol.confidence)
    return replace(record, training_precision_interval=interval)


def _conclude(case: _Case, protocol: Protocol, joint: _Joint) -> VerdictRecord:
    """Choose the word and give its reason in numbers."""
    record, margin = case.record, case.record.margin
    if case.settled:
        return _said(case, record, *case.settled)
    elsewhere = _not_executed(protocol, case.arm)
    if elsewhere:
        return replace(record, verdict=_undecided(protocol), why=elsewhere)
    record = replace(record, smallest_margin=max(0.0, joint.smallest_margin))
    if margin is None:
        why = (
            "no margin was fixed before the runs, so there is no verdict; the smallest margin that "
            f"these data support is {record.smallest_margin:.4g}"
        )
        return _said(case, record, "NO MARGIN", why)
    alpha = 1 - protocol.confidence
    record = replace(record, p_value=case.p_below(), p_value_holm=joint.p_below)
    lower, upper = stats.bounds(case.harm, case.spreads, alpha)
    if _reassures(joint, alpha) and record.n < _FEWEST_SEEDS:
        record = replace(record, n_needed=_FEWEST_SEEDS)
        why = (
            f"EQUIVALENT or NON-INFERIOR needs at least {_FEWEST_SEEDS} seeds: {record.n} were run"
        )
        return _said(case, record, "INCONCLUSIVE", why)
    if joint.p_within < alpha:
        return _said(case, record, "EQUIVALENT", _why_equivalent(case, margin, lower, upper))
    if joint.p_below < alpha:
        return _said(case, record, "NON-INFERIOR", _why_non_inferior(margin, lower, upper))
    if lower > 0 and case.harm > margin:
        why = f"harm {case.harm:.4g}, at least {lower:.4g}, with a margin of {margin:.4g}"
        return _said(case, record, "WORSE", why)
    record = replace(record, n_needed=_n_needed(case, margin, joint.first_alpha))
    why = _why_inconclusive(record, margin, lower, upper)
    return _said(case, record, "INCONCLUSIVE", why)


def _reassures(joint: _Joint, alpha: float) -> bool:
    return joint.p_within < alpha or joint.p_below < alpha


def _not_executed(protocol: Protocol, arm: ArmRecord) -> str:
    """Say in what an arm executed that was nowhere in its precision; empty where some of it was.

    Products and convolutions decide; in a model that has none, anything else but a cast.
    """
    compute = policy_in(protocol.plans.get(arm.precision, {})).get("compute", "fp32")
    calls = {kind: by for kind, by in arm.executed_dtypes.items() if by and kind != "cast"}
    deciding = {kind: calls[kind] for kind in _HEAVY if kind in calls} or calls
    if compute == "fp32" or not deciding:  # nothing was measured, or nothing could be missing
        return ""
    if any(by.get(str(compute)) for by in deciding.values()):
        return ""
    ran = "; ".join(f"{kind} in {', '.join(sorted(by))}" for kind, by in deciding.items())
    return f"{arm.precision} was not executed: {ran}, nothing in {compute}"


def _n_needed(case: _Case, margin: float, alpha: float) -> int | None:
    """Return how many seeds would prove non-inferiority with 80 % power; always more than were run.

    First as if the true harm were 0; where that is no more than were run, the estimate is what
    stands in the way, and it is taken for the truth.
    """
    n = case.record.n
    deviation = _deviation(case.spreads, n)
    for harm in (0.0, max(0.0, case.harm)):
        needed = stats.required_n((margin - harm) / deviation, alpha=alpha)
        if needed is None or needed > n:
            return needed
    return n + 1


def _said(case: _Case, record: VerdictRecord, verdict: Verdict, why: str) -> VerdictRecord:
    """Attach the verdict, and to its reason what a reader must know about the arm."""
    if case.arm.precision_honoured is False:
        why += f"; not all operations executed in {record.precision} (see the executed dtypes)"
    return replace(record, verdict=verdict, why=why)


def _why_equivalent(case: _Case, margin: float, lower: float, upper: float) -> str:
    if case.spreads[0].error == 0:
        return "every step's loss and every metric equal the reference's bit for bit on all seeds"
    inside = f"harm between {lower:.4g} and {upper:.4g}, inside -{margin:.4g} to {margin:.4g}"
    return f"{inside}; worse, but inside the margin" if lower > 0 else inside


def _why_non_inferior(margin: float, lower: float, upper: float) -> str:
    below = f"harm at most {upper:.4g}, below the margin of {margin:.4g}"
    if lower > 0:
        return f"{below}; worse, but inside the margin"
    better = f"; the whole interval lies on the better side (harm {lower:.4g} to {upper:.4g})"
    return below + better if upper < 0 else below


def _why_inconclusive(record: VerdictRecord, margin: float, lower: float, upper: float) -> str:
    if upper < margin:
        text = (
            f"harm at most {upper:.4g} would be below the margin of {margin:.4g} if this arm stood "
            f"alone, but over all arms Holm's correction leaves p = {record.p_value_holm:.3f}"
        )
    else:
        text = f"harm between {lower:.4g} and {upper:.4g}: the margin is {margin:.4g}"
        text += "; the arm is worse, but by how much is open" if lower > 0 else ""
    if record.n_needed is not None:
        return f"{text}; about {record.n_needed} seeds are needed"
    return f"{text}; more than a million seeds would be needed"
