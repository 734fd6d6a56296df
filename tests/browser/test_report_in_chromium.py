"""The HTML report in a real browser: drawn, quiet, readable on a desk and on a phone, and safe."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from narrowcast.report.html import write_html
from report_records import KINDS, golden, hostile, points

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("chrome")
DRIVER = shutil.which("chromedriver")

pytestmark = [
    pytest.mark.browser,
    pytest.mark.slow,
    pytest.mark.skipif(
        not (CHROMIUM and DRIVER),
        reason="needs chromium and chromedriver (apt install chromium-driver)",
    ),
]

WIDTHS = (1280, 400)
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--hide-scrollbars",
)  # fmt: skip


@dataclass
class Browser:
    """A Chromium, with the few things that the tests ask of it."""

    driver: Any

    def open(self, page: Path, *, width: int, scheme: str = "light") -> None:
        """Load a page at a width and wait until it says that its charts are drawn."""
        self.driver.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False},
        )
        self.prefer(scheme)
        self.driver.get(page.as_uri())
        self.wait("return document.documentElement.classList.contains('drawn')")

    def prefer(self, scheme: str) -> None:
        """Switch between light and dark as the system would."""
        feature = {"name": "prefers-color-scheme", "value": scheme}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})

    def ask(self, script: str) -> Any:
        """Run a script in the page and return what it returns."""
        return self.driver.execute_script(script)

    def wait(self, script: str) -> None:
        """Wait until a script returns true; a page that never gets there fails the test."""
        end = time.monotonic() + 60
        while not self.ask(script):
            assert time.monotonic() < end, f"never true: {script}"
            time.sleep(0.05)

    def complaints(self) -> list[str]:
        """Return what the console got since the last call."""
        return [entry["message"] for entry in self.driver.get_log("browser")]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield Browser(driver)
    driver.quit()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("reports")
    for name in KINDS:
        write_html(golden(name), home / f"{name}.html", points=points())
        write_html(hostile(name), home / f"hostile-{name}.html", points=points())
    return {path.stem: path for path in home.iterdir()}


# Of every place for a figure: its title, how many shapes with an area plotly drew there, and
# whether one reaches out of the picture.
DRAWN = """
return [...document.querySelectorAll('.plot')].map((place) => {
  const svg = place.querySelector('svg.main-svg');
  const marks = [...place.querySelectorAll('.plot path, .plot use, .barlayer path')];
  const sized = marks.filter((m) => { const b = m.getBoundingClientRect();
                                      return b.width + b.height > 2; });
  const box = svg ? svg.getBoundingClientRect() : {width: 0, height: 0};
  return [place.getAttribute('aria-label'), sized.length, box.width, box.height];
});
"""
# Labels of charts of which a part lies outside of their picture.
CLIPPED = """
return [...document.querySelectorAll('.plot')].flatMap((place) => {
  const box = place.getBoundingClientRect();
  return [...place.querySelectorAll('svg text')].filter((text) => {
    const b = text.getBoundingClientRect();
    return b.width > 0 && (b.left < box.left - 1 || b.right > box.right + 1 ||
                           b.top < box.top - 1 || b.bottom > box.bottom + 1);
  }).map((text) => text.textContent);
});
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", KINDS)
def test_every_chart_is_drawn_and_the_console_is_quiet(
    browser: Browser, pages: dict[str, Path], name: str, width: int, scheme: str
) -> None:
    """At both widths, light and dark: shapes, no cut labels, no sideways scroll."""
    browser.open(pages[name], width=width, scheme=scheme)

    charts = browser.ask(DRAWN)
    assert charts
    assert [label for label, shapes, _, _ in charts if shapes == 0] == []
    assert all(0 < w <= width and h > 80 for _, _, w, h in charts)
    assert browser.ask(CLIPPED) == []
    assert browser.ask("return document.documentElement.scrollWidth") <= width
    assert browser.complaints() == []


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", KINDS)
def test_hostile_names_do_nothing(
    browser: Browser, pages: dict[str, Path], name: str, width: int
) -> None:
    """No script runs, no image is asked for, no element appears; the names are shown as text."""
    browser.open(pages[f"hostile-{name}"], width=width)

    assert browser.ask("return window.hit") is None
    assert browser.ask("return document.querySelectorAll('img, main a, body script').length") == 3
    assert "<img src=x onerror=window.hit=1>" in browser.ask("return document.body.innerText")
    shown = browser.ask(
        "return [...document.querySelectorAll('svg text')].map((t) => t.textContent).join(' ')"
    )
    # The chart of a plan shows no names but our own, that of a diagnosis the ends of long ones.
    assert ("<img src=x" in shown) == (name not in ("plan", "diagnosis"))
    assert browser.ask("return document.documentElement.scrollWidth") <= width
    assert browser.complaints() == []


