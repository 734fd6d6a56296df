"""How numbers, names and verdicts are worded, once for the terminal and the page.

Nothing here computes a result: a figure gets its digits, a ratio of two recorded figures its per
cent sign, a verdict word its plain sentence, and a precision the same colour in every picture.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence

from narrowcast.records.comparison import Verdict
from narrowcast.records.memory import CATEGORIES
from narrowcast.report.shapes import Tone, Unit
from narrowcast.units import format_bytes, format_duration, format_percent

__all__ = [
    "MEANINGS",
    "NOTHING",
    "TONES",
    "bytes_or_nothing",
    "category_colour",
    "colour_of",
    "count",
    "dtypes_text",
    "estimate",
    "format_value",
    "listed",
    "moment",
    "number",
    "plural",
    "printable",
    "relative",
    "run_values",
    "seconds_or_nothing",
    "sentence",
    "signed",
    "signed_bytes",
    "spaced",
    "yes_no",
]

NOTHING = "n/a"

TONES: dict[Verdict, Tone] = {
    "NON-INFERIOR": "holds",
    "EQUIVALENT": "holds",
    "WORSE": "fails",
    "FAILED": "fails",
    "INCONCLUSIVE": "open",
    "NOT A PRECISION PROBLEM": "open",
    "NO MARGIN": "open",
}
MEANINGS: dict[Verdict, str] = {
    "NON-INFERIOR": "The harm, if there is any, is smaller than the margin.",
    "EQUIVALENT": "The difference is smaller than the margin, in both directions.",
    "WORSE": "The result is worse by more than the margin, and chance does not explain it.",
    "FAILED": "Runs of this precision diverged or raised on seeds on which the reference did not.",
    "INCONCLUSIVE": "These runs cannot tell harm from chance at this margin.",
    "NOT A PRECISION PROBLEM": "The reference diverges on the same seeds: precision is not why.",
    "NO MARGIN": "No margin was fixed before the runs, so no verdict is given.",
}

# Precisions keep their colour in every picture of every report; the page's style sheet defines
# what each token looks like on a light and on a dark ground.
_COLOURS = ("fp32", "tf32", "fp16", "bf16", "bf16-true", "control")
_SPARE_COLOURS = 3


def colour_of(precision: str) -> str:
    """Name the colour token of a precision; names that we do not know share a few spare ones."""
    if precision in _COLOURS:
        return f"p-{precision}"
    return f"p-spare-{sum(precision.encode()) % _SPARE_COLOURS}"


def category_colour(category: str) -> str:
    """Name the colour token of a memory category; one that we do not know is unattributed."""
    return f"m-{category if category in CATEGORIES else 'unattributed'}"


def printable(text: str) -> str:
    r"""Make control and direction-changing characters visible: ESC becomes '\x1b'.

    A recipe's name may hold terminal escapes or bidirectional overrides, which would let it repaint
    the report or reverse the words around it. Line breaks become spaces.
    """
    return "".join(_visible(c) for c in text.replace("\r\n", "\n").replace("\n", " "))


def _visible(character: str) -> str:
    if unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Zl", "Zp"):
        return character
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def number(value: float | None, digits: int = 4) -> str:
    """Write a number with `digits` significant digits, trailing zeros kept: 0.87 -> '0.8700'."""
    if value is None:
        return NOTHING
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else "inf" if value > 0 else "-inf"
    if value == 0:
        return "0"
    if not 1e-4 <= abs(value) < 1e6:
        return f"{value:.{digits - 1}e}"
    return f"{value:.{max(digits - 1 - math.floor(math.log10(abs(value))), 0)}f}"


def count(value: int) -> str:
    """Write a count with its thousands apart: 12345 -> '12,345'."""
    return f"{value:,}"


def signed(value: float, decimals: int) -> str:
    """Write a difference with its sign, zero without one."""
    text = f"{value:+.{decimals}f}"
    return text[1:] if float(text) == 0 else text


def estimate(
    difference: float | None, interval: tuple[float, float] | None, n: int, level: str = ""
) -> str:
    """Write estimate, interval and n as one string, because none of them means much alone.

    >>> estimate(0.0021, (-0.0012, 0.0054), 5, "90%")
    '+0.0021, 90% interval [-0.0012, +0.0054], n=5'
    >>> estimate(0.0021, (-0.0012, 0.0054), 5)
    '+0.0021 [-0.0012, +0.0054] n=5'
    """
    comma = "," if level else ""
    if difference is None or not math.isfinite(difference):
        return f"no estimate{comma} n={n}"
    if interval is None or not all(map(math.isfinite, interval)):
        return f"{signed(difference, _decimals(abs(difference)))}, no interval{comma} n={n}"
    decimals = _decimals((interval[1] - interval[0]) / 2)
    low, high = (signed(bound, decimals) for bound in interval)
    name = f", {level} interval" if level else ""
    return f"{signed(difference, decimals)}{name} [{low}, {high}]{comma} n={n}"


def _decimals(width: float) -> int:
    """Decimals that show a quantity of this size with two digits; at most 8."""
    if width <= 0:
        return 4
    return min(max(1 - math.floor(math.log10(width)), 0), 8)


def relative(value: float | None, reference: float | None) -> str:
    """Write how a recorded figure relates to the reference's, as ' (-42.0%)', or nothing."""
    if value is None or not reference or value == reference:
        return ""
    return f" ({format_percent(value / reference)})"


