"""From source to events: the calls of a region in order, with guards, loops and autocasts.

Functions of the same file are written out where they are called, two levels deep, with the caller's
names in the place of their parameters, so that ``backward(loss, scaler)`` is what its body does.
"""

from __future__ import annotations

import ast
import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from narrowcast.preflight.casts import Autocast, CastReader
from narrowcast.preflight.classify import Told, classify
from narrowcast.preflight.definitions import Function, Scope
from narrowcast.preflight.events import Event, Region
from narrowcast.preflight.guards import facts, merged
from narrowcast.preflight.imports import key_of
from narrowcast.preflight.roles import Roles

__all__ = ["regions_of"]

_DEEPEST = 2
_LEAVING = ("sys.exit", "os._exit")


@dataclass(frozen=True, eq=False)
class _Around:
    """What surrounds a statement."""

    scope: Scope
    guard: dict[str, object] = field(default_factory=dict)
    loops: tuple[int, ...] = ()
    varying: frozenset[str] = frozenset()
    casts: tuple[Autocast, ...] = ()
    functions: tuple[ast.AST, ...] = ()
    """The functions that are being walked, the innermost last."""
    owner: ast.ClassDef | None = None
    renamed: dict[str, ast.expr] = field(default_factory=dict)

    def text(self, node: ast.AST) -> str:
        """Return an expression as source, in the caller's names."""
        if not self.renamed or not any(
            isinstance(n, ast.Name) and n.id in self.renamed for n in ast.walk(node)
        ):
            return ast.unparse(node)
        return ast.unparse(_Renaming(self.renamed).visit(copy.deepcopy(node)))

    def knowing(self, test: ast.expr, *, holds: bool) -> _Around:
        return replace(self, guard=merged(self.guard, facts(test, self.text, holds=holds)))


class _Renaming(ast.NodeTransformer):
    def __init__(self, names: dict[str, ast.expr]) -> None:
        self._names = names

    def visit_Name(self, node: ast.Name) -> ast.AST:
        return self._names.get(node.id, node)


def regions_of(tree: ast.Module, reader: CastReader, roles: Roles) -> tuple[Region, ...]:
    """Walk the module's own lines and every function of a file."""
    functions = _Functions.of(tree)
    found = []
    module = Scope(tree)
    for name, node, owner in functions.regions(tree):
        walker = _Walker(reader, roles, functions)
        around = _Around(functions.scopes.get(id(node), module), functions=(node,), owner=owner)
        body = node.body
        if isinstance(node, Function):
            around = walker.decorated(node, around)
        walker.block(body, around)
        found.append(Region(name, node, tuple(walker.events)))
    return tuple(found)


@dataclass(frozen=True, eq=False)
class _Functions:
    """The functions of a file, by where they are called from."""

    scopes: dict[int, Scope]
    owners: dict[int, ast.ClassDef | None]
    by_name: dict[str, list[Function]]

    @classmethod
    def of(cls, tree: ast.Module) -> _Functions:
        found = cls({id(tree): Scope(tree)}, {}, {})
        found._enter(tree, found.scopes[id(tree)], None)
        return found

    def _enter(self, node: ast.AST, scope: Scope, owner: ast.ClassDef | None) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, Function):
                inner = Scope(child, scope, frozenset(_parameters(child)))
                self.scopes[id(child)] = inner
                self.owners[id(child)] = owner
                self.by_name.setdefault(child.name, []).append(child)
                self._enter(child, inner, owner)
            else:
                self._enter(child, scope, child if isinstance(child, ast.ClassDef) else owner)

    def regions(
        self, tree: ast.Module
    ) -> Iterator[tuple[str, ast.Module | Function, ast.ClassDef | None]]:
        yield "module", tree, None
        for name, functions in self.by_name.items():
            for function in functions:
                yield name, function, self.owners[id(function)]

    def called(self, node: ast.Call, around: _Around) -> Function | None:
        """Return the function of this file that a call runs, if that is plain."""
        match node.func:
            case ast.Name(id=name):
                nested = [f for f in self.by_name.get(name, []) if self._is_visible(f, around)]
                return nested[0] if len(nested) == 1 else None
            case ast.Attribute(value=ast.Name(id="self"), attr=name) if around.owner is not None:
                own = [f for f in self.by_name.get(name, []) if self.owners[id(f)] is around.owner]
                return own[0] if len(own) == 1 else None
            case _:
                return None

    def _is_visible(self, function: Function, around: _Around) -> bool:
        outer = self.scopes[id(function)].outer
        if self.owners[id(function)] is not None and outer is not None and outer.outer is None:
            return False  # a method is no function of the module
        scope: Scope | None = around.scope
        while scope is not None:
            if outer is not None and scope.node is outer.node:
                return True
            scope = scope.outer
        return False


