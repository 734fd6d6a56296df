"""What one training left behind: ``run.json`` is a RunRecord, ``metrics.jsonl`` holds the points.

``metrics.jsonl`` is appended while the run goes on, one JSON object a line: a StepPoint has
``"kind": "step"``, an Evaluation ``"kind": "evaluation"``.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Literal

from narrowcast.records.codec import RecordError, from_json
from narrowcast.records.compilation import Compilation
from narrowcast.records.memory import MemoryRecord
from narrowcast.records.ranges import BorderRange

__all__ = [
    "AxisValue",
    "Environment",
    "Evaluation",
    "OptionValue",
    "RunRecord",
    "SkippedStep",
    "Status",
    "StepPoint",
    "parse_metrics",
    "policy_in",
]

OptionValue = str | int | float | bool | None
AxisValue = str | int | list[dict[str, str]] | dict[str, str | list[str]]
"""One field of a ``plan.Plan`` as JSON."""
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
    data_hash: str = ""
    """SHA-256 over the samples, batch after batch."""


@dataclass(frozen=True, kw_only=True)
class SkippedStep:
    """An optimizer step that was not applied."""

    step: int
    reason: SkipReason
    loss_scale: float
    parameters: tuple[str, ...]
    """Names of parameters whose gradients were not finite; the first few, most important first."""


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """One training: what was asked, what really ran, what came out."""

    schema: int = 2
    recipe: str
    recipe_path: str = ""
    """The recipe's file."""
    recipe_digest: str = ""
    """SHA-256 of that file."""
    options: dict[str, OptionValue]
    precision: str
    plan: dict[str, AxisValue]
    """What ran: every axis of ``plan.Plan``, its policy among them."""
    seed: int
    planned_steps: int
    completed_steps: int = 0
    """Optimizer steps tried: applied and skipped."""
    applied_steps: int = 0
    batch_size: int
    accumulate: int = 1
    clip_norm: float | None = None
    parallel: str = ""
    """How several processes shared the work: "ddp"; empty for one process."""
    ranks: int = 1
    rank_peak_bytes: tuple[int, ...] = ()
    """The peak of each rank, where there are several and their memory was measured."""
    compiled: Compilation | None = None
    """What torch.compile made of the model; none for a run without it."""
    deterministic: bool = True
    """Whether only kernels that repeat their bits were allowed."""
    perturbation: str = ""
    """What was changed in the initial weights of a control run, in words."""
    status: Status = "running"
    failure: str = ""
    failure_hint: str = ""
    """What to do about it, if the error said so."""
    failure_kind: str = ""
    """Class name of the error that ended a failed run; PrecisionError: the numbers broke."""
    evaluations: tuple[Evaluation, ...] = ()
    """All of them; the last fp32 and the last training-precision one are the result."""
    final_loss: float | None = None
    """Mean training loss over the last tenth of the steps."""
    peak_bytes: int | None = None
    budget_bytes: int | None = None
    """What the peak was to stay within, if the plan was found for a budget."""
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
    watched_at: int = 0
    """The newest step of which the values at module borders were looked at; 0: none."""
    watched: tuple[BorderRange, ...] = ()
    """These values, in the order in which the borders were crossed."""
    environment: Environment
    started: str
    finished: str = ""
    warnings: tuple[str, ...] = ()
    command: str = ""


def policy_in(plan: dict[str, AxisValue]) -> dict[str, str | list[str]]:
    """Return the policy of a recorded plan; {} for a record without one."""
    found = plan.get("policy", {})
    return found if isinstance(found, dict) else {}


def parse_metrics(text: str) -> tuple[StepPoint | Evaluation, ...]:
    """Read the lines of a metrics.jsonl, also of one that is being written.

    A last line without its end was torn by a crash, or is still on its way, and is left out.
    Raises RecordError, naming the line, for any other that is not a point.
    """
    points: list[StepPoint | Evaluation] = []
    for number, line in enumerate(text.split("\n")[:-1], start=1):
        try:
            data = json.loads(line)
            if data["kind"] == "evaluation":
                points.append(from_json(Evaluation, data))
            else:
                points.append(from_json(StepPoint, data))
        except (ValueError, TypeError, KeyError, RecursionError, RecordError) as error:
            raise RecordError(
                f"line {number} of metrics.jsonl is not a point: {line!r:.80}",
                hint="the file was edited or damaged; the checkpoints are not affected",
            ) from error
    return tuple(points)
