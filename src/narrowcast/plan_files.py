"""Plans and policies in files, wherever a precision is asked for.

A plan file is what `narrowcast plan` wrote, the run.json of a training, or a plan as JSON. A policy
file is what `narrowcast diagnose --minimal-fp32` wrote, or a policy as JSON.
"""

from __future__ import annotations

import json
import os
from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from narrowcast.errors import NarrowcastError, UsageError
from narrowcast.files import write_atomically
from narrowcast.plan import Plan
from narrowcast.policy import Policy
from narrowcast.records.codec import RecordError, dumps, from_json

__all__ = [
    "PolicyFile",
    "Promise",
    "naming_differences",
    "read_plan",
    "read_promise",
    "write_policy",
]

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


@dataclass(frozen=True, kw_only=True)
class Promise:
    """The budget that a plan was found for, and the training of which it was promised."""

    budget_bytes: int
    recipe: str
    options: dict[str, Any]
    batch_size: int
    device: str
    """``cpu``, a GPU by name, or what a CUDA device at hand calls itself."""
    world: int = 1
    """How many ranks share the training."""
    parallel: str = ""
    """How they do."""

    def differences(
        self,
        *,
        recipe: str,
        options: dict[str, Any],
        batch_size: int,
        devices: Container[str],
        world: int = 1,
        parallel: str = "",
    ) -> tuple[str, ...]:
        """Say in what another training differs; `devices` are all names of the one it runs on."""
        found = []
        if recipe != self.recipe:
            found.append(f"recipe {self.recipe!r}, and this is {recipe!r}")
        else:
            names = sorted({*self.options, *options})
            there, here = (
                {name: held.get(name, "not there") for name in names}
                for held in (self.options, options)
            )
            found += [
                f"{name}={there[name]}, and this is {name}={here[name]}"
                for name in names
                if there[name] != here[name]
            ]
        if batch_size != self.batch_size and "batch_size" not in {*self.options, *options}:
            found.append(f"batches of {self.batch_size}, and these are of {batch_size}")
        if self.device not in devices:
            found.append(f"device {self.device}, and this is another")
        if (world, parallel) != (self.world, self.parallel):
            found.append(
                f"{_sharing(self.world, self.parallel)}, and this is {_sharing(world, parallel)}"
            )
        return tuple(found)


@contextmanager
def naming_differences(notes: Sequence[str]) -> Iterator[None]:
    """Begin the hint of a refusal with `notes` on what the plan was found for: it may be why."""
    try:
        yield
    except UsageError as error:
        error.hint = "; ".join([*notes, error.hint] if error.hint else notes)
        raise


def _sharing(world: int, parallel: str) -> str:
    return f"{parallel} on {world} ranks" if parallel else "one process"


def read_plan(path: Path) -> Plan:
    """Return the plan in a file, or the plan that adds nothing to the policy in it.

    Raises UsageError for a file that holds neither, or one that is not allowed.
    """
    data = _read(path)
    try:
        plan = _plan_in(data) if isinstance(data, dict) else None
    except NarrowcastError as error:
        raise UsageError(f"{path}: {error.message}", hint=error.hint) from None
    if plan is None:
        raise UsageError(f"{path} holds no plan and no policy", hint=_HINT)
    return plan


def read_promise(path: Path) -> Promise | None:
    """Return the budget that the plan in a file was found for; None for a plan without one.

    Raises UsageError for a budget of which it is not said what training it is for.
    """
    data = _read(path)
    if not isinstance(data, dict) or data.get("budget_bytes") is None:
        return None
    known = {f.name: data.get(f.name) for f in fields(Promise)}
    known |= {"device": _device_in(data)} | _ranks_in(data)
    try:
        promise = from_json(Promise, known)
    except RecordError as error:
        raise UsageError(
            f"{path} has a budget and does not say for what training: {error.message}",
            hint="leave budget_bytes out, or give the file as `narrowcast plan` wrote it",
        ) from None
    if promise.budget_bytes <= 0:
        raise UsageError(
            f"{path} has a budget of {promise.budget_bytes} bytes", hint="at least 1 byte"
        )
    return promise


def _device_in(data: dict[str, Any]) -> Any:
    """Return where a plan is for, or a run took place; for CUDA at hand the GPU's own name."""
    environment = data.get("environment")
    machine = environment if isinstance(environment, dict) else {}
    device = data.get("device") or machine.get("device")
    return machine.get("device_name") if str(device).startswith("cuda") else device


def _ranks_in(data: dict[str, Any]) -> dict[str, Any]:
    """Return how many ranks share a training and how, of a plan or of a run."""
    chosen = data.get("chosen")
    held = chosen if isinstance(chosen, dict) else data
    world = data.get("world", data.get("ranks", 1))
    return {"world": world, "parallel": held.get("parallel", "")}


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_without_doubles)
    except _SaidTwice as error:
        raise UsageError(
            f"{path} says {str(error)!r} twice", hint="leave out one of the two: which holds?"
        ) from None
    except (ValueError, RecursionError):
        raise UsageError(f"{path} is not JSON", hint=_HINT) from None
    except OSError as error:
        why = os.strerror(error.errno or 0)
        raise UsageError(f"cannot read {path}: {why}", hint=_HINT) from None


class _SaidTwice(Exception):
    """A key of which one value would be dropped without a word."""


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise _SaidTwice(key)
        found[key] = value
    return found


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
    held = data.get("chosen") if isinstance(data.get("chosen"), dict) else None
    if held is None and "planned_steps" in data:
        held = data
    if held is not None:
        found = held.get("plan")
        if not isinstance(found, dict):
            return None
        data = found
    if data.get("policy"):
        return from_json(Plan, data)
    if "name" in data and "compute" in data:
        policy = from_json(Policy, data)
        return Plan(name=policy.name, policy=policy)
    return None
