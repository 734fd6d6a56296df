"""Whether a resumed run equalled an uninterrupted one, bit for bit, and if not, where first."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from narrowcast.records.run import Environment, OptionValue

__all__ = ["Difference", "Verdict", "VerifyRecord"]

Verdict = Literal["EXACT", "NOT EXACT", "NOT DETERMINISTIC"]


@dataclass(frozen=True, kw_only=True)
class Difference:
    """The first value that differs, in the order of the model's own parameters."""

    name: str
    """Such as 'model.fc.weight', 'engine.optimizer.state.0.exp_avg' or 'metrics'."""
    what: str
    """How it differs: '3 of 128 elements, by 1.2e-07 at most', or the two values."""
    step: int | None
    """The first step whose loss, gradient norm or loss scale differs; None if no step's does."""


@dataclass(frozen=True, kw_only=True)
class VerifyRecord:
    """Three runs of one training: uninterrupted, uninterrupted again, and stopped and resumed.

    EXACT: all three agree in every bit. NOT DETERMINISTIC: the first two already differ, so that
    nothing can be said of the resume. NOT EXACT: only the resumed one differs.
    """

    schema: int = 1
    recipe: str
    options: dict[str, OptionValue] = field(default_factory=dict)
    precision: str
    seed: int
    steps: int
    interrupted_at: int
    verdict: Verdict
    why: str
    difference: Difference | None = None
    tensors: int
    """Tensors compared: weights, buffers, optimizer state, random states."""
    bytes: int
    values: int
    """Other values compared: counters, scales, learning rates, the points of metrics.jsonl."""
    environment: Environment
    started: str
    finished: str
