"""Records for the tests of the report: the invented ones of tests/golden, and hostile twins."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from narrowcast.records.codec import loads
from narrowcast.records.comparison import ComparisonRecord
from narrowcast.records.diagnosis import DiagnosisRecord
from narrowcast.records.memory import MemoryRecord
from narrowcast.records.plan import PlanRecord
from narrowcast.records.run import RunRecord, StepPoint, parse_metrics

GOLDEN = Path(__file__).parent / "golden"
KINDS: dict[str, Any] = {
    "comparison": ComparisonRecord,
    "comparison_bad": ComparisonRecord,
    "run": RunRecord,
    "memory": MemoryRecord,
    "plan": PlanRecord,
    "diagnosis": DiagnosisRecord,
}

HOSTILE = (
    "</script><script>window.hit=1</script><img src=x onerror=window.hit=1><!--"
    "<a href='javascript:hit=1'>[red]%{x}&lt;{{7*7}}\x1b[31m\u202e\n@p-fp16"
)
# Fields whose values are words of ours, not a user's.
_OURS = {
    "verdict", "reason", "status", "kind", "direction", "margin_kind", "speed", "phase", "compute",
}  # fmt: skip


def golden(name: str) -> Any:
    """The record of tests/golden/<name>.json."""
    return loads(KINDS[name], (GOLDEN / f"{name}.json").read_text())


def points() -> tuple[StepPoint, ...]:
    """The steps that belong to the golden run."""
    lines = parse_metrics((GOLDEN / "metrics.jsonl").read_text())
    return tuple(line for line in lines if isinstance(line, StepPoint))


def hostile(name: str) -> Any:
    """A golden record in which every string that could come from a user is an attack as well."""
    return _attacked(golden(name))


def _attacked(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.replace(
            value,
            **{
                field.name: _attacked(getattr(value, field.name))
                for field in dataclasses.fields(value)
                if field.name not in _OURS
            },
        )
    if isinstance(value, dict):
        return {f"{key}{HOSTILE}": _attacked(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_attacked(item) for item in value)
    return value + HOSTILE if isinstance(value, str) else value
