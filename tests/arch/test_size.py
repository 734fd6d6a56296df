"""Files and functions stay small enough to be read whole."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "src").rglob("*.py"))


@cache
def nodes(path: Path) -> list[ast.AST]:
    return list(ast.walk(ast.parse(path.read_text())))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_file_is_over_400_lines(path: Path) -> None:
    """A file has one subject; past 400 lines it has two."""
    assert len(path.read_text().splitlines()) <= 400


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_function_is_over_60_lines(path: Path) -> None:
    """A function that does not fit a screen hides its risk."""
    long = [
        f"{node.name}: {node.end_lineno - node.lineno + 1}"
        for node in nodes(path)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        and node.end_lineno - node.lineno + 1 > 60
    ]

    assert long == []


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_at_most_five_positional_parameters(path: Path) -> None:
    """Past five, parameters have names; typer's commands and Triton's kernels are not called so."""
    if "cli" in path.parts:
        return
    wide = [
        node.name
        for node in nodes(path)
        if isinstance(node, ast.FunctionDef)
        and not any(ast.unparse(d).endswith("jit") for d in node.decorator_list)
        and len(
            [a for a in [*node.args.posonlyargs, *node.args.args] if a.arg not in ("self", "cls")]
        )
        > 5
    ]

    assert wide == []
