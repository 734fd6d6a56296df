"""Numbers, names and verdicts are worded once, and nothing in them can act on a terminal."""

from __future__ import annotations

import math
import unicodedata
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from narrowcast.records.comparison import Verdict
from narrowcast.report.wording import (
    MEANINGS,
    TONES,
    colour_of,
    dtypes_text,
    estimate,
    format_value,
    moment,
    number,
    printable,
    relative,
    sentence,
    signed,
)


def test_every_verdict_word_has_a_meaning_and_a_tone() -> None:
    """A word that the records know and the report does not cannot exist."""
    words = set(get_args(Verdict))

    assert set(MEANINGS) == words
    assert set(TONES) == words


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, "n/a"),
        (math.nan, "NaN"),
        (math.inf, "inf"),
        (-math.inf, "-inf"),
        (0.0, "0"),
        (0.8712, "0.8712"),
        (0.87, "0.8700"),
        (123.456, "123.5"),
        (999999.0, "999999"),
        (1e6, "1.000e+06"),
        (1e-4, "0.0001000"),
        (9.9e-5, "9.900e-05"),
        (-0.0021, "-0.002100"),
    ],
)
def test_a_number_has_four_significant_digits(value: float | None, expected: str) -> None:
    """Digits are counted from the first that is not zero; extremes are written with an exponent."""
    assert number(value) == expected


@pytest.mark.parametrize(
    ("interval", "expected"),
    [
        ((-0.0012, 0.0054), "+0.0021 [-0.0012, +0.0054] n=5"),
        ((-1.0, 1.0), "0.0 [-1.0, +1.0] n=5"),
        ((-120.0, 40.0), "0 [-120, +40] n=5"),
        ((0.0021, 0.0021), "+0.0021 [+0.0021, +0.0021] n=5"),
        (None, "+0.0021, no interval n=5"),
        ((-math.inf, 1.0), "+0.0021, no interval n=5"),
    ],
)
def test_an_estimate_shows_as_many_decimals_as_its_interval_is_worth(
    interval: tuple[float, float] | None, expected: str
) -> None:
    """Two digits of the interval's width; estimate, interval and n stay in one string."""
    assert estimate(0.0021, interval, 5) == expected


@pytest.mark.parametrize("difference", [None, math.nan])
def test_without_a_difference_n_is_still_told(difference: float | None) -> None:
    """An arm that failed has an n, and says that there is nothing else."""
    assert estimate(difference, (0.0, 1.0), 3, "90%") == "no estimate, n=3"


def test_zero_has_no_sign() -> None:
    """-0.00004 rounded to two decimals is neither plus nor minus."""
    assert [signed(x, 2) for x in (-0.00004, 0.0, 0.011)] == ["0.00", "0.00", "+0.01"]


def test_a_ratio_is_told_only_where_there_is_one() -> None:
    """The reference itself, an unknown value and a reference of zero have no percentage."""
    assert [relative(58, 100), relative(100, 100), relative(None, 1), relative(5, 0)] == [
        " (-42.0%)", "", "", "",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("iso", "expected"),
    [
        ("2026-11-23T10:02:11+00:00", "2026-11-23 10:02 UTC"),
        ("2026-11-23T10:02:11.123456Z", "2026-11-23 10:02 UTC"),
        ("2026-11-23T10:02:11+02:00", "2026-11-23 10:02 +02:00"),
        ("2026-11-23T10:02", "2026-11-23 10:02"),
        ("yesterday", "yesterday"),
        ("", ""),
    ],
)
def test_a_time_is_written_to_the_minute(iso: str, expected: str) -> None:
    """What is not an ISO time is shown as it stands in the record."""
    assert moment(iso) == expected


@pytest.mark.parametrize(
    ("clause", "expected"),
    [
        ("harm at most 0.1", "Harm at most 0.1."),
        ("fp16 is worse.", "fp16 is worse."),
        ("2 of 5 runs diverged", "2 of 5 runs diverged."),
        ("", ""),
    ],
)
def test_a_reason_becomes_a_sentence(clause: str, expected: str) -> None:
    """Names such as fp16 keep their small letter."""
    assert sentence(clause) == expected


@pytest.mark.parametrize(
    ("value", "unit", "expected"),
    [
        (1536.0, "bytes", "1.50 KiB"),
        (0.0412, "seconds", "41.2 ms"),
        (65536.0, "scale", "65,536"),
        (0.5, "scale", "0.5000"),
        (None, "number", "not finite"),
    ],
)
def test_a_value_of_a_chart_has_its_unit(value: float | None, unit: str, expected: str) -> None:
    """Loss scales are whole powers of two and keep all their digits."""
    assert format_value(value, unit) == expected


def test_dtypes_are_listed_with_their_counts() -> None:
    """An operation that did not occur is n/a."""
    assert dtypes_text({"fp32": 2, "bf16": 1024}) == "bf16 x1,024, fp32 x2"
    assert dtypes_text({}) == "n/a"


def test_known_precisions_have_their_own_colour() -> None:
    """Two built-in precisions never share one; an unknown one gets a spare."""
    known = ["fp32", "tf32", "fp16", "bf16", "bf16-true"]

    assert len({colour_of(name) for name in known}) == len(known)
    assert colour_of("my own").startswith("p-spare-")


def test_control_characters_become_visible() -> None:
    """A terminal escape, a direction override and a lone surrogate are shown, not obeyed."""
    assert printable("a\x1b[31mb\u202ec\td\ud800") == "a\\x1b[31mb\\u202ec\\x09d\\ud800"
    assert printable("two\nlines\r\nhere") == "two lines here"


@given(st.text(st.characters(categories=["Cc", "Cf", "Cs", "Zl", "Zp", "Lu"])))
def test_no_character_that_acts_survives(text: str) -> None:
    """Controls, formats, surrogates and separators of lines are all written out."""
    shown = printable(text)

    assert {unicodedata.category(c) for c in shown.encode().decode()} <= {
        "Lu",
        "Ll",
        "Po",
        "Nd",
        "Zs",
    }
