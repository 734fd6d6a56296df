"""From what a user typed about precision to a plan, and the reason where one was chosen."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from narrowcast.cli.common import console
from narrowcast.errors import UsageError

if TYPE_CHECKING:
    import torch

    from narrowcast.plan import Plan
    from narrowcast.policy import AutocastRules

__all__ = ["KeepOption", "PolicyOption", "adjusted", "asked", "chosen_plan", "plan_called"]

KeepOption = Annotated[
    list[str] | None,
    typer.Option(
        "--keep-fp32",
        metavar="GLOB",
        help="Keep modules of this name in fp32, such as 'head' or 'blocks.*.norm', or a function "
        "of one, such as 'blocks.*.attention:softmax'; repeatable.",
    ),
]


PolicyOption = Annotated[
    Path | None,
    typer.Option(
        "--policy",
        metavar="FILE",
        help="Take the policy in a file, such as `narrowcast diagnose --minimal-fp32` writes.",
    ),
]


def asked(precision: str, policy: Path | None) -> str | Path:
    """Return what was asked for: a name, or a file with a plan or a policy.

    Raises UsageError for `--precision` and `--policy` together.
    """
    if policy is None:
        return Path(precision) if precision.endswith(".json") else precision
    if precision != "auto":
        raise UsageError(
            f"--precision {precision} and --policy {policy} were both given",
            hint="a policy file says the precision itself: leave out --precision",
        )
    return policy


def plan_called(name: str | Path, device: torch.device) -> tuple[Plan, str]:
    """Return the plan of a precision's name or in a file (a Path, or ``*.json``), and why.

    Raises UnknownName for a name that does not exist, UsageError for a file that holds no plan,
    UnsupportedPrecision if the device cannot compute in it.
    """
    from narrowcast.plan_files import read_plan
    from narrowcast.precision.device import require, resolve_plan

    if isinstance(name, str):
        if not name.endswith(".json"):
            return resolve_plan(name, device)
        name = Path(name)
    plan = read_plan(name)
    require(plan.policy, device)
    return plan, f"as {name} says"


def chosen_plan(
    name: str | Path,
    device: torch.device,
    *,
    rules: str = "native",
    keep_fp32: list[str] | None = None,
) -> Plan:
    """Resolve a precision's name, or a file, and what goes with it; says which one was chosen.

    Raises what `plan_called` raises, and UnknownName for rules that do not exist.
    """
    plan, why = plan_called(name, device)
    if name == "auto":
        console().print(f"precision {plan.name}: {why}", markup=False, highlight=False)
    return adjusted(plan, rules=rules, keep_fp32=keep_fp32)


def adjusted(plan: Plan, *, rules: str, keep_fp32: list[str] | None) -> Plan:
    """Return the plan with more kept in fp32, and other cast lists where some were asked for."""
    policy = plan.policy
    if rules != "native":
        policy = replace(policy, autocast_rules=cast("AutocastRules", rules))
    return plan.with_policy(policy.keeping_fp32(*(keep_fp32 or ())))
