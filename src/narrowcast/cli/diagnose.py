"""`narrowcast diagnose`: why a training breaks in a precision, and what cures it."""

from __future__ import annotations

import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from narrowcast.cli.common import (
    RUNS,
    AutocastRulesOption,
    DeviceOption,
    JsonOption,
    OutputOption,
    PrecisionOption,
    RecipeArgument,
    SeedOption,
    SetOption,
    console,
    emit_json,
    require_empty,
    result_console,
)
from narrowcast.cli.precision import KeepOption, PolicyOption, asked, chosen_plan

if TYPE_CHECKING:
    from narrowcast.plan import Plan
    from narrowcast.records.diagnosis import DiagnosisRecord

__all__ = ["register"]

BudgetOption = Annotated[
    int | None,
    typer.Option(
        "--steps", help="Steps to take at most; by default what the recipe says, at most 100."
    ),
]
MinimalOption = Annotated[
    bool,
    typer.Option(
        "--minimal-fp32",
        help="Search for the smallest set of modules to keep in fp32, and prove it.",
    ),
]


def register(app: typer.Typer) -> None:
    """Add the verb to the application."""
    app.command("diagnose")(diagnose)


def diagnose(
    recipe: RecipeArgument,
    precision: PrecisionOption = "auto",
    steps: BudgetOption = None,
    overrides: SetOption = None,
    policy: PolicyOption = None,
    keep_fp32: KeepOption = None,
    device: DeviceOption = None,
    autocast_rules: AutocastRulesOption = "native",
    seed: SeedOption = 0,
    minimal_fp32: MinimalOption = False,
    output: OutputOption = None,
    json: JsonOption = None,
) -> None:
    """Say why a training breaks: the operation, the line, the values, and the cures that work.

    The training is taken as asked and in fp32, its failing step is replayed operation by
    operation, and every remedy is tried on it. Exits with 0 whatever the verdict.
    """
    require_empty(output)
    from narrowcast.diagnosis import diagnose as diagnosis
    from narrowcast.precision.device import device_at_hand
    from narrowcast.recipes.load import load_recipe

    target = device_at_hand(device)
    plan = chosen_plan(asked(precision, policy), target, rules=autocast_rules, keep_fp32=keep_fp32)
    with console().status("diagnosing") as status:
        record = diagnosis.diagnose(
            load_recipe(recipe, overrides or ()),
            plan,
            steps=steps,
            seed=seed,
            device=target,
            minimal_fp32=minimal_fp32,
            observe=status.update,
            command=shlex.join(["narrowcast", *sys.argv[1:]]),
        )
    record = _write(record, plan, output)
    emit_json(record, json)
    if json != "-":
        _print(record, result_console(json))


def _write(record: DiagnosisRecord, plan: Plan, output: Path | None) -> DiagnosisRecord:
    """Write the record, and the smallest set as a policy file; the record tells where that is.

    A set that was searched for is written in any case: it took long enough.
    """
    if output is None and record.minimal_fp32 is None:
        return record
    from narrowcast.diagnosis.minimal import kept_in
    from narrowcast.files import write_atomically
    from narrowcast.plan_files import write_policy
    from narrowcast.records.codec import dumps
    from narrowcast.report.html import write_html
    from narrowcast.training.run_directory import default_directory

    output = output or default_directory(RUNS, f"{record.recipe}-{record.precision}-diagnosis")
    smallest = record.minimal_fp32
    if smallest is not None:
        file = output / "policy.json"
        why = f"the smallest set in fp32 with which {record.recipe} works: {record.verdict}"
        write_policy(file, kept_in(plan, smallest.keep_fp32), why=why, command=record.command)
        record = replace(record, minimal_fp32=replace(smallest, policy_file=str(file)))
    write_atomically(output / "diagnosis.json", dumps(record) + "\n")
    write_html(record, output / "report.html")
    console().print(f"diagnosis: {output}", markup=False, highlight=False, soft_wrap=True)
    return record


def _print(record: DiagnosisRecord, out: Console) -> None:
    from narrowcast.report.terminal import render_terminal

    render_terminal(record, out)
