"""A script as the rules see it: parsed once, its calls in order, its scalers and its autocasts.

Nothing is imported or run. What the source does not tell is unknown, and no rule accuses on it.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from narrowcast.errors import UsageError
from narrowcast.preflight.casts import Autocast, CastReader
from narrowcast.preflight.definitions import Definitions, Function, definitions_of
from narrowcast.preflight.events import Event, Region, Scaler
from narrowcast.preflight.imports import Imports, imports_of
from narrowcast.preflight.roles import Roles
from narrowcast.preflight.walk import regions_of

__all__ = ["Script", "read_script"]


@dataclass(frozen=True, eq=False)
class Script:
    """The facts of one file."""

    path: Path
    source: str
    tree: ast.Module

    @cached_property
    def imports(self) -> Imports:
        return imports_of(self.tree)

    @cached_property
    def definitions(self) -> Definitions:
        return definitions_of(self.tree)

    @cached_property
    def reader(self) -> CastReader:
        return CastReader(self.imports, self.definitions)

    @cached_property
    def roles(self) -> Roles:
        return Roles.of(self.tree, self.imports, self.definitions)

    @cached_property
    def regions(self) -> tuple[Region, ...]:
        return regions_of(self.tree, self.reader, self.roles)

    @cached_property
    def events(self) -> tuple[Event, ...]:
        """All calls of the file, each once, in the order of its lines."""
        own = (e for region in self.regions for e in region.events if e.depth == 0)
        return tuple(sorted(own, key=lambda e: (e.line, e.node.col_offset)))

    @cached_property
    def scalers(self) -> dict[str, Scaler]:
        return self.roles.scalers

    @cached_property
    def autocasts(self) -> tuple[Autocast, ...]:
        """The autocasts that calls stand in, and that are on."""
        seen = {id(cast): cast for event in self.events for cast in event.casts}
        return tuple(cast for cast in seen.values() if cast.is_known and not cast.off)

    @cached_property
    def identifiers(self) -> frozenset[str]:
        """Every name, attribute and argument that the file uses, in lower case."""
        return frozenset(
            value.lower()
            for node in ast.walk(self.tree)
            if not isinstance(node, ast.alias)  # what is imported and not used says nothing
            for field in ("id", "attr", "arg", "name")
            for value in (getattr(node, field, None),)
            if isinstance(value, str)
        )

    def mentions(self, *words: str) -> bool:
        """Whether a name of the file has one of these words in it."""
        return any(word in name for name in self.identifiers for word in words)

    @cached_property
    def functions(self) -> tuple[Function, ...]:
        return tuple(node for node in ast.walk(self.tree) if isinstance(node, Function))

    def code(self, line: int) -> str:
        """Return a line of the source without its indentation."""
        lines = self.source.splitlines()
        return lines[line - 1].strip() if 0 < line <= len(lines) else ""


def read_script(path: Path) -> Script:
    """Read and parse a script.

    Raises UsageError for a file that is not there, is no text, or is not Python.
    """
    hint = "name a Python file, or a recipe (`narrowcast recipes` lists the built-in ones)"
    try:
        source = path.read_text(encoding="utf-8")
        return Script(path, source, ast.parse(source))
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}", hint=hint) from None
    except UnicodeDecodeError:
        raise UsageError(f"{path} is not text in UTF-8", hint=hint) from None
    except (SyntaxError, ValueError, RecursionError) as error:
        line = getattr(error, "lineno", None)
        where = f", line {line}" if line else ""
        reason = getattr(error, "msg", None) or str(error) or type(error).__name__
        raise UsageError(f"{path}{where} is not Python that can be parsed: {reason}") from None
