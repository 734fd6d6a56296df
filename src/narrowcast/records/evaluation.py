"""Stored weights, evaluated: what ``narrowcast evaluate`` leaves behind."""

from __future__ import annotations

from dataclasses import dataclass, field

from narrowcast.records.run import Environment, Evaluation, OptionValue

__all__ = ["EvaluationRecord"]


@dataclass(frozen=True, kw_only=True)
class EvaluationRecord:
    """One set of weights over the whole evaluation set, in fp32 and in the asked precision."""

    schema: int = 1
    recipe: str
    options: dict[str, OptionValue] = field(default_factory=dict)
    precision: str
    weights: str
    """The file that the weights were read from."""
    weights_hash: str
    """SHA-256 over names, dtypes, shapes and bytes of the weights as stored."""
    evaluations: tuple[Evaluation, ...]
    warnings: tuple[str, ...] = ()
    environment: Environment
