"""`check`: every rule on a script or a recipe, before it runs, as one record.

A plain script is only read. A recipe is loaded as well, and takes one small forward pass.
"""

from __future__ import annotations

import ast
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from narrowcast.data import BatchStream
from narrowcast.engine.engine import Engine
from narrowcast.errors import NarrowcastError, RecipeError
from narrowcast.plan import Plan, plan_named
from narrowcast.policy import Policy, policy_named
from narrowcast.precision.cast import numeric_settings
from narrowcast.precision.device import resolve_plan
from narrowcast.preflight.catalogue import SOURCE_RULES
from narrowcast.preflight.script import Script, read_script
from narrowcast.preflight.trace import RAISES, TRACED_RULES, StepTrace, TracedFound
from narrowcast.recipes import BUILTIN
from narrowcast.recipes.load import Recipe, load_recipe
from narrowcast.records.check import CheckFinding, CheckRecord
from narrowcast.replay.places import Place, innermost_line

__all__ = ["DEFAULT_PRECISION", "check"]

DEFAULT_PRECISION = "fp16"
"""What traced rules assume unless told: the format with the narrowest range of those trained in."""

_RECIPE_PARTS = {"model", "data", "loss", "metrics"}
_CPU = torch.device("cpu")
# Two samples show dtypes and constants as well as hundreds, and a batch norm takes them.
_BATCH = 2


def check(
    target: str | Path | Recipe,
    precision: str | Plan | Policy = DEFAULT_PRECISION,
    *,
    overrides: Sequence[str] = (),
    trace: bool = True,
    seed: int = 0,
) -> CheckRecord:
    """Return what is wrong in a recipe or a plain training script, without training.

    `target` is a recipe, its name, or the path of a recipe or of any Python script. A script is
    parsed and never run. Of a recipe one forward pass of two samples is traced on the CPU under
    CUDA's cast lists, in `precision`, unless `trace` is off.

    Raises UsageError for a file that cannot be read or parsed, and RecipeError for a recipe that
    fails in fp32 too.
    """
    plan = _plan(precision)
    recipe = target if isinstance(target, Recipe) else None
    if recipe is None and str(target) in BUILTIN:
        recipe = load_recipe(str(target), overrides)
    path = recipe.path if recipe is not None else Path(str(target)).expanduser()
    script = read_script(path)
    is_recipe = recipe is not None or _is_recipe(script)
    findings = [f for rule in SOURCE_RULES for f in rule.findings(script)]
    notes = list(_notes(script))
    is_traced = trace and is_recipe and plan.policy.compute in ("fp16", "bf16")
    if is_traced:
        recipe = recipe if recipe is not None else load_recipe(script.path, overrides)
        traced, more = _traced(recipe, plan, seed)
        findings += [_finding(f, script) for f in traced]
        notes += more
    elif is_recipe and trace:
        notes.append(f"no step was traced: {plan.name} computes in {plan.policy.compute}")
    return CheckRecord(
        target=recipe.name if recipe is not None else str(script.path),
        is_recipe=is_recipe,
        precision=plan.name if is_traced else "",
        rules=tuple(r.title for r in (*SOURCE_RULES, *(TRACED_RULES if is_traced else ()))),
        findings=tuple(sorted(findings, key=lambda f: (f.file, f.line, f.rule))),
        notes=tuple(notes),
    )


def _plan(precision: str | Plan | Policy) -> Plan:
    if isinstance(precision, Policy):
        plan = Plan(name=precision.name, policy=precision)
    elif isinstance(precision, Plan):
        plan = precision
    elif precision == "auto":
        plan, _ = resolve_plan(precision, _CPU)
    else:
        plan = plan_named(precision)
    return plan.with_policy(replace(plan.policy, autocast_rules="cuda"))


