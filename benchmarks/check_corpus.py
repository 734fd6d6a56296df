"""Rules against real training scripts: what was expected by hand, what `check` finds.

    python benchmarks/check_corpus.py [--from DIR] [--list]

corpus/scripts.json names each script by repository, commit, path and SHA-256, with the findings
that a reader of the script expects. The text is not kept here: it is fetched from GitHub at that
commit, into DIR (or a folder that is removed again), and used only if its hash agrees. Files that
DIR has already, as OWNER__NAME/PATH, are not fetched. Writes results/check-corpus.json.

Expectations were written before the tool was first run on a script, but for the group `found`:
those scripts were accused by the tool among 454 files of 62 projects, and read afterwards.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from provenance import write_results

from narrowcast.preflight.check import check

CORPUS = Path(__file__).parent / "corpus" / "scripts.json"
GITHUB = "https://raw.githubusercontent.com"


def place_of(row: dict[str, Any], folder: Path) -> Path:
    return folder / row["repo"].replace("/", "__") / row["path"]


def fetch(row: dict[str, Any], folder: Path) -> str:
    """Put a script into the folder if it is not there; returns why that failed, or ''."""
    path = place_of(row, folder)
    if not path.exists():
        url = f"{GITHUB}/{row['repo']}/{row['commit']}/{row['path']}"
        try:
            with urllib.request.urlopen(url, timeout=30) as answer:  # fixed host, https
                content = answer.read()
        except (urllib.error.URLError, TimeoutError) as error:
            return f"cannot fetch {url}: {error}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return "" if digest == row["sha256"] else f"{path} has SHA-256 {digest[:12]}..., not the listed"


def judged(row: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Compare what is found with what is expected, line by line."""
    began = time.perf_counter()
    record = check(place_of(row, folder))
    seconds = time.perf_counter() - began
    found = {f"{f.rule.split()[0]}@{f.line}": f.severity for f in record.findings}
    expected = set(row["expected"])
    kept = ("repo", "path", "commit", "lines", "licence", "group", "remark", "disagreement")
    return {
        **{key: row[key] for key in kept if key in row},
        "expected": sorted(expected),
        "found": sorted(found),
        "missed": sorted(expected - set(found)),
        "accused_wrongly": sorted(set(found) - expected),
        "worse_than_notices": sorted(k for k, s in found.items() if s != "notice"),
        "seconds": round(seconds, 3),
    }


def show(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        verdict = "as expected" if row["expected"] == row["found"] else "DIFFERS"
        print(f"{row['repo']}/{row['path']}: {verdict}: {', '.join(row['found']) or 'nothing'}")
        for key in ("missed", "accused_wrongly"):
            if row[key]:
                print(f"    {key}: {', '.join(row[key])}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--from", dest="folder", type=Path, help="where the scripts are, or go")
    parser.add_argument("--list", action="store_true", help="name the scripts, and do no more")
    options = parser.parse_args()
    corpus = json.loads(CORPUS.read_text())["scripts"]
    if options.list:
        for row in corpus:
            print(f"{row['repo']}@{row['commit'][:10]} {row['path']} ({row['licence']})")
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        reasons = [reason for row in corpus if (reason := fetch(row, folder))]
        if reasons:
            print("\n".join(reasons), file=sys.stderr)
            return 1
        rows = [judged(row, folder) for row in corpus]
    show(rows)
    totals = {
        "scripts": len(rows),
        "projects": len({row["repo"] for row in rows}),
        "lines": sum(row["lines"] for row in rows),
        "expected": sum(len(row["expected"]) for row in rows),
        "missed": sum(len(row["missed"]) for row in rows),
        "accused_wrongly": sum(len(row["accused_wrongly"]) for row in rows),
        "slowest_s": max(row["seconds"] for row in rows),
    }
    print(totals)
    write_results("check-corpus", rows, totals=totals)
    return int(bool(totals["missed"] or totals["accused_wrongly"]))


if __name__ == "__main__":
    sys.exit(main())
