"""The records of benchmarks/results as a reader finds them, and the pieces of a Markdown page."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["NOT_MEASURED", "Page", "Records", "table", "where"]

NOT_MEASURED = "not yet measured"


@dataclass(frozen=True)
class Records:
    """All JSON records of a folder, by name."""

    folder: Path
    by_name: Mapping[str, dict[str, Any]]

    @classmethod
    def read(cls, folder: Path, *, rehearsals: bool = False) -> Records:
        """Read a folder. What was rehearsed on a CPU is no result, and is left out unless asked."""
        found = {}
        for path in sorted(folder.glob("*.json")):
            data = json.loads(path.read_text())
            if isinstance(data, dict) and (rehearsals or not data.get("rehearsal")):
                found[path.stem] = data
        return cls(folder, found)

    def get(self, name: str) -> dict[str, Any] | None:
        return self.by_name.get(name)

    def rows(self, name: str) -> list[dict[str, Any]]:
        """Return a record's rows; none where it is absent."""
        record = self.by_name.get(name, {})
        return list(record.get("rows", []))


@dataclass
class Page:
    """Markdown in the making, and the charts that it shows."""

    links: str
    """Where records are, seen from the page."""
    pictures: str
    """Where charts are, seen from the page."""
    text: list[str] = field(default_factory=list)
    charts: dict[str, str] = field(default_factory=dict)

    def say(self, *paragraphs: str) -> None:
        self.text += [part for paragraph in paragraphs for part in (paragraph, "")]

    def chart(self, name: str, svg: str, alt: str) -> None:
        self.charts[f"{name}.svg"] = svg
        self.say(f"![{alt}]({self.pictures}/{name}.svg)")

    def link(self, name: str) -> str:
        return f"[{name}]({self.links}/{name}.json)"

    def source(self, name: str, record: Mapping[str, Any], *, n: str = "") -> None:
        """Say where figures come from: record, machine, versions, commit, date, command."""
        about = where(record)
        parts = [about["machine"], f"torch {about['torch']}", f"commit {about['commit']}",
                 about["date"], *([n] if n else [])]  # fmt: skip
        self.say(f"*{self.link(name)}: {'; '.join(parts)}.* `{about['command']}`")


def where(record: Mapping[str, Any]) -> dict[str, str]:
    """Return where a record comes from, whichever of our two shapes it has."""
    at = record.get("environment", record)
    threads = at.get("threads")
    machine = str(at.get("device_name", "-"))
    if at.get("device") == "cpu" and threads:
        machine += f", {threads} thread{'s' if threads > 1 else ''}"
    date = str(record.get("date") or record.get("finished") or "-")[:16].replace("T", " ")
    return {
        "machine": machine,
        "torch": str(at.get("torch", "-")),
        "commit": str(at.get("commit") or "-"),
        "date": date,
        "command": str(record.get("command", "-")),
    }


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Write a Markdown table: the first column and columns of words read left, numbers right."""
    cells = [[_cell(value) for value in row] for row in rows]
    sides = ["---:" if k and _are_numbers(r[k] for r in cells) else "---" for k in range(len(head))]
    lines = ["| " + " | ".join(head) + " |", "|" + "|".join(sides) + "|"]
    lines += ["| " + " | ".join(row) + " |" for row in cells]
    return "\n".join(lines)


def _are_numbers(column: Iterable[str]) -> bool:
    said = [cell for cell in column if cell not in ("", "-")]
    return bool(said) and all(cell[0] in "+-0123456789" for cell in said)


def _cell(value: object) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")