def test_the_page_follows_the_system_from_light_to_dark(
    browser: Browser, pages: dict[str, Path]
) -> None:
    """Charts are drawn anew in the colours of the other ground, without a reload."""
    line = "document.querySelector('.plot .scatterlayer .js-line').style.stroke"
    browser.open(pages["run"], width=1280, scheme="light")
    light = browser.ask(f"return {line}")

    browser.prefer("dark")
    browser.wait(f"return {line} !== '{light}'")

    assert (
        browser.ask("return getComputedStyle(document.body).backgroundColor") == "rgb(18, 21, 24)"
    )
    assert browser.complaints() == []


def test_a_legend_hides_and_shows_its_part(browser: Browser, pages: dict[str, Path]) -> None:
    """Pressing 'activations' takes it out of every bar, and pressing again puts it back."""
    count = "return document.querySelectorAll('#memory .barlayer path').length"
    press = (
        "[...document.querySelectorAll('#memory .legend button')]"
        ".find((b) => b.textContent.trim() === 'activations').click()"
    )
    browser.open(pages["comparison"], width=1280)
    before = browser.ask(count)

    browser.ask(press)
    browser.wait(f"{count} === {before - 3}")
    browser.ask(press)

    browser.wait(f"{count} === {before}")


def test_a_narrower_window_redraws_the_charts(browser: Browser, pages: dict[str, Path]) -> None:
    """Turning a phone or resizing a window leaves no chart wider than its place."""
    browser.open(pages["comparison"], width=1280)

    browser.driver.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": 400, "height": 900, "deviceScaleFactor": 1, "mobile": False},
    )
    browser.wait(
        "return [...document.querySelectorAll('.plot svg.main-svg')]"
        ".every((svg) => svg.getBoundingClientRect().width <= 400)"
    )

    assert browser.ask("return document.documentElement.scrollWidth") <= 400


def test_hovering_shows_the_value(browser: Browser, pages: dict[str, Path]) -> None:
    """A pointer on a dot of the differences reads which seed it is and what it measured."""
    browser.open(pages["comparison"], width=1280)
    x, y = browser.ask(
        "const dot = document.querySelector('#verdict .plot .scatterlayer .points path');"
        "dot.scrollIntoView({block: 'center', behavior: 'instant'});"
        "const b = dot.getBoundingClientRect();"
        "return [b.left + b.width / 2, b.top + b.height / 2];"
    )

    browser.driver.execute_cdp_cmd(
        "Input.dispatchMouseEvent", {"type": "mouseMoved", "x": x, "y": y}
    )
    browser.wait("return document.querySelectorAll('.hoverlayer .hovertext').length > 0")

    assert "seed 11" in browser.ask("return document.querySelector('.hoverlayer').textContent")


def test_the_printed_page_is_light_and_holds_its_charts(
    browser: Browser, pages: dict[str, Path]
) -> None:
    """Printing from a dark system redraws on white, no wider than the paper."""
    browser.open(pages["comparison"], width=1280, scheme="dark")

    browser.ask("window.dispatchEvent(new Event('beforeprint'))")
    browser.wait(
        "return [...document.querySelectorAll('.plot svg.main-svg')]"
        ".every((svg) => svg.getBoundingClientRect().width <= 690)"
    )

    ink = "return getComputedStyle(document.documentElement).getPropertyValue('--ink').trim()"
    assert browser.ask(ink) == "#1c2127"
