"""What a rule is: a name, a reason, a cure, and a pure function from a script to its places."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from narrowcast.preflight.script import Script
from narrowcast.records.check import CheckFinding, Severity

__all__ = ["Found", "Rule", "at"]


@dataclass(frozen=True, kw_only=True)
class Found:
    """One place at which a rule fires, and what happens there."""

    line: int
    column: int = 0
    message: str


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One thing that goes wrong in mixed precision, and how it shows in the source."""

    code: str
    name: str
    severity: Severity
    fix: str
    source: str
    """Where it was met: threads, documentation."""
    find: Callable[[Script], Iterator[Found]]
    once: bool = False
    """Whether one finding a file says it all; it then names the other lines."""

    @property
    def title(self) -> str:
        return f"{self.code} {self.name}"

    def findings(self, script: Script) -> list[CheckFinding]:
        """Return what the rule finds in a script, in the order of its lines.

        A file that imports nothing of torch is about something else, whatever its names are.
        """
        if not script.imports.has_torch:
            return []
        places = {(f.line, f.column): f for f in reversed(list(self.find(script)))}
        found = [places[key] for key in sorted(places)]
        if self.once and found:
            others = sorted({f.line for f in found} - {found[0].line})
            also = f" (also in line{'s'[: len(others) > 1]} {_listed(others)})" if others else ""
            first = found[0]
            found = [Found(line=first.line, column=first.column, message=first.message + also)]
        return [self.finding(script, f) for f in found]

    def finding(self, script: Script, found: Found) -> CheckFinding:
        """Return a place as a record."""
        return CheckFinding(
            rule=self.title,
            severity=self.severity,
            file=str(script.path),
            line=found.line,
            column=found.column,
            code=script.code(found.line),
            message=found.message,
            fix=self.fix,
        )


def at(node: ast.expr | ast.stmt, message: str) -> Found:
    """Return the place of a node with what happens there."""
    return Found(line=node.lineno, column=node.col_offset, message=message)


def _listed(lines: list[int]) -> str:
    shown = ", ".join(map(str, lines[:6]))
    return f"{shown} and {len(lines) - 6} more" if len(lines) > 6 else shown
