"""From what a user typed about precision to a plan, and the reason where one was chosen."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, cast

import typer

from narrowcast.cli.common import console

if TYPE_CHECKING:
    import torch

    from narrowcast.plan import Plan
    from narrowcast.policy import AutocastRules

__all__ = ["KeepOption", "chosen_plan"]

KeepOption = Annotated[
    list[str] | None,
    typer.Option(
        "--keep-fp32",
        metavar="GLOB",
        help="Keep modules of this name in fp32, such as 'head' or 'blocks.*.norm'; repeatable.",
    ),
]


def chosen_plan(
    name: str, device: torch.device, *, rules: str = "native", keep_fp32: list[str] | None = None
) -> Plan:
    """Resolve a precision's name and what goes with it; says which one was chosen, and why.

    Raises UnknownName for a name or rules that do not exist, UnsupportedPrecision if the device
    cannot compute in it.
    """
    from narrowcast.precision.device import resolve_plan

    plan, why = resolve_plan(name, device)
    if name == "auto":
        console().print(f"precision {plan.name}: {why}", markup=False, highlight=False)
    policy = replace(plan.policy, autocast_rules=cast("AutocastRules", rules))
    return replace(plan, policy=policy.keeping_fp32(*(keep_fp32 or ())))
