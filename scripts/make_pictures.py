"""Make the pictures of the docs from a real record: `python scripts/make_pictures.py SOURCE`.

    comparison-terminal.svg            what `narrowcast compare` prints at its end
    comparison-report[-dark].png       the beginning of its HTML report
    comparison-memory[-dark].png       the memory section of the same report
    diagnosis-terminal.svg             what `narrowcast diagnose` prints at its end
    diagnosis-source[-dark].png        the model's source with its values
    diagnosis-ranges[-dark].png        what each module passes on, against the format

Needs the `test` extra and Chromium with its driver; nothing is drawn by hand or touched up.
"""

from __future__ import annotations

import argparse
import base64
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from typing import Any

from rich.console import Console
from selenium import webdriver

from narrowcast.records.diagnosis import DiagnosisRecord
from narrowcast.report.html import write_html
from narrowcast.report.sources import Source, read_source
from narrowcast.report.terminal import render_summary

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--hide-scrollbars",
)  # fmt: skip
WIDTH = 1120
Area = tuple[float, float, float, float]
COLUMNS = 100


def terminal_picture(source: Source, target: Path) -> None:
    """Record the terminal summary as SVG, without the web font that rich would have it load."""
    console = Console(
        file=StringIO(), record=True, width=COLUMNS, force_terminal=True, color_system="truecolor"
    )
    render_summary(source.record, console, points=source.points)
    verb = "diagnose" if isinstance(source.record, DiagnosisRecord) else "compare"
    svg = console.export_svg(title=f"narrowcast {verb}")
    target.write_text(re.sub(r"@font-face\s*\{[^}]*\}", "", svg))


def chromium(profile: str) -> Any:
    """Start a headless Chromium on a fresh profile."""
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or shutil.which("chromium-browser") or ""
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    return webdriver.Chrome(
        options=options, service=webdriver.ChromeService(shutil.which("chromedriver"))
    )


def page_pictures(page: Path, target: Path, *, diagnosis: bool) -> None:
    """Photograph parts of a report, light and dark."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        driver = chromium(profile)
        try:
            for scheme, suffix in (("light", ""), ("dark", "-dark")):
                show(driver, page, scheme)
                for name, area in parts(driver, diagnosis=diagnosis):
                    shoot(driver, target / f"{name}{suffix}.png", area)
        finally:
            driver.quit()


def parts(driver: Any, *, diagnosis: bool) -> Iterator[tuple[str, Area]]:
    """Yield the names of the pictures and where they are on the page."""
    if diagnosis:
        yield "diagnosis-source", box(driver, "#source")
        yield "diagnosis-ranges", box(driver, "#ranges .chart")
        return
    yield "comparison-report", (0, 0, WIDTH, box(driver, "#not-tested")[1])
    if driver.execute_script("return document.querySelector('#memory') !== null"):
        yield "comparison-memory", box(driver, "#memory")


def show(driver: Any, page: Path, scheme: str) -> None:
    """Load the page on a light or dark system and wait until its charts are drawn."""
    driver.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": WIDTH, "height": 900, "deviceScaleFactor": 1.5, "mobile": False},
    )
    feature = {"name": "prefers-color-scheme", "value": scheme}
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    driver.get(page.resolve().as_uri())
    end = time.monotonic() + 60
    while not driver.execute_script("return document.documentElement.classList.contains('drawn')"):
        if time.monotonic() > end:
            raise TimeoutError(f"the charts of {page} were not drawn within a minute")
        time.sleep(0.1)


def box(driver: Any, selector: str) -> Area:
    """Return left, top, width and height of an element on the page."""
    x, y, width, height = driver.execute_script(
        "const b = document.querySelector(arguments[0]).getBoundingClientRect();"
        "return [b.left + scrollX, b.top + scrollY, b.width, b.height];",
        selector,
    )
    return x, y, width, height


def shoot(driver: Any, target: Path, area: Area) -> None:
    """Write one part of the page as PNG."""
    x, y, width, height = area
    clip = {"x": x, "y": y, "width": width, "height": height, "scale": 1}
    shot = driver.execute_cdp_cmd(
        "Page.captureScreenshot", {"format": "png", "captureBeyondViewport": True, "clip": clip}
    )
    target.write_bytes(base64.b64decode(shot["data"]))
    print(target)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "source", type=Path, help="directory or JSON of a comparison or a diagnosis"
    )
    parser.add_argument("--output", type=Path, default=Path("docs/images"))
    given = parser.parse_args()

    source = read_source(given.source)
    diagnosis = isinstance(source.record, DiagnosisRecord)
    given.output.mkdir(parents=True, exist_ok=True)
    name = "diagnosis" if diagnosis else "comparison"
    terminal_picture(source, given.output / f"{name}-terminal.svg")
    with tempfile.TemporaryDirectory() as place:
        page = Path(place) / "report.html"
        write_html(source.record, page, points=source.points)
        page_pictures(page, given.output, diagnosis=diagnosis)


if __name__ == "__main__":
    main()
