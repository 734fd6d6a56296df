"""From a record to the outline of its report; the one entrance of both renderers."""

from __future__ import annotations

from collections.abc import Sequence

from narrowcast.records.comparison import ComparisonRecord
from narrowcast.records.diagnosis import DiagnosisRecord
from narrowcast.records.memory import MemoryRecord
from narrowcast.records.plan import PlanRecord
from narrowcast.records.run import RunRecord, StepPoint
from narrowcast.report.comparison_outline import outline_of_comparison
from narrowcast.report.diagnosis_outline import outline_of_diagnosis
from narrowcast.report.memory_outline import outline_of_memory
from narrowcast.report.plan_outline import outline_of_plan
from narrowcast.report.run_outline import outline_of_run
from narrowcast.report.shapes import Outline

__all__ = ["Reportable", "outline_of"]

Reportable = ComparisonRecord | RunRecord | MemoryRecord | PlanRecord | DiagnosisRecord


def outline_of(record: Reportable, points: Sequence[StepPoint] = ()) -> Outline:
    """Lay out any record that has a report; `points` are the steps of a run."""
    if isinstance(record, ComparisonRecord):
        return outline_of_comparison(record)
    if isinstance(record, RunRecord):
        return outline_of_run(record, points)
    if isinstance(record, PlanRecord):
        return outline_of_plan(record)
    if isinstance(record, DiagnosisRecord):
        return outline_of_diagnosis(record)
    return outline_of_memory(record)
