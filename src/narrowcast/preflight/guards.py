"""Under which conditions a line runs, so that two lines that never run together are not compared.

A guard is a set of facts, each a text and its value: what the branches round a line have tested.
``if scaler is not None:`` gives ``{"scaler is None": False}`` to its body, ``True`` to its else.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["Guard", "compatible", "facts", "merged"]

Guard = Mapping[str, Any]
Text = Callable[[ast.AST], str]

_CONTRADICTION = "!"
"""The key of a guard that nothing satisfies."""


def facts(test: ast.expr, text: Text, *, holds: bool) -> dict[str, Any]:
    """Return what is known where `test` was found to hold, or not to; `text` names expressions."""
    match test:
        case ast.Constant():
            return {} if bool(test.value) == holds else {_CONTRADICTION: True}
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            return facts(operand, text, holds=not holds)
        case ast.BoolOp(op=op, values=values) if isinstance(op, ast.And) == holds:
            known: dict[str, Any] = {}
            for value in values:
                known = merged(known, facts(value, text, holds=holds))
            return known
        case ast.Compare(left=left, ops=[op], comparators=[ast.Constant(value=None)]):
            if isinstance(op, (ast.Is, ast.Eq, ast.IsNot, ast.NotEq)):
                is_none = isinstance(op, (ast.Is, ast.Eq)) == holds
                return {f"{text(left)} is None": is_none}
        case ast.Compare(left=left, ops=[ast.Eq() | ast.NotEq() as op], comparators=[right]):
            return _equality(text(left), right, text, holds=isinstance(op, ast.Eq) == holds)
    return _truth(text(test), holds=holds)


def _equality(left: str, right: ast.expr, text: Text, *, holds: bool) -> dict[str, Any]:
    """Return the facts of a comparison: a name equals one value only, and then no other."""
    known: dict[str, Any] = {f"{left} == {text(right)}": holds}
    if holds and isinstance(right, ast.Constant):
        known[f"{left} =="] = right.value
    return known


def _truth(name: str, *, holds: bool) -> dict[str, Any]:
    """Return the facts of a test of truth: what is true is not None, an untrue scaler is None."""
    if holds:
        return {name: True, f"{name} is None": False}
    return {name: False, f"{name} is None": True} if "scaler" in name.lower() else {name: False}


def merged(outer: Guard, inner: Guard) -> dict[str, Any]:
    """Return both guards as one; where they contradict each other, one that nothing satisfies."""
    both = {**outer, **inner}
    return both if _agree(outer, inner) else {**both, _CONTRADICTION: True}


def compatible(one: Guard, other: Guard) -> bool:
    """Whether both may hold in one and the same run."""
    return _CONTRADICTION not in one and _CONTRADICTION not in other and _agree(one, other)


def _agree(one: Guard, other: Guard) -> bool:
    return all(other[name] == value for name, value in one.items() if name in other)
