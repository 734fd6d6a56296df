"""Make the pictures of the README from a real comparison: `python scripts/make_pictures.py DIR`.

    comparison-terminal.svg            what `narrowcast compare` prints at its end
    comparison-report[-dark].png       the beginning of its HTML report
    comparison-memory[-dark].png       the memory section of the same report

Needs the `test` extra and Chromium with its driver; nothing is drawn by hand or touched up.
"""

from __future__ import annotations

import argparse
import base64
import re
import shutil
import tempfile
import time
from io import StringIO
from pathlib import Path
from typing import Any

from rich.console import Console
from selenium import webdriver

from narrowcast.report.html import write_html
from narrowcast.report.sources import Source, read_source
from narrowcast.report.terminal import render_summary

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--hide-scrollbars",
)  # fmt: skip
WIDTH = 1120
COLUMNS = 100


def terminal_picture(source: Source, target: Path) -> None:
    """Record the terminal summary as SVG, without the web font that rich would have it load."""
    console = Console(
        file=StringIO(), record=True, width=COLUMNS, force_terminal=True, color_system="truecolor"
    )
    render_summary(source.record, console, points=source.points)
    svg = console.export_svg(title="narrowcast compare")
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


def page_pictures(page: Path, target: Path) -> None:
    """Photograph the beginning of the report and its memory section, light and dark."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        driver = chromium(profile)
        try:
            for scheme, suffix in (("light", ""), ("dark", "-dark")):
                show(driver, page, scheme)
                top = box(driver, "#not-tested")[1]
                shoot(driver, target / f"comparison-report{suffix}.png", (0, 0, WIDTH, top))
                if driver.execute_script("return document.querySelector('#memory') !== null"):
                    shoot(driver, target / f"comparison-memory{suffix}.png", box(driver, "#memory"))
        finally:
            driver.quit()


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


def box(driver: Any, selector: str) -> tuple[float, float, float, float]:
    """Return left, top, width and height of an element on the page."""
    x, y, width, height = driver.execute_script(
        "const b = document.querySelector(arguments[0]).getBoundingClientRect();"
        "return [b.left + scrollX, b.top + scrollY, b.width, b.height];",
        selector,
    )
    return x, y, width, height


def shoot(driver: Any, target: Path, area: tuple[float, float, float, float]) -> None:
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
    parser.add_argument("directory", type=Path, help="of a comparison")
    parser.add_argument("--output", type=Path, default=Path("docs/images"))
    given = parser.parse_args()

    source = read_source(given.directory)
    given.output.mkdir(parents=True, exist_ok=True)
    terminal_picture(source, given.output / "comparison-terminal.svg")
    with tempfile.TemporaryDirectory() as place:
        page = Path(place) / "report.html"
        write_html(source.record, page, points=source.points)
        page_pictures(page, given.output)


if __name__ == "__main__":
    main()
