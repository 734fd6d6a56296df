"""A comparison of one training under several precisions: the protocol, the arms, the verdicts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from narrowcast.records.codec import RecordError
from narrowcast.records.run import AxisValue, Environment, OptionValue

__all__ = [
    "ArmRecord",
    "ComparisonRecord",
    "ControlRecord",
    "CurvePoint",
    "Protocol",
    "VerdictRecord",
    "require_whole",
]

Direction = Literal["higher", "lower"]
MarginKind = Literal["absolute", "relative"]
Verdict = Literal[
    "NON-INFERIOR",
    "EQUIVALENT",
    "WORSE",
    "INCONCLUSIVE",
    "FAILED",
    "NOT A PRECISION PROBLEM",
    "NO MARGIN",
]


_EDITED = "the file was edited; the same `narrowcast compare` writes comparison.json anew"


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """What was fixed before the first step. The hash covers all fields but `hash` and `written`."""

    recipe: str
    options: dict[str, OptionValue]
    metric: str
    direction: Direction
    """Which way is better."""
    margin: float | None
    """Largest acceptable harm: in units of the metric, or (relative) as a fraction of the
    reference's mean. None: no verdict will be given. VerdictRecord.margin is in metric units."""
    margin_text: str
    """The margin as the user wrote it, such as '0.01' or '1%'."""
    margin_kind: MarginKind = "absolute"
    steps: int
    seeds: tuple[int, ...]
    """Derived from the recipe's name by a hash; the user chooses only how many."""
    reference: str
    arms: tuple[str, ...]
    """The reference first, then the candidates; the control is not among them."""
    control: str = ""
    """What was done to the reference to get the control arm."""
    evaluation_precision: str
    """The precision in which the metric that decides was evaluated."""
    confidence: float
    """Of each one-sided bound: 0.95 for a two-sided interval of 90 %."""
    device: str
    plans: dict[str, dict[str, AxisValue]] = field(default_factory=dict)
    """Arm -> every axis of its plan (``plan.Plan``), its policy among them."""
    training: dict[str, OptionValue] = field(default_factory=dict)
    """What the training loop was told besides seed and steps: batch size, ...; and `data`, the
    SHA-256 of the first training and the first evaluation batch."""
    recipe_digest: str = ""
    """SHA-256 of the recipe's source file and of the user's modules that it imports."""
    stopping: str = "all seeds of all arms, then one look"
    written: str = ""
    hash: str = ""


@dataclass(frozen=True, kw_only=True)
class CurvePoint:
    """One point of a thinned training curve."""

    step: int
    loss: float
    loss_scale: float
    applied: bool


@dataclass(frozen=True, kw_only=True)
class ArmRecord:
    """All runs of one precision. Lists run parallel to `seeds`; None marks a diverged run."""

    precision: str
    seeds: tuple[int, ...]
    metrics: dict[str, tuple[float | None, ...]]
    """Metric -> value per seed, evaluated in fp32 from the master weights."""
    training_precision_metrics: dict[str, tuple[float | None, ...]]
    """The same, evaluated under the arm's own precision."""
    final_losses: tuple[float | None, ...]
    diverged: tuple[int, ...]
    """Seeds whose run failed or ended with a non-finite metric; they count as failures."""
    failures: tuple[str, ...] = ()
    raised: tuple[int, ...] = ()
    """Those of `diverged` whose run ended because the recipe's own code raised."""
    peak_bytes: int | None
    step_seconds: float | None
    step_seconds_per_seed: tuple[float | None, ...] = ()
    skipped_steps: int
    total_steps: int
    skipped_steps_per_seed: tuple[int, ...] = ()
    executed_dtypes: dict[str, dict[str, int]]
    precision_honoured: bool | None
    precision_notes: tuple[str, ...] = ()
    initial_weights_hashes: tuple[str, ...] = ()
    data_order_hashes: tuple[str, ...] = ()
    memory_lines: dict[str, int] = field(default_factory=dict)
    """Category -> bytes at the peak."""
    memory_timeline: tuple[tuple[str, int], ...] = ()
    """(phase, live bytes), thinned, in order."""
    curves: tuple[tuple[CurvePoint, ...], ...] = ()
    same_as_reference: tuple[bool, ...] = ()
    """Per seed: whether every step's loss and every metric equal the reference's bit for bit."""
    run_directories: tuple[str, ...] = ()
    metric_means: dict[str, float | None] = field(default_factory=dict)
    """Metric -> mean of `metrics` over the seeds that did not diverge; None if all did."""
    metric_sds: dict[str, float | None] = field(default_factory=dict)
    """Metric -> sample standard deviation of the same values; None below two of them."""


