"""From what a user typed about precision to a plan, and the reason where one was chosen."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from narrowcast.cli.common import console

if TYPE_CHECKING:
    import torch

    from narrowcast.plan import Plan
    from narrowcast.policy import AutocastRules

__all__ = ["KeepOption", "chosen_plan", "plan_called"]

KeepOption = Annotated[
    list[str] | None,
    typer.Option(
        "--keep-fp32",
        metavar="GLOB",
        help="Keep modules of this name in fp32, such as 'head' or 'blocks.*.norm'; repeatable.",
    ),
]


def plan_called(name: str, device: torch.device) -> tuple[Plan, str]:
    """Return the plan of a precision's name or in a plan file (``*.json``), and why.

    Raises UnknownName for a name that does not exist, UsageError for a file that holds no plan,
    UnsupportedPrecision if the device cannot compute in it.
    """
    from narrowcast.planning.plan_file import read_plan
    from narrowcast.precision.device import require, resolve_plan

    if not name.endswith(".json"):
        return resolve_plan(name, device)
    plan = read_plan(Path(name))
    require(plan.policy, device)
    return plan, f"as {name} says"


def chosen_plan(
    name: str, device: torch.device, *, rules: str = "native", keep_fp32: list[str] | None = None
) -> Plan:
    """Resolve a precision's name and what goes with it; says which one was chosen, and why.

    Raises UnknownName for a name or rules that do not exist, UnsupportedPrecision if the device
    cannot compute in it.
    """
    plan, why = plan_called(name, device)
    if name == "auto":
        console().print(f"precision {plan.name}: {why}", markup=False, highlight=False)
    policy = replace(plan.policy, autocast_rules=cast("AutocastRules", rules))
    return replace(plan, policy=policy.keeping_fp32(*(keep_fp32 or ())))
