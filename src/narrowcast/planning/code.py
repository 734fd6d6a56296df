"""A chosen plan as something to run: a command, and ten lines of Python for one's own loop."""

from __future__ import annotations

import inspect
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from narrowcast import recipes
from narrowcast.plan import OWN, Plan
from narrowcast.policy import Policy
from narrowcast.recipes import BUILTIN
from narrowcast.recipes.load import Recipe, option_values

__all__ = ["code_of", "command_of"]

_WIDTH = 88
_FOR_RANKS = """\
# Ranks that share a training are the command's: it exchanges gradients and decisions, and cuts
# weights. There is no loop of one's own for it; run the command.
"""


def command_of(
    recipe: Recipe,
    overrides: Sequence[str] | None,
    file: str,
    *,
    world: int = 1,
    parallel: str = "",
) -> str:
    """Return the command that trains a recipe, with these options, by the plan in `file`.

    `world` ranks that share the training in the way `parallel` are torchrun's to start.
    """
    builtin = recipe.name in BUILTIN and recipe.path.parent == Path(recipes.__file__).parent
    ranks = ["torchrun", "--nproc-per-node", str(world), "-m"] if parallel else []
    words = [*ranks, "narrowcast", "train", recipe.name if builtin else str(recipe.path)]
    for override in _changed(recipe) if overrides is None else overrides:
        words += ["--set", override]
    words += ["--plan", file]
    return shlex.join([*words, "--parallel", parallel] if parallel else words)


def _changed(recipe: Recipe) -> list[str]:
    """List the options that are not as the recipe has them by itself."""
    usual = type(recipe.options)()
    return [
        f"{name}={'none' if value is None else value}"
        for name, value in option_values(recipe).items()
        if value != getattr(usual, name)
    ]


def code_of(plan: Plan, optimizer: Optimizer, *, parallel: str = "") -> str:
    """Return Python that trains by the plan; `optimizer` is the one that the plan steps with.

    Ranks have a loop in the command only, and a comment says so.
    """
    if parallel:
        return _FOR_RANKS
    names = ["ActivationRule", "Plan"] if plan.activations else ["Plan"]
    lines = [
        "import narrowcast",
        *(["from narrowcast.data import split_batch"] if plan.micro_batches > 1 else []),
        f"from narrowcast.plan import {', '.join(names)}",
        "from narrowcast.policy import Policy",
        "",
        *_call("policy", plan.policy),
        *_call("plan", plan),
        *_optimizer_lines(plan, optimizer),
        "engine = narrowcast.Engine(model, optimizer, plan)",
    ]
    return "\n".join([*lines, *_loop(plan)]) + "\n"


def _optimizer_lines(plan: Plan, optimizer: Optimizer) -> list[str]:
    if plan.weights == OWN:
        return ["# optimizer: yours, as it is"]
    groups = len(optimizer.param_groups)
    said = f"# The recipe has {groups} groups of parameters: give them as there. This is the first."
    arguments = ["model.parameters()", *_settings(optimizer)]
    arguments += [f"weights={plan.weights!r}", f"states={plan.states!r}"]
    call = _fitted(f"optimizer = narrowcast.{type(optimizer).__name__}", arguments)
    return [said, *call] if groups > 1 else call


def _settings(optimizer: Optimizer) -> Iterator[str]:
    """Yield the learning rate, and what else is not as the class has it by itself."""
    group = optimizer.param_groups[0]
    for name, parameter in inspect.signature(type(optimizer)).parameters.items():
        is_setting = name in group and name not in ("params", "weights", "states")
        if is_setting and (name == "lr" or group[name] != parameter.default):
            # A learning rate in a tensor has no contents here, as nothing has.
            value = "..." if isinstance(group[name], Tensor) else _literal(group[name])
            yield f"{name}={value}"


def _loop(plan: Plan) -> list[str]:
    body = [
        "with engine.forward():",
        "    loss = compute_loss(model, batch)",
        "engine.backward(loss)",
        "engine.step()",
    ]
    if plan.micro_batches == 1:
        return ["for batch in batches:", *(f"    {line}" for line in body)]
    return [
        "for whole in batches:",
        f"    for batch in split_batch(whole, {plan.micro_batches}):",
        *(f"        {line}" for line in body),
    ]


def _call(name: str, value: Plan | Policy) -> list[str]:
    """Write a plan or a policy as the call that makes it, without what it is by itself."""
    given = {f.name: getattr(value, f.name) for f in fields(value)}
    shown = [
        f"{f.name}={'policy' if f.name == 'policy' else _literal(given[f.name])}"
        for f in fields(value)
        if given[f.name] != _default(f)
    ]
    return _fitted(f"{name} = {type(value).__name__}", shown)


def _fitted(head: str, arguments: list[str]) -> list[str]:
    """Write a call in one line, or with one line an argument where that would be too long."""
    line = f"{head}({', '.join(arguments)})"
    if len(line) <= _WIDTH:
        return [line]
    return [f"{head}(", *(f"    {argument}," for argument in arguments), ")"]


def _literal(value: Any) -> str:
    if isinstance(value, tuple) and value:
        items = ", ".join(_literal(item) for item in value)
        return f"({items},)"
    return repr(value)


def _default(field: Field[Any]) -> Any:
    return None if field.default is MISSING else field.default