def _is_recipe(script: Script) -> bool:
    """Whether a file has the parts that make a recipe, of its own or imported."""
    names: set[str] = set()
    for node in script.tree.body:
        match node:
            case ast.FunctionDef(name=name):
                names.add(name)
            case ast.Assign(targets=[ast.Name(id=name)]):
                names.add(name)
            case ast.ImportFrom(names=aliases):
                names |= {alias.asname or alias.name for alias in aliases}
    return names >= _RECIPE_PARTS


def _notes(script: Script) -> list[str]:
    """Say what the source cannot tell, and what holds on this machine only."""
    notes = []
    if not script.imports.has_torch:
        notes.append("nothing is imported from torch, so that no rule on the source applies")
    if any(not cast.is_known for event in script.events for cast in event.casts):
        notes.append("an autocast comes from another file, which was not looked into")
    cuda = sorted({c.line for c in script.autocasts if c.device == "cuda"})
    if cuda and not torch.cuda.is_available():
        lines = ", ".join(map(str, cuda))
        notes.append(
            f"this machine has no CUDA: here the autocast of line {lines} does nothing but warn, "
            "and everything would run in fp32"
        )
    return notes


def _traced(recipe: Recipe, plan: Plan, seed: int) -> tuple[list[TracedFound], list[str]]:
    """Trace one forward pass; what raises in the precision only is a finding too."""
    found: list[TracedFound] = []
    try:
        trace = _forward(recipe, plan, seed, found)
    except NarrowcastError as error:
        _forward(recipe, Plan(name="fp32", policy=policy_named("fp32")), seed, [])
        raised = error.__cause__ if error.__cause__ is not None else error
        place = _raised_at(raised, recipe)
        if not any(f.place.line == place.line for f in found):
            what = f"{type(raised).__name__}: {raised}".splitlines()[0]
            message = f"the step raises in {plan.name} and not in fp32: {what}"
            found.append(TracedFound(rule=RAISES, place=place, message=message))
        return found, [f"the traced step ended at line {place.line}, where it raises"]
    return found, list(trace)


def _forward(recipe: Recipe, plan: Plan, seed: int, found: list[TracedFound]) -> tuple[str, ...]:
    """Take one forward pass with loss, and put what the trace found into `found`."""
    with torch.random.fork_rng(devices=[]), numeric_settings(plan.policy):
        torch.manual_seed(seed)
        model = recipe.build_model()
        engine = Engine(model, recipe.build_optimizer(model), _without_levers(plan), device=_CPU)
        data, _ = recipe.load_data()
        size = min(_BATCH, recipe.batch_size, len(data))
        _, batch = next(BatchStream(data, size, seed=seed, collate=recipe.collate))
        model.train()
        trace = StepTrace(model)
        try:
            with trace, engine.forward():
                recipe.compute_loss(model, batch)
        finally:
            found.extend(trace.found.values())
    return engine.notes


def _without_levers(plan: Plan) -> Plan:
    """Return the plan's precision alone: stores and levers change no value of a forward pass."""
    return Plan(name=plan.name, policy=plan.policy)


def _raised_at(error: BaseException, recipe: Recipe) -> Place:
    """Return the innermost line of the user's that an error passed through."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    file, line = innermost_line(trace.tb_frame) if trace is not None else ("", 0)
    return Place("forward", "", file or str(recipe.path), line)


def _finding(found: TracedFound, script: Script) -> CheckFinding:
    place = found.place
    file = Path(place.file) if place.file else script.path
    source = script if file == script.path or not place.file else _other(file)
    return CheckFinding(
        rule=found.rule.title,
        severity=found.rule.severity,
        file=str(file),
        line=place.line,
        code=source.code(place.line) if source is not None else "",
        message=found.message,
        fix=found.rule.fix,
        source="traced",
        module=place.module,
    )


def _other(file: Path) -> Script | None:
    """Read a file that a recipe's model comes from, to show its line."""
    try:
        return read_script(file)
    except (NarrowcastError, RecipeError):
        return None
