"""What a user points `narrowcast report` at, read back into a record."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from narrowcast.errors import NarrowcastError, RunDirectoryError
from narrowcast.records.codec import RecordError, loads, parse
from narrowcast.records.comparison import ComparisonRecord, require_whole
from narrowcast.records.diagnosis import DiagnosisRecord
from narrowcast.records.memory import MemoryRecord
from narrowcast.records.plan import PlanRecord
from narrowcast.records.run import RunRecord, StepPoint, parse_metrics
from narrowcast.report.outline import Reportable

__all__ = ["Source", "read_source"]

# A field that one kind of record has and no other.
_TOLD_BY: dict[str, type[Reportable]] = {
    "protocol": ComparisonRecord,
    "planned_steps": RunRecord,
    "total_peak_bytes": MemoryRecord,
    "budget_bytes": PlanRecord,
    "verdict": DiagnosisRecord,
}
_IN_DIRECTORIES = ("comparison.json", "run.json", "memory.json", "diagnosis.json")
_HINT = (
    "give the directory of a run or of a comparison, or a JSON file that "
    "`narrowcast compare`, `train` or `memory` wrote"
)


@dataclass(frozen=True, kw_only=True)
class Source:
    """A record, the steps of a run if it is one, and where its report belongs."""

    record: Reportable
    points: tuple[StepPoint, ...]
    report_path: Path


def read_source(path: Path) -> Source:
    """Read a run directory, a comparison directory or a record's JSON file.

    Raises RunDirectoryError if there is nothing of the kind, RecordError if a file is damaged.
    """
    if path.is_dir():
        return _read_directory(path)
    record = _read_record(path)
    whole = path.name in _IN_DIRECTORIES
    target = path.with_name("report.html") if whole else path.with_suffix(".html")
    points = _read_points(path.parent) if path.name == "run.json" else ()
    return Source(record=record, points=points, report_path=target)


def _read_directory(path: Path) -> Source:
    for name in _IN_DIRECTORIES:
        if (path / name).exists():
            return read_source(path / name)
    if (path / "protocol.json").exists():
        raise RunDirectoryError(
            f"the comparison in {path} has not ended: there is no comparison.json yet",
            hint="run the same `narrowcast compare` again to go on with it, or report on one of "
            f"its runs under {path / 'arms'}",
        )
    raise RunDirectoryError(f"{path} holds no run, comparison or memory ledger", hint=_HINT)


def _read_record(path: Path) -> Reportable:
    text = _read_text(path)
    try:
        data = parse(text, "record")
    except RecordError as error:
        raise RunDirectoryError(f"{path} is {error.message}", hint=_HINT) from None
    fields: Sequence[str] = list(data) if isinstance(data, dict) else ()
    kind = next((kind for field, kind in _TOLD_BY.items() if field in fields), None)
    if kind is None:
        raise RunDirectoryError(
            f"{path} is not a record of a run, a comparison or a memory ledger", hint=_HINT
        )
    return _named(path, kind, text)


def _named(path: Path, kind: type[Reportable], text: str) -> Reportable:
    """Read a record, and name the file if it cannot be."""
    try:
        record = loads(kind, text)
        if isinstance(record, ComparisonRecord):
            require_whole(record)
    except NarrowcastError as error:
        raise type(error)(f"{path}: {error.message}", hint=error.hint) from None
    return record


def _read_points(directory: Path) -> tuple[StepPoint, ...]:
    path = directory / "metrics.jsonl"
    if not path.exists():
        return ()
    points = parse_metrics(_read_text(path))
    return tuple(point for point in points if isinstance(point, StepPoint))


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise RunDirectoryError(f"{path} is not text", hint=_HINT) from None
    except OSError as error:
        why = os.strerror(error.errno or 0)
        raise RunDirectoryError(f"cannot read {path}: {why}", hint=_HINT) from None
