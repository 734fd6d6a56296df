"""The table of units in docs/architecture.md, held against the tree."""

from __future__ import annotations

import re
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "src" / "narrowcast"
PAGE = (ROOT / "docs" / "architecture.md").read_text()
UNITS = {path.stem for path in PACKAGE.iterdir() if path.name[0] not in "._" and path.stem != "py"}


def rows() -> dict[str, str]:
    """Unit -> the cell that names its parts."""
    found = {}
    for names, _, parts in re.findall(r"^\| (`.*?`) \| (.*?) \|(.*)\|$", PAGE, re.MULTILINE):
        for name in re.findall(r"`(\w+)`", names):
            found[name] = parts
    return found


def modules(unit: str) -> set[str]:
    files = (PACKAGE / unit).glob("*.py")
    return {path.stem for path in files if path.stem != "__init__"}


PACKAGES = sorted(unit for unit in UNITS if modules(unit))


def test_every_unit_has_a_row() -> None:
    """And no row is of a unit that is gone."""
    assert set(rows()) == UNITS


@pytest.mark.parametrize("unit", PACKAGES)
def test_the_parts_that_are_named_are_there(unit: str) -> None:
    """Each name, or pattern of names, is that of a module of the package."""
    named = re.findall(r"`([\w*]+)`", rows()[unit])

    assert [name for name in named if not any(fnmatch(m, name) for m in modules(unit))] == []


@pytest.mark.parametrize("unit", PACKAGES)
def test_every_module_is_named(unit: str) -> None:
    """Unless the row says that there is one file for each of something."""
    named = re.findall(r"`([\w*]+)`", rows()[unit])
    if "one file a" in rows()[unit]:
        return

    assert sorted(m for m in modules(unit) if not any(fnmatch(m, n) for n in named)) == []
