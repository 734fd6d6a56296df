"""From the runs of one precision to its ArmRecord: what a comparison knows of each arm.

A run that failed, or ended with a metric that is not a number, stands in every list as None. It is
never left out: `diverged` counts it, and no average is taken as if it had not been started.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from narrowcast.errors import RecipeError
from narrowcast.formats import float_format
from narrowcast.records.comparison import ArmRecord, CurvePoint
from narrowcast.records.memory import MemoryRecord
from narrowcast.records.run import Evaluation, RunRecord, StepPoint

__all__ = ["Run", "arm_record", "losses_differ", "same_training", "value_of"]

# A chart is a few hundred pixels wide; more points would only make the report larger.
_CURVE_POINTS = 240

# A metric beyond fp32's range did not come out of a training that still made sense.
_LARGEST = float_format("fp32").max

Values = tuple[float | None, ...]


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training of a comparison, as its directory tells."""

    record: RunRecord
    steps: tuple[StepPoint, ...]
    directory: str
    """Relative to the comparison's own."""


def value_of(run: Run, metric: str, *, precision: str = "fp32") -> float | None:
    """Return the final value of a metric evaluated in `precision`; None if the run diverged."""
    evaluation = _final_evaluation(run, precision)
    value = evaluation.metrics.get(metric, math.nan) if evaluation else math.nan
    return value if abs(value) <= _LARGEST else None


def same_training(run: Run, reference: Run) -> bool:
    """Whether every step's loss and every final fp32 metric are equal, bit for bit."""
    metrics = _final_evaluation(run, "fp32"), _final_evaluation(reference, "fp32")
    return not losses_differ(run, reference) and metrics[0] == metrics[1]


def losses_differ(run: Run, reference: Run) -> bool:
    """Whether the loss of any step differs at all, or one run took more steps."""
    # repr() is exact for doubles and finds NaN equal to itself, so that no run differs from itself.
    return [repr(p.loss) for p in run.steps] != [repr(p.loss) for p in reference.steps]


def arm_record(
    precision: str, runs: Sequence[Run], *, metric: str, reference: Sequence[Run]
) -> ArmRecord:
    """Aggregate the runs of one precision, one per seed, in the order of the seeds.

    Memory and dtypes are those of one training step, the same in every run, and are taken from the
    first run that measured them. Step time and peak are medians over the runs.
    """
    names = sorted(
        {metric, *(n for run in runs for e in run.record.evaluations for n in e.metrics)}
    )
    metrics = {name: tuple(value_of(run, name) for run in runs) for name in names}
    memory = next((run.record.memory for run in runs if run.record.memory), None)
    measured = [run.record for run in runs if run.record.executed_dtypes]
    honoured = [r.precision_honoured for r in measured if r.precision_honoured is not None]
    peaks = [r.record.peak_bytes for r in runs if r.record.peak_bytes is not None]
    times = tuple(run.record.step_seconds for run in runs)
    known_times = [t for t in times if t is not None]
    return ArmRecord(
        precision=precision,
        seeds=tuple(run.record.seed for run in runs),
        metrics=metrics,
        training_precision_metrics={
            name: tuple(value_of(run, name, precision=run.record.precision) for run in runs)
            for name in names
        },
        final_losses=tuple(run.record.final_loss for run in runs),
        diverged=tuple(run.record.seed for run in runs if value_of(run, metric) is None),
        failures=tuple(
            f"seed {run.record.seed}: {_failure(run.record, metric)}"
            for run in runs
            if value_of(run, metric) is None
        ),
        raised=tuple(run.record.seed for run in runs if _raised(run.record)),
        peak_bytes=statistics.median_high(peaks) if peaks else None,
        step_seconds=statistics.median(known_times) if known_times else None,
        step_seconds_per_seed=times,
        skipped_steps=sum(run.record.skipped_steps for run in runs),
        total_steps=sum(run.record.completed_steps for run in runs),
        skipped_steps_per_seed=tuple(run.record.skipped_steps for run in runs),
        executed_dtypes=measured[0].executed_dtypes if measured else {},
        precision_honoured=all(honoured) if honoured else None,
        precision_notes=tuple(dict.fromkeys(n for run in runs for n in run.record.precision_notes)),
        initial_weights_hashes=tuple(run.record.initial_weights_hash for run in runs),
        data_order_hashes=tuple(run.record.data_order_hash for run in runs),
        memory_lines={line.category: line.bytes for line in memory.lines} if memory else {},
        memory_timeline=_timeline(memory) if memory else (),
        curves=tuple(_curve(run.steps) for run in runs),
        same_as_reference=tuple(
            same_training(run, other) for run, other in zip(runs, reference, strict=True)
        ),
        run_directories=tuple(run.directory for run in runs),
        metric_means={name: _mean(values) for name, values in metrics.items()},
        metric_sds={name: _deviation(values) for name, values in metrics.items()},
    )


def _final_evaluation(run: Run, precision: str) -> Evaluation | None:
    """Return the last evaluation in this precision, if it was made after the last step."""
    if run.record.status != "finished":
        return None
    made = [e for e in run.record.evaluations if e.precision == precision]
    return made[-1] if made and made[-1].step == run.record.completed_steps else None


def _failure(record: RunRecord, metric: str) -> str:
    """Say why a run has no value; what to do about it is a last line."""
    failure = record.failure or f"{metric} is not a number"
    if _raised(record):
        at = min(record.completed_steps + 1, record.planned_steps)
        failure = f"raised at step {at}: {failure}"
    return f"{failure}\nhint: {record.failure_hint}" if record.failure_hint else failure


def _raised(record: RunRecord) -> bool:
    return record.failure_kind == RecipeError.__name__


def _mean(values: Values) -> float | None:
    known = [v for v in values if v is not None]
    return statistics.fmean(known) if known else None


def _deviation(values: Values) -> float | None:
    known = [v for v in values if v is not None]
    return statistics.stdev(known) if len(known) >= 2 else None


def _curve(steps: Sequence[StepPoint]) -> tuple[CurvePoint, ...]:
    """Thin a curve evenly; first, last and every skipped step stay."""
    stride = max(1, math.ceil(len(steps) / _CURVE_POINTS))
    return tuple(
        CurvePoint(step=p.step, loss=p.loss, loss_scale=p.loss_scale, applied=p.applied)
        for i, p in enumerate(steps)
        if i % stride == 0 or i == len(steps) - 1 or not p.applied
    )


def _timeline(memory: MemoryRecord) -> tuple[tuple[str, int], ...]:
    """Thin a timeline to the highest point of each stretch, so that the peak stays."""
    points = [(point.phase, point.bytes) for point in memory.timeline]
    stride = max(1, math.ceil(len(points) / _CURVE_POINTS))
    return tuple(
        max(points[i : i + stride], key=lambda point: point[1])
        for i in range(0, len(points), stride)
    )
