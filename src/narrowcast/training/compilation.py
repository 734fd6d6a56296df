"""What a run records of a model that was compiled, and what it says of it at its end."""

from __future__ import annotations

from dataclasses import replace

from narrowcast.engine.engine import Engine
from narrowcast.records.run import RunRecord

__all__ = ["compiled_in_part", "with_compilation"]

_LISTED = 3  # reasons for graph breaks in the notice; the record has all


def with_compilation(record: RunRecord, engine: Engine) -> RunRecord:
    """Return the record with what was compiled so far in this process."""
    return record if engine.compiled is None else replace(record, compiled=engine.compiled.record())


def compiled_in_part(engine: Engine) -> str:
    """Say what of a model that was to be compiled was not; '' if all was."""
    if engine.compiled is None:
        return ""
    found = engine.compiled.record()
    reasons = list(found.graph_breaks)
    if found.graphs and not reasons and not found.fell_back:
        return ""
    more = f" and {len(reasons) - _LISTED} more" if len(reasons) > _LISTED else ""
    why = f" ({'; '.join(reasons[:_LISTED])}{more})" if reasons else ""
    return f"not all was compiled: {found.words}{why}"
