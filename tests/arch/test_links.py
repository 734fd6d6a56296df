"""Claims carry evidence: every link in README and docs leads to a file of this repository."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    """A record, a picture or a page that is linked exists."""
    targets = re.findall(r"\]\(([^)#\s]+)", page.read_text())
    local = [t for t in targets if "://" not in t]

    assert [t for t in local if not (page.parent / t).exists()] == []