def _parameters(function: Function) -> list[str]:
    given = function.args
    named = [*given.posonlyargs, *given.args, *given.kwonlyargs]
    return [a.arg for a in [*named, *filter(None, (given.vararg, given.kwarg))]]


class _Walker:
    """Walks one region, statement by statement, and notes its events."""

    def __init__(self, reader: CastReader, roles: Roles, functions: _Functions) -> None:
        self.events: list[Event] = []
        self._reader = reader
        self._roles = roles
        self._functions = functions
        self._scaled: dict[str, str] = {}
        """Losses that a scaler has multiplied, and which one."""

    def block(self, body: Sequence[ast.stmt], around: _Around) -> None:
        for statement in body:
            around = self._statement(statement, around)

    def decorated(self, function: Function, around: _Around) -> _Around:
        """Add the autocasts that a function is decorated with."""
        for decorator in function.decorator_list:
            cast = self._reader.autocast(decorator, around.scope, around.text)
            if cast is not None and cast.is_known:
                around = replace(around, casts=(*around.casts, replace(cast, loops=around.loops)))
        return around

    def _statement(self, node: ast.stmt, around: _Around) -> _Around:
        """Walk a statement, and return what surrounds the next one."""
        match node:
            case ast.If():
                return self._branches(node, around)
            case ast.For() | ast.AsyncFor():
                self._expression(node.iter, around)
                set_here = {n.id for n in ast.walk(node.target) if isinstance(n, ast.Name)}
                inside = replace(
                    around,
                    loops=(*around.loops, node.lineno),
                    varying=around.varying | set_here,
                )
                self.block(node.body, inside)
                self.block(node.orelse, around)
            case ast.While():
                inside = replace(around, loops=(*around.loops, node.lineno))
                self._expression(node.test, inside)
                self.block(node.body, inside)
                self.block(node.orelse, around)
            case ast.With() | ast.AsyncWith():
                self._with(node, around)
            case ast.Try() | ast.TryStar():
                self.block(node.body, around)
                for handler in node.handlers:
                    failed = merged(around.guard, {f"except, line {handler.lineno}": True})
                    self.block(handler.body, replace(around, guard=failed))
                self.block(node.orelse, around)
                self.block(node.finalbody, around)
            case ast.Match():
                self._expression(node.subject, around)
                for place, case in enumerate(node.cases):
                    chosen = merged(around.guard, {f"match, line {node.lineno}": place})
                    self.block(case.body, replace(around, guard=chosen))
            case ast.Assert(test=test):
                self._expression(test, around)
                return around.knowing(test, holds=True)
            case ast.ClassDef() | ast.FunctionDef() | ast.AsyncFunctionDef():
                for decorator in node.decorator_list:
                    self._expression(decorator, around)
                if isinstance(node, ast.ClassDef):
                    self.block([s for s in node.body if not isinstance(s, Function)], around)
            case ast.Expr(value=value):
                self._expression(value, around, is_statement=True)
            case _:
                self._plain(node, around)
        return around

    def _plain(self, node: ast.stmt, around: _Around) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.expr):
                self._expression(child, around)
        if isinstance(node, (ast.Assign, ast.AnnAssign, ast.AugAssign)) and node.value is not None:
            scaler = self._scaler_in(node.value, around)
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in targets:
                name = around.text(target)
                if scaler:
                    self._scaled[name] = scaler
                elif not isinstance(node, ast.AugAssign):
                    self._scaled.pop(name, None)

    def _branches(self, node: ast.If, around: _Around) -> _Around:
        self._expression(node.test, around)
        yes, no = around.knowing(node.test, holds=True), around.knowing(node.test, holds=False)
        self.block(node.body, yes)
        self.block(node.orelse, no)
        if self._leaves(node.body):
            return no
        return yes if node.orelse and self._leaves(node.orelse) else around

    def _leaves(self, body: Sequence[ast.stmt]) -> bool:
        """Whether nothing runs after these statements."""
        match body[-1] if body else None:
            case ast.Return() | ast.Raise() | ast.Continue() | ast.Break():
                return True
            case ast.Expr(value=ast.Call(func=func)):
                return self._reader.imports.qualified(func) in _LEAVING or key_of(func) == "exit"
            case ast.If(body=yes, orelse=no):
                return bool(no) and self._leaves(yes) and self._leaves(no)
            case _:
                return False

    def _with(self, node: ast.With | ast.AsyncWith, around: _Around) -> None:
        for item in node.items:
            self._expression(item.context_expr, around)
            cast = self._reader.autocast(item.context_expr, around.scope, around.text)
            if cast is not None:
                around = replace(around, casts=(*around.casts, replace(cast, loops=around.loops)))
        self.block(node.body, around)

    def _expression(self, node: ast.expr, around: _Around, *, is_statement: bool = False) -> None:
        """Note the calls of an expression, the innermost first, as they are evaluated."""
        if isinstance(node, ast.Lambda):
            return
        if isinstance(node, ast.IfExp):
            self._expression(node.test, around)
            self._expression(node.body, around.knowing(node.test, holds=True))
            self._expression(node.orelse, around.knowing(node.test, holds=False))
            return
        for child in _parts(node):
            self._expression(child, around)
        if isinstance(node, ast.Call):
            self._call(node, around, is_statement=is_statement)

    def _call(self, node: ast.Call, around: _Around, *, is_statement: bool) -> None:
        function = self._functions.called(node, around)
        told = classify(node, around.text, self._roles, self._scaler_in_text(around))
        if function is not None and told.kind == "escape":
            told = Told(kind="call")
        guard = around.guard
        scaler = self._roles.scalers.get(told.scaler)
        if scaler is not None:
            if scaler.off:
                told = Told(kind="call") if told.kind != "backward" else replace(told, scaler="")
            else:
                guard = merged(guard, scaler.guard)
        self.events.append(
            Event(
                kind=told.kind,
                node=node,
                name=self._reader.imports.qualified(node.func) or around.text(node.func),
                scope=around.scope,
                subject=told.subject,
                scaler=told.scaler,
                is_certain=told.is_certain and not self._is_from_outside(told, around),
                guard=guard,
                loops=around.loops,
                varying=around.varying,
                casts=around.casts,
                depth=len(around.functions) - 1,
                is_statement=is_statement,
                text=around.text,
            )
        )
        if function is not None:
            self._written_out(node, function, around)

    def _written_out(self, node: ast.Call, function: Function, around: _Around) -> None:
        """Walk the body of a function of this file in the place of its call."""
        if len(around.functions) > _DEEPEST or function in around.functions:
            return
        given = _bound(node, function)
        home = self._functions.scopes[id(function)]
        bound = {name: (value, around.scope) for name, value in given.items()}
        inside = replace(
            around,
            scope=replace(home, bound=bound),
            functions=(*around.functions, function),
            owner=self._functions.owners[id(function)],
            renamed={
                name: ast.parse(around.text(value), mode="eval").body
                for name, value in given.items()
            },
        )
        self.block(function.body, self.decorated(function, inside))

    def _is_from_outside(self, told: Told, around: _Around) -> bool:
        """Whether backward is called on a parameter, which a caller may have scaled."""
        if told.scaler:
            return False
        name = told.subject.partition(".")[0].partition("[")[0]
        return told.kind == "backward" and name in around.scope.parameters and not around.renamed

    def _scaler_in(self, node: ast.expr, around: _Around) -> str:
        """Return the scaler that a value has been multiplied by, '' if none."""
        for part in ast.walk(node):
            match part:
                case ast.Call(func=ast.Attribute(value=scaler, attr="scale")):
                    key = around.text(scaler)
                    if self._roles.is_scaler(key):
                        return key
                case ast.Name() | ast.Attribute() | ast.Subscript():
                    known = self._scaled.get(around.text(part))
                    if known:
                        return known
        return ""

    def _scaler_in_text(self, around: _Around) -> Callable[[ast.expr], str]:
        return lambda node: self._scaler_in(node, around)


def _parts(node: ast.AST) -> Iterable[ast.expr]:
    """Yield the expressions directly below a node, through comprehensions and keywords."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.expr):
            yield child
        elif isinstance(child, (ast.comprehension, ast.keyword, ast.FormattedValue)):
            yield from _parts(child)


def _bound(node: ast.Call, function: Function) -> dict[str, ast.expr]:
    """Match the arguments of a call with parameters, defaults included."""
    given = function.args
    names = [a.arg for a in [*given.posonlyargs, *given.args]]
    defaults = dict(zip(names[len(names) - len(given.defaults) :], given.defaults, strict=True))
    for extra, default in zip(given.kwonlyargs, given.kw_defaults, strict=True):
        if default is not None:
            defaults[extra.arg] = default
    if isinstance(node.func, ast.Attribute) and names[:1] == ["self"]:
        names = names[1:]
    found: dict[str, ast.expr] = {n: d for n, d in defaults.items() if n != "self"}
    for name, value in zip(names, node.args, strict=False):
        if isinstance(value, ast.Starred):
            break
        found[name] = value
    known = {*names, *(a.arg for a in given.kwonlyargs)}
    found.update({k.arg: k.value for k in node.keywords if k.arg in known})
    return found
