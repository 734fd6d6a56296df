"""Which variables of a script are scalers, optimizers and schedulers, by what made them or by name.

A scaler is known by its class, or by what is asked of it: only a scaler has ``unscale_``, and
``x.scale(loss).backward()`` is what scalers are for.
"""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass

from narrowcast.preflight.casts import keyword
from narrowcast.preflight.definitions import Definitions
from narrowcast.preflight.events import Scaler
from narrowcast.preflight.guards import facts, merged
from narrowcast.preflight.imports import Imports, key_of

__all__ = ["Roles"]

_SCALER_CLASSES = re.compile(
    r"torch\.((cuda|cpu|npu|xpu)\.)?amp\.(grad_scaler\.)?GradScaler\Z"
    r"|torch\.distributed\.fsdp\.[\w.]*ShardedGradScaler\Z"
    r"|narrowcast\.(dropin\.grad_scaler\.)?GradScaler\Z"
)
_OPTIMIZER_NAME = re.compile(r"(?:.*_)?(?:opt|optim|optimi[sz]er)(?:_?[a-z0-9]+)*\Z", re.IGNORECASE)
_OPTIMIZER_CLASS = re.compile(
    r"(Adam\w*|SGD|LARS|LAMB|RMSprop|Adagrad|Adadelta|Rprop|Lion|Adafactor|Muon|LBFGS|\w+Optimizer)\Z"
)
_SCHEDULER = re.compile(r"sched", re.IGNORECASE)
_NOT_OPTIMIZER = re.compile(
    r"sched|param|state|options?\Z|optimizers\Z|config|_args", re.IGNORECASE
)


@dataclass(frozen=True, eq=False)
class Roles:
    """The variables of one file that training is about."""

    imports: Imports
    definitions: Definitions
    scalers: dict[str, Scaler]

    @classmethod
    def of(cls, tree: ast.Module, imports: Imports, definitions: Definitions) -> Roles:
        """Find the scalers of a file; the others are asked for by name."""
        used = {key: Scaler(key=key, guard={}) for key in _used_as_scalers(tree)}
        return cls(imports, definitions, {**used, **_made_scalers(tree, imports, definitions)})

    def is_scaler(self, key: str) -> bool:
        """Whether a variable is a scaler."""
        return key in self.scalers

    def is_scheduler(self, key: str) -> bool:
        """Whether a variable is a learning-rate scheduler."""
        return bool(_SCHEDULER.search(key)) or self.made_by(key, "torch.optim.lr_scheduler.") != ""

    def is_optimizer(self, key: str) -> bool:
        """Whether a variable is an optimizer."""
        last = re.sub(r"\[.*\]\Z", "", key).rpartition(".")[2]
        if self.is_scheduler(key) or _NOT_OPTIMIZER.search(last):
            return False
        return bool(_OPTIMIZER_NAME.match(last)) or any(
            isinstance(d.value, ast.Call) and _OPTIMIZER_CLASS.search(_last_name(d.value.func))
            for d in self.definitions.of(key)
        )

    def made_by(self, key: str, prefix: str) -> str:
        """Return the full name of the library's class that made a variable, '' if none."""
        for definition in self.definitions.of(key):
            if isinstance(definition.value, ast.Call):
                name = self.imports.qualified(definition.value.func)
                if name.startswith(prefix):
                    return name
        return ""


def _last_name(node: ast.AST) -> str:
    match node:
        case ast.Attribute(attr=name) | ast.Name(id=name):
            return name
        case _:
            return ""


def _used_as_scalers(tree: ast.Module) -> set[str]:
    keys: set[str] = set()
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=ast.Attribute(value=scaler, attr="unscale_")):
                keys.add(key_of(scaler))
            case ast.Attribute(
                value=ast.Call(func=ast.Attribute(value=scaler, attr="scale")), attr="backward"
            ):
                keys.add(key_of(scaler))
    return keys - {"", "self"}


def _made_scalers(
    tree: ast.Module, imports: Imports, definitions: Definitions
) -> dict[str, Scaler]:
    settings_off = _settings_off(tree, definitions)
    found: dict[str, Scaler] = {}
    for definition in definitions:
        for call, test in _calls(definition.value):
            if not _SCALER_CLASSES.match(imports.qualified(call.func)):
                continue
            enabled = keyword(call, "enabled")
            guard = facts(test, ast.unparse, holds=True) if test is not None else {}
            if enabled is not None:
                guard = merged(guard, facts(enabled, ast.unparse, holds=True))
            off = any(
                (isinstance(condition, ast.Constant) and not condition.value)
                or (condition is not None and key_of(condition) in settings_off)
                for condition in (enabled, test)
            )
            found[definition.key] = Scaler(
                key=definition.key, line=call.lineno, guard=guard, off=off
            )
    return found


def _settings_off(tree: ast.Module, definitions: Definitions) -> set[str]:
    """Return the variables that are False as written, wherever the file assigns them."""
    parameters = {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
    values: dict[str, list[ast.expr]] = {}
    for definition in definitions:
        values.setdefault(definition.key, []).append(definition.value)
    return {
        key
        for key, given in values.items()
        if key not in parameters and all(isinstance(v, ast.Constant) and not v.value for v in given)
    }


def _calls(value: ast.expr) -> list[tuple[ast.Call, ast.expr | None]]:
    """Return the calls that a value may be, with the test of a conditional expression."""
    match value:
        case ast.Call():
            return [(value, None)]
        case ast.IfExp(test=test, body=ast.Call() as body, orelse=orelse):
            other = [(orelse, None)] if isinstance(orelse, ast.Call) else []
            return [(body, test), *other]
        case ast.IfExp(test=test, orelse=ast.Call() as orelse):
            return [(orelse, ast.UnaryOp(ast.Not(), test))]
        case ast.BoolOp(values=values):
            return [(v, None) for v in values if isinstance(v, ast.Call)]
        case _:
            return []
