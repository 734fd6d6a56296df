"""What a `with torch.autocast(...)` of a script asks for: device, formats, and whether it is on."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from narrowcast.preflight.definitions import Alternative, Definitions, Scope
from narrowcast.preflight.guards import Guard, Text, facts, merged
from narrowcast.preflight.imports import Imports, key_of

__all__ = ["AUTOCASTS", "UNKNOWN_CAST", "Autocast", "CastReader", "argument", "keyword"]

AUTOCASTS: Mapping[str, str | None] = {
    "torch.autocast": None,
    "torch.amp.autocast": None,
    "torch.amp.autocast_mode.autocast": None,
    "torch.cuda.amp.autocast": "cuda",
    "torch.cuda.amp.autocast_mode.autocast": "cuda",
    "torch.cpu.amp.autocast": "cpu",
}
"""torch's autocasts, and the device of those that have it in their name."""

_DEFAULTS = {"cuda": "fp16", "cpu": "bf16"}
_DTYPES = {
    "torch.float16": "fp16",
    "torch.half": "fp16",
    "torch.bfloat16": "bf16",
    "torch.float32": "fp32",
    "torch.float": "fp32",
}
_DISABLING = ("contextlib.nullcontext", "contextlib.suppress")


@dataclass(frozen=True, eq=False)
class Autocast:
    """One autocast context, as far as the source tells."""

    line: int
    device: str | None = None
    """``cuda``, ``cpu``; None where a variable says it."""
    formats: frozenset[str] = frozenset()
    """The formats it may cast to; empty if a variable says it that nothing in sight assigns."""
    guard: Guard = field(default_factory=dict)
    """What must hold for it to be on."""
    off: bool = False
    is_known: bool = True
    caches: bool = True
    loops: tuple[int, ...] = ()
    """The loops that it was entered in."""
    is_call_free: bool = False
    has_other_branch: bool = False
    """Whether it stands in an `if` whose `else` does the same without it."""


UNKNOWN_CAST = Autocast(line=0, is_known=False)
"""A context that may be an autocast, from another module."""


@dataclass(frozen=True, eq=False)
class CastReader:
    """Reads autocasts and dtypes off the expressions of one file."""

    imports: Imports
    definitions: Definitions

    def autocast(self, node: ast.expr, scope: Scope, text: Text) -> Autocast | None:
        """Return the autocast that a context expression enters; None if it enters none.

        Something that may be one but that cannot be followed is `UNKNOWN_CAST`.
        """
        options = self.definitions.alternatives(node, scope)
        found = [self._one(option, node, text) for option in options]
        casts = [cast for cast in found if cast is not None]
        if not casts:
            return UNKNOWN_CAST if not options and _sounds_like_one(node) else None
        if any(not cast.is_known for cast in casts):
            return UNKNOWN_CAST
        formats = frozenset[str]().union(*(cast.formats for cast in casts))
        guard = casts[0].guard if len(casts) == 1 else {}
        return replace(casts[0], formats=formats, guard=guard, line=node.lineno)

    def _one(self, option: Alternative, node: ast.expr, text: Text) -> Autocast | None:
        call = option.value
        if not isinstance(call, ast.Call):
            return UNKNOWN_CAST if _sounds_like_one(call) else None
        made = self._maker(call, option.scope)
        if made is None:
            is_other = self.imports.qualified(call.func) != "" or not _sounds_like_one(call)
            return None if is_other else UNKNOWN_CAST
        device, arguments, tests = made
        guard: dict[str, object] = {}
        for test, holds in (*option.tests, *tests):
            guard = merged(guard, facts(test, text, holds=holds))
        return self._read(arguments, device, option.scope, guard=guard, text=text, node=node)

    def _maker(
        self, call: ast.Call, scope: Scope
    ) -> tuple[str | None, ast.Call, tuple[tuple[ast.expr, bool], ...]] | None:
        """Return (device of the name, call with all arguments, tests) if this makes an autocast."""
        name = self.imports.qualified(call.func)
        if name in AUTOCASTS:
            return AUTOCASTS[name], call, ()
        if name or not key_of(call.func):
            return None
        # A variable that holds the class, or `partial(torch.autocast, ...)`.
        for option in self.definitions.alternatives(call.func, scope):
            value = option.value
            name = self.imports.qualified(value)
            if name in AUTOCASTS:
                return AUTOCASTS[name], call, option.tests
            if isinstance(value, ast.Call) and value.args:
                first = self.imports.qualified(value.args[0])
                if self.imports.qualified(value.func) == "functools.partial" and first in AUTOCASTS:
                    keywords = [*call.keywords, *value.keywords]
                    whole = ast.Call(call.func, [*value.args[1:], *call.args], keywords)
                    return AUTOCASTS[first], whole, option.tests
        return None

    def _read(
        self,
        call: ast.Call,
        device: str | None,
        scope: Scope,
        *,
        guard: dict[str, object],
        text: Text,
        node: ast.expr,
    ) -> Autocast:
        has_device = device is not None
        named = argument(call, 0, "device_type") if not has_device else None
        if named is not None:
            device = self._device(named, scope)
        places = {"enabled": 0, "dtype": 1} if has_device else {"dtype": 1, "enabled": 2}
        dtype = argument(call, places["dtype"], "dtype")
        enabled = argument(call, places["enabled"], "enabled")
        cached = keyword(call, "cache_enabled")
        off = isinstance(enabled, ast.Constant) and not enabled.value
        if enabled is not None:
            guard = merged(guard, facts(enabled, text, holds=True))
        if dtype is None:
            formats = frozenset({_DEFAULTS[device]} if device in _DEFAULTS else ())
        else:
            formats = self.formats(dtype, scope)
        return Autocast(
            line=node.lineno,
            device=device,
            formats=formats,
            guard=guard,
            off=off or formats == {"fp32"},
            caches=not (isinstance(cached, ast.Constant) and not cached.value),
        )

    def _device(self, node: ast.expr, scope: Scope) -> str | None:
        names = {_device_name(a.value) for a in self.definitions.alternatives(node, scope)}
        return names.pop() if len(names) == 1 else None

    def formats(self, node: ast.expr, scope: Scope) -> frozenset[str]:
        """Return the formats that a dtype expression may name; empty where that is unknown."""
        found: set[str] = set()
        for option in self.definitions.alternatives(node, scope):
            match option.value:
                case ast.Subscript(value=ast.Dict(values=values)):
                    named = {_DTYPES.get(self.imports.qualified(v), "") for v in values}
                case value:
                    named = {_DTYPES.get(self.imports.qualified(value), "")}
            if "" in named:
                return frozenset()
            found |= named
        return frozenset(found)


def argument(call: ast.Call, place: int, name: str) -> ast.expr | None:
    """Return an argument given by place or by name."""
    if place < len(call.args) and not any(
        isinstance(a, ast.Starred) for a in call.args[: place + 1]
    ):
        return call.args[place]
    return keyword(call, name)


def keyword(call: ast.Call, name: str) -> ast.expr | None:
    """Return an argument given by name."""
    return next((k.value for k in call.keywords if k.arg == name), None)


def _device_name(node: ast.expr) -> str | None:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value.partition(":")[0]
    return None


def _sounds_like_one(node: ast.AST) -> bool:
    words: Iterable[str] = (
        name.lower()
        for part in ast.walk(node)
        for name in (getattr(part, "attr", ""), getattr(part, "id", ""))
    )
    return any(hint in word for word in words for hint in ("autocast", "amp", "ctx", "precision"))
