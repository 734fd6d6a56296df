"""What a comparison does not show, computed from its facts and printed beside every verdict.

A verdict is read without its conditions unless the conditions are part of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from narrowcast.records.comparison import ArmRecord, ControlRecord, Protocol, VerdictRecord
from narrowcast.records.run import Environment, policy_in

__all__ = ["what_was_not_tested"]


def what_was_not_tested(
    protocol: Protocol,
    arms: Sequence[ArmRecord],
    verdicts: Sequence[VerdictRecord],
    *,
    control: ControlRecord,
    environment: Environment,
) -> tuple[str, ...]:
    """Return the sentences, the most general limit first."""
    return (
        *_design(protocol, arms),
        *_seeds(protocol, verdicts),
        *_device(protocol, environment),
        *_evaluation(protocol, arms),
        *_control(control),
    )


def _design(protocol: Protocol, arms: Sequence[ArmRecord]) -> Iterator[str]:
    yield (
        f"Longer training: every run took {protocol.steps} steps; what low precision does later "
        "was not seen."
    )
    if any(_starts_alike(arm) for arm in arms):
        yield (
            "Other initial weights: all seeds started from the same ones, which the recipe sets "
            "itself."
        )
        varied = "data order and dropout"
    else:
        varied = "initial weights, data order and dropout"
    yield (
        f"Other data and other evaluation samples: the seeds vary {varied} of one recipe, with one "
        "set of options and one evaluation set."
    )
    yield "Options tuned for a precision: every arm used those of the recipe."


def _starts_alike(arm: ArmRecord) -> bool:
    """Whether several seeds began with one set of weights."""
    hashes = arm.initial_weights_hashes
    return len(hashes) > 1 and len(set(hashes)) == 1 and hashes[0] != ""


def _seeds(protocol: Protocol, verdicts: Sequence[VerdictRecord]) -> Iterator[str]:
    n = len(protocol.seeds)
    if n == 1:
        yield (
            "Variation between seeds: with one seed no difference can be told from chance, and "
            "nothing is known of the rate of failures."
        )
        return
    rates = [v.failure_rate_upper for v in verdicts if v.failed_runs == 0 and v.failure_rate_upper]
    if rates:
        yield (
            f"Rare failures: {n} runs without one still allow a failure rate of {max(rates):.0%} "
            f"({protocol.confidence:.0%} confidence), and rare large harm can hide in the same way."
        )


def _device(protocol: Protocol, environment: Environment) -> Iterator[str]:
    name = environment.device_name or environment.device
    yield f"Other machines: everything ran on {name} with torch {environment.torch}."
    if not environment.device.startswith("cpu"):
        return
    yield "Speed on a GPU: step times on a CPU say nothing about it, and its memory differs."
    policies = [policy_in(plan) for plan in protocol.plans.values()]
    rehearsed = {str(policy.get("autocast_rules")) for policy in policies}
    autocasts = any(p.get("param") != p.get("compute") for p in policies)
    if autocasts and "cuda" not in rehearsed:
        yield (
            "CUDA's autocast: on a CPU autocast keeps other operations in fp32 than on a GPU "
            "(--autocast-rules cuda rehearses a GPU's rules)."
        )


def _evaluation(protocol: Protocol, arms: Sequence[ArmRecord]) -> Iterator[str]:
    if any(arm.precision != protocol.evaluation_precision for arm in arms):
        yield (
            f"Use in low precision: the verdict rests on {protocol.metric} evaluated in "
            f"{protocol.evaluation_precision}; values in the training precision stand beside it."
        )


def _control(control: ControlRecord) -> Iterator[str]:
    unchanged = control.loss_changed.count(False)
    if unchanged:
        yield (
            f"The noise floor: the perturbation changed no loss on {unchanged} of "
            f"{len(control.loss_changed)} seeds, so the control shows nothing on them."
        )
