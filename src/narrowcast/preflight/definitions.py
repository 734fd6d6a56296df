"""What a variable of a script may hold: the expressions that are assigned to it, where it is seen.

No expression is evaluated. A name that has no assignment in sight, such as a parameter, is unknown,
and rules keep silent about what they do not know.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from narrowcast.preflight.imports import key_of

__all__ = ["Alternative", "Definition", "Definitions", "Function", "Scope", "definitions_of"]

Function = ast.FunctionDef | ast.AsyncFunctionDef
_DEEPEST = 6
"""Names that stand for names are followed this far."""


@dataclass(frozen=True, eq=False)
class Scope:
    """A module or a function, with the one round it; `self.x` counts as the module's."""

    node: ast.AST
    outer: Scope | None = None
    parameters: frozenset[str] = frozenset()
    bound: dict[str, tuple[ast.expr, Scope]] = field(default_factory=dict)
    """Parameters whose arguments are known, in the walk of a call, with the caller's scope."""


@dataclass(frozen=True, eq=False)
class Definition:
    """One assignment."""

    key: str
    value: ast.expr
    node: ast.AST
    """The function or module that it stands in."""
    line: int


@dataclass(frozen=True, eq=False)
class Alternative:
    """One expression that a variable may hold, the condition under which it does, and its scope."""

    value: ast.expr
    scope: Scope
    tests: tuple[tuple[ast.expr, bool], ...] = ()


class Definitions:
    """All assignments of a file by variable."""

    def __init__(self, found: dict[str, list[Definition]]) -> None:
        self._found = found

    def of(self, key: str) -> list[Definition]:
        """Return all assignments to a variable of this name, in whatever scope."""
        return self._found.get(key, [])

    def __iter__(self) -> Iterator[Definition]:
        for definitions in self._found.values():
            yield from definitions

    def visible(self, key: str, scope: Scope) -> list[tuple[Definition, Scope]]:
        """Return the assignments that a use of this name in a scope may mean."""
        around: Scope | None = scope
        while around is not None:
            own = [(d, around) for d in self.of(key) if d.node is around.node]
            if own:
                return own
            if key in around.parameters:
                return []
            around = around.outer
        return [(d, scope) for d in self.of(key)] if "." in key else []

    def alternatives(self, node: ast.expr, scope: Scope) -> list[Alternative]:
        """Return all that an expression may be, following names; [] where not all is known."""
        found = list(self._options(node, scope, frozenset()))
        return [] if None in found else [option for option in found if option is not None]

    def _options(
        self, node: ast.expr, scope: Scope, seen: frozenset[tuple[str, int]]
    ) -> Iterator[Alternative | None]:
        """Yield what an expression may be, and None for what is out of sight."""
        match node:
            case ast.IfExp(test=test, body=body, orelse=orelse):
                for branch, holds in ((body, True), (orelse, False)):
                    for option in self._options(branch, scope, seen):
                        yield option and replace(option, tests=((test, holds), *option.tests))
            case ast.Name() | ast.Attribute():
                key = key_of(node)
                mark = (key, id(scope.node))
                if mark in seen or len(seen) > _DEEPEST:
                    yield None  # a name that stands for itself says nothing
                elif key in scope.bound:
                    value, outer = scope.bound[key]
                    yield from self._options(value, outer, seen | {mark})
                else:
                    yield from self._assigned(node, key, scope, seen | {mark})
            case _:
                yield Alternative(node, scope)

    def _assigned(
        self, node: ast.expr, key: str, scope: Scope, seen: frozenset[tuple[str, int]]
    ) -> Iterator[Alternative | None]:
        found = self.visible(key, scope)
        for definition, where in found:
            yield from self._options(definition.value, where, seen)
        if not found:
            yield None if self._is_parameter(node, scope) else Alternative(node, scope)

    @staticmethod
    def _is_parameter(node: ast.expr, scope: Scope) -> bool:
        name = key_of(node).partition(".")[0]
        around: Scope | None = scope
        while around is not None:
            if name in around.parameters:
                return True
            around = around.outer
        return False


def definitions_of(tree: ast.Module) -> Definitions:
    """Collect the assignments of a file."""
    found: dict[str, list[Definition]] = {}
    for node, owner in _owned(tree, tree):
        for target, value in _assignments(node):
            key = key_of(target)
            if key:
                line = getattr(node, "lineno", 0)
                found.setdefault(key, []).append(Definition(key, value, owner, line))
    return Definitions(found)


def _owned(node: ast.AST, owner: ast.AST) -> Iterator[tuple[ast.AST, ast.AST]]:
    """Yield all nodes with the function, or the module, that they stand in."""
    for child in ast.iter_child_nodes(node):
        yield child, owner
        yield from _owned(child, child if isinstance(child, Function) else owner)


def _assignments(node: ast.AST) -> Iterator[tuple[ast.AST, ast.expr]]:
    """Yield (target, value) of what a statement assigns; tuples are taken apart."""
    match node:
        case ast.Assign(targets=targets, value=value):
            for target in targets:
                yield from _paired(target, value)
        case ast.AnnAssign(target=target, value=ast.expr() as value):
            yield target, value
        case ast.NamedExpr(target=target, value=value):
            yield target, value
        case ast.withitem(context_expr=value, optional_vars=ast.expr() as target):
            yield target, value


def _paired(target: ast.expr, value: ast.expr) -> Iterator[tuple[ast.AST, ast.expr]]:
    if not isinstance(target, (ast.Tuple, ast.List)):
        yield target, value
    elif isinstance(value, (ast.Tuple, ast.List)) and len(value.elts) == len(target.elts):
        for one, its in zip(target.elts, value.elts, strict=True):
            yield from _paired(one, its)
    else:
        for index, one in enumerate(target.elts):
            # `a, b = make()`: what each holds is the call's, at its place.
            yield one, ast.Subscript(value=value, slice=ast.Constant(index), ctx=ast.Load())
