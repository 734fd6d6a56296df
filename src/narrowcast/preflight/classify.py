"""What one call of a training loop is: a backward pass, an update of the scale, a clipping."""

from __future__ import annotations

import ast
from collections.abc import Callable
from dataclasses import dataclass

from narrowcast.preflight.events import Kind
from narrowcast.preflight.imports import key_of
from narrowcast.preflight.roles import Roles

__all__ = ["Told", "classify", "reads_gradient"]

_CLIPS = {"clip_grad_norm_", "clip_grad_value_", "clip_grad_norm", "clip_grads_with_norm_"}
_CLIPPERS = {"dispatch_clip_grad", "adaptive_clip_grad"}
_SCALER_METHODS: dict[str, Kind] = {
    "unscale_": "unscale",
    "step": "scaled step",
    "update": "update",
    "get_scale": "get_scale",
    "scale": "scale",
}


@dataclass(frozen=True)
class Told:
    """What a call is, about what, and by which scaler."""

    kind: Kind
    subject: str = ""
    scaler: str = ""
    is_certain: bool = True


def classify(
    node: ast.Call,
    text: Callable[[ast.AST], str],
    roles: Roles,
    scaler_in: Callable[[ast.expr], str],
) -> Told:
    """Say what a call is; `scaler_in` tells which scaler a value was multiplied by."""
    if isinstance(node.func, ast.Attribute):
        told = _method(node, node.func, text, roles, scaler_in)
        if told is not None:
            return told
    name = roles.imports.qualified(node.func)
    last = (name or key_of(node.func)).rpartition(".")[2]
    if last in _CLIPPERS or (last in _CLIPS and name.startswith("torch.")):
        return Told("clip", text(node.args[0]) if node.args else "")
    if name.startswith("torch.") and "norm" in last and any(reads_gradient(a) for a in node.args):
        return Told("gradient norm")
    for value in (*node.args, *(k.value for k in node.keywords)):
        if roles.is_scaler(text(value)):
            return Told("escape", scaler=text(value))
    return Told("call")


def _method(
    node: ast.Call,
    func: ast.Attribute,
    text: Callable[[ast.AST], str],
    roles: Roles,
    scaler_in: Callable[[ast.expr], str],
) -> Told | None:
    owner, name = text(func.value), func.attr
    if roles.is_scaler(owner) and name in _SCALER_METHODS:
        subject = text(node.args[0]) if node.args else ""
        return Told(_SCALER_METHODS[name], subject, owner)
    if name == "backward":
        return _backward(node, func, owner, scaler_in)
    if name == "step" and roles.is_scheduler(owner):
        return Told("scheduler", owner)
    if name == "step" and roles.is_optimizer(owner) and _is_plain_step(node):
        return Told("step", owner)
    if name == "zero_grad":
        return Told("zero_grad", owner)
    if name == "eval" and not node.args:
        return Told("eval mode", owner)
    if name == "clip_grad_norm_" and not roles.imports.qualified(func):
        return Told("clip", owner)  # FSDP's models have it as a method
    if name in ("clamp_", "clip_") and _is_gradient(func.value):
        return Told("clip", owner)
    if name == "norm" and reads_gradient(func.value):
        return Told("gradient norm", owner)
    return None


def _backward(
    node: ast.Call, func: ast.Attribute, owner: str, scaler_in: Callable[[ast.expr], str]
) -> Told:
    """Tell a tensor's backward from that of an engine, which may scale as it likes."""
    argument = next((scaler_in(a) for a in node.args if scaler_in(a)), "")
    if argument:
        return Told("backward", owner, argument, is_certain=False)
    scaler = scaler_in(func.value)
    is_tensors = not node.args and "scaled" not in owner.lower()
    return Told("backward", owner, scaler, is_certain=bool(scaler) or is_tensors)


def _is_plain_step(node: ast.Call) -> bool:
    """Whether a step takes a closure at most, as an optimizer's does."""
    return len(node.args) <= 1 and all(k.arg == "closure" for k in node.keywords)


def _is_gradient(node: ast.AST) -> bool:
    """Whether this is `p.grad`, `p.grad.data` or the like."""
    match node:
        case ast.Attribute(attr="grad"):
            return True
        case ast.Attribute(value=value, attr="data"):
            return _is_gradient(value)
        case ast.Call(func=ast.Attribute(value=value, attr="detach" | "float" | "abs" | "flatten")):
            return _is_gradient(value)
        case _:
            return False


def reads_gradient(node: ast.AST) -> bool:
    """Whether an expression has a parameter's ``.grad`` in it."""
    return any(_is_gradient(part) for part in ast.walk(node))
