"""The import table of docs/architecture.md, held against the code."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "src" / "narrowcast"

# Adapters import their host, and verbs import torch, only when they are called.
LAZY_UNITS = {"cli"}
PLAIN = (
    "errors",
    "units",
    "files",
    "stats",
    "formats",
    "policy",
    "user_code",
    "plan_files",
    "search",
    "ranges.what_if",
    "preflight.catalogue",
    "records.codec",
    "precision.cast_lists",
    "memory.break_even",
    "comparison.protocol",
    "comparison.arms",
    "comparison.untested",
    "comparison.verdicts",
    "comparison.study",
)


@cache
def table() -> dict[str, set[str]]:
    """Read the fenced import table: `unit, unit -> unit, unit`, where `*` means any unit."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    block = re.search(r"```imports\n(.*?)```", text, re.DOTALL)
    assert block, "docs/architecture.md has no ```imports block"
    allowed: dict[str, set[str]] = {}
    for line in block[1].splitlines():
        if "->" in line:
            left, right = line.split("->")
            targets = {name.strip() for name in right.split(",")} - {"nothing", ""}
            for name in left.split(","):
                allowed[name.strip()] = targets
    return allowed


def unit_of(path: Path) -> str:
    relative = path.relative_to(PACKAGE)
    return relative.parts[0].removesuffix(".py")


@cache
def own_imports(path: Path) -> list[tuple[str, bool, int]]:
    """List (unit imported, whether inside a function, line) of a file's own-package imports."""
    tree = ast.parse(path.read_text())
    inside = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef))
        for node in ast.walk(function)
    }
    found = []
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            module = node.module
            names = (
                [f"{module}.{a.name}" for a in node.names] if module == "narrowcast" else [module]
            )
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        found += [
            (name.split(".")[1], id(node) in inside, node.lineno)
            for name in names
            if name.startswith("narrowcast.")
        ]
    return found


FILES = sorted(p for p in PACKAGE.rglob("*.py") if p.parent != PACKAGE or p.name[:2] != "__")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_unit_imports_only_what_the_table_allows(path: Path) -> None:
    """Imports point down: nothing outside the table of docs/architecture.md."""
    unit = unit_of(path)
    allowed = table()[unit] | {unit, "errors", "__version__"}

    forbidden = [
        f"line {line}: {unit} imports {target}"
        for target, _, line in own_imports(path)
        if target not in allowed and "*" not in allowed
    ]
    assert forbidden == []


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_no_own_import_hides_inside_a_function(path: Path) -> None:
    """Only the command line, which must start without torch, imports units when called."""
    if unit_of(path) in LAZY_UNITS:
        return

    assert [line for _, inside, line in own_imports(path) if inside] == []


def test_the_table_has_no_cycle() -> None:
    """The allowed imports form an order, so that every unit can be read before its users."""
    allowed = {unit: targets - {"*", "..."} for unit, targets in table().items()}
    done: set[str] = set()
    while len(done) < len(allowed):
        ready = {u for u, targets in allowed.items() if u not in done and targets <= done}
        assert ready, f"cycle among {sorted(set(allowed) - done)}"
        done |= ready


@pytest.mark.parametrize("module", ["narrowcast", "narrowcast.cli.app", "narrowcast.report.html"])
def test_starting_the_command_line_does_not_load_torch(module: str) -> None:
    """`narrowcast --help` and `narrowcast report` answer before torch could be loaded."""
    code = f"import sys, {module}; print([m for m in ('torch', 'scipy') if m in sys.modules])"

    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert out.stdout.strip() == "[]"


def test_plain_units_work_without_torch() -> None:
    """The PLAIN layer says what the product means; it needs no torch to be imported."""
    code = "import sys; " + "; ".join(f"import narrowcast.{name}" for name in PLAIN)

    out = subprocess.run(
        [sys.executable, "-c", code + "; print('torch' in sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
    )

    assert out.stdout.strip() == "False"
