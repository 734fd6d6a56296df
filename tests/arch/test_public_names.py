"""What the package offers is what it lists."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import narrowcast

PACKAGE = Path(narrowcast.__file__).parent


def test_every_public_name_loads() -> None:
    """Each name in __all__ exists, and the lazy table and the typed imports agree."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    typed = {
        alias.name: node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("narrowcast.")
        for alias in node.names
    }

    assert {name: narrowcast._HOMES[name] for name in typed} == typed
    assert sorted(typed) == sorted(narrowcast._HOMES)
    assert all(getattr(narrowcast, name) is not None for name in narrowcast.__all__)


def test_every_module_lists_its_public_names() -> None:
    """Each module says what others may use, and every name that it lists exists."""
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.name.startswith("__") or path.parent.name == "recipes":
            continue
        name = ".".join(("narrowcast", *path.relative_to(PACKAGE).with_suffix("").parts))
        module = importlib.import_module(name)
        listed = getattr(module, "__all__", None)

        if "cli" in path.parts and listed is None:
            continue
        assert listed is not None, f"{name} has no __all__"
        assert [n for n in listed if not hasattr(module, n)] == [], name
