"""What one training left behind: ``run.json`` is a RunRecord, ``metrics.jsonl`` holds the points.

``metrics.jsonl`` is appended while the run goes on, one JSON object a line: a StepPoint has
``"kind": "step"``, an Evaluation ``"kind": "evaluation"``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from narrowcast.records.memory import MemoryRecord

__all__ = ["Environment", "Evaluation", "OptionValue", "RunRecord", "SkippedStep", "StepPoint"]

OptionValue = str | int | float | bool | None
SkipReason = Literal["", "gradient overflow", "non-finite gradient", "non-finite loss"]
Status = Literal["running", "finished", "interrupted", "failed"]


@dataclass(frozen=True, kw_only=True)
class Environment:
    """The machine and the versions that a figure was obtained with."""

    device: str
    device_name: str
    threads: int
    platform: str
    python: str
    torch: str
    narrowcast: str
    commit: str = ""


@dataclass(frozen=True, kw_only=True)
class StepPoint:
    """One optimizer step, applied or skipped."""

    kind: Literal["step"] = "step"
    step: int
    """Counts from 1; skipped steps count."""
    loss: float
    loss_scale: float
    gradient_norm: float
    """L2 norm of the unscaled gradients, before clipping."""
    applied: bool
    reason: SkipReason = ""
    seconds: float
    learning_rate: float


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Metrics over the whole evaluation set, and the precision in which they were computed."""

    kind: Literal["evaluation"] = "evaluation"
    step: int
    precision: str
    """'fp32', or the policy's name when evaluated under its autocast."""
    metrics: dict[str, float]
    examples: int


@dataclass(frozen=True, kw_only=True)
class SkippedStep:
    """An optimizer step that was not applied."""

    step: int
    reason: SkipReason
    loss_scale: float
    parameters: tuple[str, ...]
    """Names of the parameters whose gradients were not finite; the first few, most important first."""


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """One training: what was asked, what really ran, what came out."""

    schema: int = 1
    recipe: str
    options: dict[str, OptionValue]
    precision: str
    policy: dict[str, str | list[str]]
    seed: int
    planned_steps: int
    completed_steps: int = 0
    """Optimizer steps tried: applied and skipped."""
    applied_steps: int = 0
    batch_size: int
    accumulate: int = 1
    status: Status = "running"
    failure: str = ""
    evaluations: tuple[Evaluation, ...] = ()
    """All of them; the last fp32 and the last training-precision one are the result."""
    final_loss: float | None = None
    """Mean training loss over the last tenth of the steps."""
    peak_bytes: int | None = None
    memory: MemoryRecord | None = None
    step_seconds: float | None = None
    """Median over the steps, without the first ones and without measured ones."""
    samples_per_second: float | None = None
    skipped: tuple[SkippedStep, ...] = ()
    skipped_steps: int = 0
    executed_dtypes: dict[str, dict[str, int]] = field(default_factory=dict)
    """Operation kind -> dtype it really executed in -> calls in one training step."""
    precision_honoured: bool | None = None
    """Whether every matrix product and convolution executed in the policy's compute format."""
    precision_notes: tuple[str, ...] = ()
    initial_weights_hash: str = ""
    data_order_hash: str = ""
    """SHA-256 over the ids of all samples, in the order in which they were trained on."""
    resumed_at: tuple[int, ...] = ()
    environment: Environment
    started: str
    finished: str = ""
    warnings: tuple[str, ...] = ()
    command: str = ""
