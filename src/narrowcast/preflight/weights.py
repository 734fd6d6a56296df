"""Which models of a script an optimizer trains with 16-bit weights, as far as the source tells."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass

from narrowcast.preflight.casts import argument, keyword
from narrowcast.preflight.definitions import Scope
from narrowcast.preflight.events import Event, Region
from narrowcast.preflight.script import Script

__all__ = ["NarrowWeights", "narrow_weights", "trained_model"]

_HALVES = {"half": "fp16", "bfloat16": "bf16", "float": "fp32", "double": "fp32"}


@dataclass(frozen=True, kw_only=True, eq=False)
class NarrowWeights:
    """A model in 16 bits whose weights an optimizer updates in place, without masters."""

    model: str
    format: str
    line: int
    """Where the model was made narrow."""
    optimizer: str
    optimizer_class: str
    """The full name, such as ``torch.optim.AdamW``."""
    made: ast.Call
    """What makes the optimizer."""
    scope: Scope
    region: Region


def narrow_weights(script: Script) -> Iterator[NarrowWeights]:
    """Find the optimizers of torch that hold the parameters of a model made fp16 or bf16."""
    if script.mentions("lora", "peft", "master"):
        return  # adapters and masters are kept in fp32, out of sight
    for region in script.regions:
        for made in region.of("call"):
            if made.depth or not made.name.startswith("torch.optim.") or ".lr_" in made.name:
                continue
            model = trained_model(made, script)
            if model:
                yield from _narrowed(script, region, made, model)


def trained_model(made: Event, script: Script) -> str:
    """Return the model whose parameters an optimizer is made with, '' if that is not plain."""
    first = argument(made.node, 0, "params")
    options = script.definitions.alternatives(first, made.scope) if first is not None else []
    models: set[str] = set()
    for option in options:
        found = re.findall(r"([\w.]+)\.(?:named_)?parameters\(\)", ast.unparse(option.value))
        models.update(found)
    return models.pop() if len(models) == 1 else ""


def _narrowed(script: Script, region: Region, made: Event, model: str) -> Iterator[NarrowWeights]:
    last: tuple[str, int] | None = None
    for event in region.events:
        if event.depth == 0 and event.fits(made):
            format_ = _made_narrow(event, model, script)
            if format_:
                last = (format_, event.line)
    if last is not None and last[0] != "fp32":
        targets = [d.key for d in script.definitions if d.value is made.node]
        yield NarrowWeights(
            model=model,
            format=last[0],
            line=last[1],
            optimizer=targets[0] if targets else "",
            optimizer_class=made.name,
            made=made.node,
            scope=made.scope,
            region=region,
        )


def _made_narrow(event: Event, model: str, script: Script) -> str:
    """Return the format that a call gives to a model's weights, '' if it gives none."""
    func = event.node.func
    assigned = any(d.key == model and d.value is event.node for d in script.definitions.of(model))
    own = isinstance(func, ast.Attribute) and event.text(func.value) == model
    if not assigned and not (own and event.is_statement):
        return ""
    if isinstance(func, ast.Attribute):
        if func.attr in _HALVES and not event.node.args:
            return _HALVES[func.attr]
        if func.attr == "to":
            return _moved(event, script)
        if func.attr == "from_pretrained":
            dtype = keyword(event.node, "torch_dtype") or keyword(event.node, "dtype")
            return _only(script, dtype, event)
        if func.attr in ("cuda", "train", "eval", "cpu") and isinstance(func.value, ast.Call):
            return _of_chain(func.value, event, script)
    return ""


def _moved(event: Event, script: Script) -> str:
    """``to`` takes a dtype in any place; a chain before it may have made the weights narrow."""
    for value in (*event.node.args, *(k.value for k in event.node.keywords if k.arg == "dtype")):
        format_ = _only(script, value, event)
        if format_:
            return format_
    func = event.node.func
    if isinstance(func, ast.Attribute) and isinstance(func.value, ast.Call):
        return _of_chain(func.value, event, script)
    return ""


def _of_chain(call: ast.Call, event: Event, script: Script) -> str:
    """Follow ``Net().half().cuda()`` to what makes the weights narrow."""
    match call.func:
        case ast.Attribute(attr=name) if name in _HALVES and not call.args:
            return _HALVES[name]
        case ast.Attribute(value=ast.Call() as inner, attr="to" | "cuda" | "train"):
            for value in call.args:
                format_ = _only(script, value, event)
                if format_:
                    return format_
            return _of_chain(inner, event, script)
        case _:
            return ""


def _only(script: Script, dtype: ast.expr | None, event: Event) -> str:
    """Return the one format that a dtype certainly is, '' otherwise."""
    formats = script.reader.formats(dtype, event.scope) if dtype is not None else frozenset()
    return next(iter(formats)) if len(formats) == 1 else ""