def bytes_or_nothing(size: int | None) -> str:
    """Write a size, or that there is none."""
    return NOTHING if size is None else format_bytes(size)


def signed_bytes(change: int | None) -> str:
    """Write how much more or less is held: '+60.0 KiB'."""
    if change is None:
        return NOTHING
    return f"{'+' if change > 0 else '-' if change < 0 else ''}{format_bytes(abs(change))}"


def seconds_or_nothing(seconds: float | None) -> str:
    """Write a duration, or that there is none."""
    if seconds is None or not math.isfinite(seconds):
        return number(seconds)
    return format_duration(seconds)


def spaced(name: str) -> str:
    """Write a field's name as words: 'optimizer_state' -> 'optimizer state'."""
    return name.replace("_", " ")


def listed(items: Iterable[object]) -> str:
    """Join with commas: (0, 1, 2) -> '0, 1, 2'."""
    return ", ".join(str(item) for item in items)


def plural(n: int, noun: str) -> str:
    """Write a count and its noun: (1, 'run') -> '1 run', (3, 'run') -> '3 runs'."""
    return f"{count(n)} {noun}{'' if n == 1 else 's'}"


def yes_no(value: bool | None) -> str:  # noqa: FBT001 -- it is the thing to be worded
    """Word a fact that may be unknown."""
    return "not checked" if value is None else "yes" if value else "NO"


def dtypes_text(calls: Mapping[str, int]) -> str:
    """Write how often an operation executed in which format: 'bf16 x24, fp32 x2'."""
    return listed(f"{name} x{count(n)}" for name, n in sorted(calls.items())) or NOTHING


def moment(iso: str) -> str:
    """Write an ISO 8601 time to the minute: '2026-11-23 10:02 UTC'; anything else as it is."""
    match = re.fullmatch(r"(\d{4}-\d\d-\d\d)T(\d\d:\d\d)[\d:.]*(Z|[+-]00:00|[+-]\d\d:\d\d)?", iso)
    if match is None:
        return iso
    zone = match[3] or ""
    return f"{match[1]} {match[2]} {'UTC' if zone in ('Z', '+00:00', '-00:00') else zone}".rstrip()


def sentence(clause: str) -> str:
    """Make a clause a sentence: a capital (unless it begins with a name like fp16) and a stop."""
    first = clause.split(" ", 1)[0]
    capital = clause[:1].upper() if first.isalpha() else clause[:1]
    return capital + clause[1:].rstrip(".") + "." if clause else ""


def format_value(value: float | None, unit: Unit) -> str:
    """Write a value of a chart with its unit, or say that it is not a number."""
    if value is None:
        return "not finite"
    if unit == "bytes":
        return format_bytes(value)
    if unit == "seconds":
        return format_duration(value)
    if unit == "power":
        return f"{number(2.0**value, 3)} (2^{value:.0f})"
    return f"{value:,.0f}" if unit == "scale" and value >= 1 else number(value)


def run_values(values: Sequence[float | None], seeds: Sequence[int]) -> tuple[str, ...]:
    """Write one value a seed; None is a diverged run, and a value that is not there is n/a."""
    words = ["diverged" if value is None else number(value) for value in values[: len(seeds)]]
    return (*words, *[NOTHING] * (len(seeds) - len(words)))