@dataclass(frozen=True, kw_only=True)
class ControlRecord:
    """fp32 against fp32-again-perturbed: the noise floor, and the proof that it was perturbed."""

    arm: ArmRecord
    perturbation: str
    loss_changed: tuple[bool, ...]
    """Per seed: whether the training curve differed from the reference's at all."""
    sd_of_difference: float | None
    differences: tuple[float | None, ...] = ()
    """(control - reference) per seed, in units of the metric; None where either diverged."""


@dataclass(frozen=True, kw_only=True)
class VerdictRecord:
    """What the data allow to be said of one precision against the reference.

    `difference` and `interval` are (arm - reference) in units of the metric, as measured; `harm`
    is the same with the sign turned so that positive is worse.
    """

    precision: str
    verdict: Verdict
    why: str
    difference: float | None
    interval: tuple[float, float] | None
    """The interval that counts: two-sided 90 % (one-sided 95 % bounds); the wider of paired and
    unpaired where pairing did not help, and wider still by the uncertainty of a relative margin."""
    paired_interval: tuple[float, float] | None
    unpaired_interval: tuple[float, float] | None
    correlation: float | None
    margin: float | None
    """In units of the metric; a relative one is resolved with the reference's mean."""
    n: int
    """Pairs of runs that both ended with a finite metric."""
    n_needed: int | None = None
    """Seeds that would prove non-inferiority with 80 % power at this spread and margin if the true
    difference were 0 or, where that is no more than were run, if it were the estimate."""
    smallest_margin: float | None
    """The smallest margin that these data would support (with Holm's correction over the arms)."""
    p_value: float | None = None
    p_value_holm: float | None = None
    failed_runs: int = 0
    failure_rate_upper: float | None = None
    """One-sided 95 % Clopper-Pearson upper bound on the rate of failed runs."""
    training_precision_difference: float | None = None
    """The same difference with the metric evaluated in the arm's own precision; decides nothing."""
    training_precision_interval: tuple[float, float] | None = None
    differences: tuple[float | None, ...] = ()
    """(arm - reference) per seed, the raw values; None where either diverged."""
    detectable_harm: float | None = None
    """True harm that the interval would have shown to be above 0 with 80 % power."""


@dataclass(frozen=True, kw_only=True)
class ComparisonRecord:
    """The whole comparison; `untested` says in words what it does not show."""

    schema: int = 2
    protocol: Protocol
    arms: tuple[ArmRecord, ...]
    control: ControlRecord | None
    verdicts: tuple[VerdictRecord, ...]
    untested: tuple[str, ...]
    warnings: tuple[str, ...] = ()
    environment: Environment
    started: str
    finished: str
    command: str = ""


def require_whole(record: ComparisonRecord) -> None:
    """Raise RecordError unless every arm of the protocol is there, with a value for every seed."""
    names = tuple(arm.precision for arm in record.arms)
    if not names or names != record.protocol.arms:
        raise RecordError(
            f"the arms are {list(names)}, and the protocol has {list(record.protocol.arms)}",
            hint=_EDITED,
        )
    for arm in record.arms:
        lists = (*arm.metrics.values(), *arm.training_precision_metrics.values(), arm.final_losses)
        lengths = {len(values) for values in lists}
        if lengths != {len(arm.seeds)}:
            raise RecordError(
                f"{arm.precision} has {len(arm.seeds)} seeds, and {sorted(lengths)} values of its "
                "metrics",
                hint=_EDITED,
            )
