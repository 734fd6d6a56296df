"""Which values of a script autocast certainly leaves in 16 bits: products, also of its layers.

What a function returns that is not in sight is unknown, and so is what a model returns that is not
made of torch's own layers.
"""

from __future__ import annotations

import ast

from narrowcast.preflight.definitions import Definition, Function, Scope
from narrowcast.preflight.events import Event
from narrowcast.preflight.imports import key_of
from narrowcast.preflight.script import Script

__all__ = ["is_narrow"]

_MULTIPLYING = frozenset(
    f"torch.nn.{name}"
    for name in (
        *("Linear", "Bilinear", "LazyLinear"),
        *(f"{kind}{n}d" for kind in ("Conv", "ConvTranspose", "LazyConv") for n in (1, 2, 3)),
    )
)
# Their result has the dtype of what they are given, under autocast too.
_KEEPING = frozenset(
    f"torch.nn.{name}"
    for name in (
        *("ReLU", "ReLU6", "LeakyReLU", "ELU", "GELU", "SiLU", "Tanh", "Sigmoid", "Identity"),
        *("Dropout", "Dropout1d", "Dropout2d", "Dropout3d", "Flatten", "Unflatten"),
    )
)
_FUNCTIONS = frozenset(
    f"torch.nn.functional.{name}" for name in ("linear", "bilinear", "conv1d", "conv2d", "conv3d")
)
_METHODS = frozenset({"matmul", "bmm", "einsum", "baddbmm"})
_VIEWS = frozenset(
    {
        *("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "expand"),
        *("transpose", "permute", "contiguous", "clone", "narrow", "select"),
    }
)
# What they return is the model itself, or runs it.
_RETURNING_SELF = frozenset({"cuda", "to", "train", "eval", "requires_grad_", "half"})
_WRAPPING = frozenset({"torch.compile", "torch.nn.parallel.DistributedDataParallel"})


def is_narrow(node: ast.expr, event: Event, script: Script) -> bool:
    """Whether fp16 autocast has certainly made a value that a call is about.

    Either the call stands in the autocast itself, and the value was made there; or in no autocast
    at all, as in a layer's forward, and the autocast is round whoever calls it.
    """
    if not event.casts:
        return _made_by(node, event, script, since=0)
    cast = event.cast
    return (
        cast is not None
        and cast.formats == {"fp16"}
        and _made_by(node, event, script, since=cast.line)
    )


def _made_by(node: ast.expr, event: Event, script: Script, *, since: int) -> bool:
    """Whether a value is a product that was made after a line, given as it is or by its name."""
    if not isinstance(node, ast.Name):
        return _is_product(node, event, script)
    last = _last_definition(node.id, event, script)
    return last is not None and last.line >= since and _is_product(last.value, event, script)


def _last_definition(name: str, event: Event, script: Script) -> Definition | None:
    earlier = [
        d
        for d, _ in script.definitions.visible(name, event.scope)
        if d.line <= event.line and not any(n is event.node for n in ast.walk(d.value))
    ]
    return max(earlier, key=lambda d: d.line, default=None)


def _is_product(node: ast.expr, event: Event, script: Script) -> bool:
    """Whether an expression is a product, scaled, or seen in another shape, at most."""
    match node:
        case ast.BinOp(op=ast.MatMult()):
            return True
        case ast.BinOp(left=left, op=ast.Div() | ast.Mult(), right=right):
            return _is_product(left, event, script) or _is_product(right, event, script)
        case ast.Call(func=ast.Attribute(attr=attr)) if attr in _METHODS:
            return True
        case ast.Call(func=ast.Attribute(value=value, attr=attr)) if attr in _VIEWS:
            return _is_product(value, event, script)
        case ast.Call(func=func):
            if script.imports.qualified(func) in _FUNCTIONS:
                return True
            return _is_known_to_run(func, event) and _multiplies(func, event.scope, script)
        case _:
            return False


def _is_known_to_run(func: ast.expr, event: Event) -> bool:
    """Whether a layer that is called here runs under the autocast: in it, or in a forward."""
    is_own = key_of(func).startswith("self.")
    node = event.scope.node
    in_forward = isinstance(node, Function) and node.name == "forward"
    return bool(event.casts) or (is_own and in_forward)


def _multiplies(func: ast.expr, scope: Scope, script: Script) -> bool:
    """Whether what is called is one of torch's layers that multiply, whatever assigned it."""
    key = key_of(func)
    if not key:
        return False
    made = [_layer(a.value, key, script) for a in script.definitions.alternatives(func, scope)]
    layers = [layer for layer in made if layer is not None]
    return bool(layers) and all(_is_multiplying(layer, script) for layer in layers)


def _layer(node: ast.expr, key: str, script: Script) -> ast.expr | None:
    """Take off what moves or wraps a layer; None where that is the variable itself."""
    while isinstance(node, ast.Call):
        if isinstance(node.func, ast.Attribute) and node.func.attr in _RETURNING_SELF:
            node = node.func.value
        elif script.imports.qualified(node.func) in _WRAPPING and node.args:
            node = node.args[0]
        else:
            break
    return None if key_of(node) == key else node


def _is_multiplying(node: ast.expr, script: Script) -> bool:
    if not isinstance(node, ast.Call):
        return False
    name = script.imports.qualified(node.func)
    if name != "torch.nn.Sequential":
        return name in _MULTIPLYING
    for part in reversed(node.args):
        if isinstance(part, ast.Call) and script.imports.qualified(part.func) in _KEEPING:
            continue
        return _is_multiplying(part, script)
    return False
