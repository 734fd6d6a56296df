"""Plans and policies in files, wherever a precision is asked for.

A plan file is what `narrowcast plan` wrote, the run.json of a training, or a plan as JSON. A policy
file is what `narrowcast diagnose --minimal-fp32` wrote, or a policy as JSON.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from narrowcast.errors import NarrowcastError, UsageError
from narrowcast.files import write_atomically
from narrowcast.plan import Plan
from narrowcast.policy import Policy
from narrowcast.records.codec import dumps, from_json

__all__ = ["PolicyFile", "read_plan", "write_policy"]

_HINT = (
    "give what `narrowcast plan --output FILE` or `narrowcast diagnose --minimal-fp32` wrote, the "
    "run.json of a training, or a plan or a policy as JSON"
)


@dataclass(frozen=True, kw_only=True)
class PolicyFile:
    """A policy in the plan that it is part of, and how it came about."""

    kind: Literal["policy"] = "policy"
    schema: int = 1
    plan: Plan
    why: str = ""
    command: str = ""


def read_plan(path: Path) -> Plan:
    """Return the plan in a file, or the plan that adds nothing to the policy in it.

    Raises UsageError for a file that holds neither, or one that is not allowed.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        raise UsageError(f"{path} is not JSON", hint=_HINT) from None
    except OSError as error:
        why = os.strerror(error.errno or 0)
        raise UsageError(f"cannot read {path}: {why}", hint=_HINT) from None
    try:
        plan = _plan_in(data) if isinstance(data, dict) else None
    except NarrowcastError as error:
        raise UsageError(f"{path}: {error.message}", hint=error.hint) from None
    if plan is None:
        raise UsageError(f"{path} holds no plan and no policy", hint=_HINT)
    return plan


def write_policy(path: Path, plan: Plan, *, why: str, command: str) -> None:
    """Write a policy file, whole or not at all.

    Raises UsageError where the file exists: nothing is overwritten.
    """
    if path.exists():
        raise UsageError(f"{path} exists", hint="choose another file, or delete this one first")
    write_atomically(path, dumps(PolicyFile(plan=plan, why=why, command=command)) + "\n")


def _plan_in(data: dict[str, Any]) -> Plan | None:
    if data.get("kind") == "policy":
        return from_json(PolicyFile, data).plan
    if isinstance(data.get("chosen"), dict):
        data = {"policy": None, **(data["chosen"].get("plan") or {})}
    elif "planned_steps" in data:
        data = {"policy": None, **(data.get("plan") or {})}
    if data.get("policy"):
        return from_json(Plan, data)
    if "name" in data and "compute" in data:
        policy = from_json(Policy, data)
        return Plan(name=policy.name, policy=policy)
    return None
