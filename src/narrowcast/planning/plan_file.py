"""A plan read back from a file: of `narrowcast plan`, from a run's record, or a bare one."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from narrowcast.errors import NarrowcastError, UsageError
from narrowcast.plan import Plan
from narrowcast.records.codec import from_json

__all__ = ["read_plan"]

_HINT = (
    "give what `narrowcast plan --output FILE` wrote, the run.json of a training, or a plan as JSON"
)


def read_plan(path: Path) -> Plan:
    """Return the plan in a file: the choice of a PlanRecord, the plan of a RunRecord, or a Plan.

    Raises UsageError for a file that holds none of them, or a plan that is none.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        raise UsageError(f"{path} is not JSON", hint=_HINT) from None
    except OSError as error:
        why = os.strerror(error.errno or 0)
        raise UsageError(f"cannot read {path}: {why}", hint=_HINT) from None
    found = _plan_in(data)
    if found is None:
        raise UsageError(f"{path} holds no plan", hint=_HINT)
    try:
        return from_json(Plan, found)
    except NarrowcastError as error:
        raise UsageError(f"{path}: {error.message}", hint=error.hint) from None


def _plan_in(data: Any) -> Any:
    if not isinstance(data, dict):
        return None
    if isinstance(data.get("chosen"), dict):
        return data["chosen"].get("plan")
    if "planned_steps" in data:
        return data.get("plan")
    return data if "policy" in data else None
