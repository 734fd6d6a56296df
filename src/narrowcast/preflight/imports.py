"""Which library a name of a script comes from: `amp.autocast` is `torch.cuda.amp.autocast`.

Rules speak of torch's functions by their full names, and scripts import them in a dozen ways.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping

__all__ = ["Imports", "imports_of", "key_of"]

_ROOTS = ("torch", "functools", "contextlib")
"""Where a name is imported twice, in a try and its except, the one from here is meant."""


class Imports:
    """The imported names of one file, wherever in it they are imported."""

    def __init__(self, aliases: Mapping[str, str]) -> None:
        self._aliases = dict(aliases)

    @property
    def has_torch(self) -> bool:
        """Whether anything comes from torch."""
        return any(full.partition(".")[0] == "torch" for full in self._aliases.values())

    def qualified(self, node: ast.AST) -> str:
        """Return the full dotted name of an expression; '' if it starts at nothing imported."""
        match node:
            case ast.Name(id=name):
                return self._aliases.get(name, "")
            case ast.Attribute(value=value, attr=attr):
                base = self.qualified(value)
                return f"{base}.{attr}" if base else ""
            case _:
                return ""


def imports_of(tree: ast.AST) -> Imports:
    """Read all import statements of a file."""
    found: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                local = alias.asname or alias.name.partition(".")[0]
                _note(found, local, alias.name if alias.asname else local)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                _note(found, alias.asname or alias.name, f"{node.module}.{alias.name}")
    return Imports(found)


def _note(found: dict[str, str], local: str, full: str) -> None:
    if local not in found or full.partition(".")[0] in _ROOTS:
        found[local] = full


def key_of(node: ast.AST) -> str:
    """Return the text by which a variable is known, such as `self.scaler` or `optims[0]`, or ''."""
    match node:
        case ast.Name(id=name):
            return name
        case ast.Attribute(value=value, attr=attr):
            base = key_of(value)
            return f"{base}.{attr}" if base else ""
        case ast.Subscript(value=value, slice=ast.Constant(value=index)):
            base = key_of(value)
            return f"{base}[{index!r}]" if base else ""
        case _:
            return ""
