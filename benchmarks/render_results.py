"""docs/results.md from the records of benchmarks/results: tables, charts, and where each is from.

    make results

Nothing is measured here and nothing is remembered: what has no record is "not yet measured", and a
record that was rehearsed is none. A record that no section knows is still listed at the end.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from results_page.cpu import cpu_pages
from results_page.gpu import gpu_pages
from results_page.page import Page, Records, table, where

ROOT = Path(__file__).resolve().parents[1]


def rendered(records: Records, *, links: str, pictures: str) -> Page:
    """Return the page for these records."""
    page = Page(links=links, pictures=pictures)
    page.say(
        "# Results",
        "Written by `make results` from the records in [benchmarks/results]("
        f"{links}); do not edit. Every figure comes from one of them. A spread is a median with "
        "quartiles unless it says otherwise, n is how often something was measured.",
    )
    gpu_pages(records, page)
    cpu_pages(records, page)
    page.say(
        "## All records",
        table(
            ("record", "machine", "torch", "commit", "date", "command"),
            [_listed(page, name, records) for name in records.by_name],
        ),
    )
    page.say(
        "## Limitations",
        "- Figures of a CPU say nothing about the speed of a GPU, where fp16 and bf16 have units "
        "of their own.\n"
        "- CPU records were made on machines that others used at the same time; time was therefore "
        "counted as process time where a record says so, and byte counts do not depend on it.\n"
        "- A commit that ends in `-dirty` had changes that were not yet committed.\n"
        "- One run on one machine: another card, driver or version of torch can give other\n"
        "  figures.",
    )
    return page


def _listed(page: Page, name: str, records: Records) -> tuple[str, ...]:
    about = where(records.by_name[name])
    return (
        page.link(name),
        about["machine"],
        about["torch"],
        about["commit"],
        about["date"],
        f"`{about['command']}`",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--records", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "results.md")
    parser.add_argument(
        "--rehearsals", action="store_true", help="show rehearsed records too, to look at the page"
    )
    asked = parser.parse_args()
    page = rendered(
        Records.read(asked.records, rehearsals=asked.rehearsals),
        links="../benchmarks/results",
        pictures="images/results",
    )
    pictures = asked.page.parent / "images" / "results"
    pictures.mkdir(parents=True, exist_ok=True)
    for old in pictures.glob("*.svg"):
        if old.name not in page.charts:
            old.unlink()
    for name, svg in page.charts.items():
        (pictures / name).write_text(svg)
    asked.page.write_text("\n".join(page.text).rstrip() + "\n")
    print(f"wrote {asked.page} and {len(page.charts)} charts from {asked.records}")


if __name__ == "__main__":
    main()
