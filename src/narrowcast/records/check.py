"""What `check` found in a recipe or a script before it was run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["CheckFinding", "CheckRecord", "Severity"]

Severity = Literal["error", "warning", "notice"]
"""``error``: wrong results or an exception; ``warning``: depends on values; ``notice``: style."""


@dataclass(frozen=True, kw_only=True)
class CheckFinding:
    """One rule that fired at one place."""

    rule: str
    """Code and name, such as ``NC101 clip-before-unscale``."""
    severity: Severity
    file: str
    line: int
    """From 1."""
    column: int = 0
    code: str = ""
    message: str
    """What happens, and why, with values."""
    fix: str
    source: Literal["static", "traced"] = "static"
    module: str = ""


@dataclass(frozen=True, kw_only=True)
class CheckRecord:
    """All findings on one recipe or script."""

    kind: Literal["check"] = "check"
    schema: int = 1
    target: str
    is_recipe: bool
    precision: str = ""
    """What the traced rules assumed; '' where only the source was read."""
    rules: tuple[str, ...]
    """Every rule that was tried."""
    findings: tuple[CheckFinding, ...]
    notes: tuple[str, ...] = ()
    """What could not be looked at, and why."""
