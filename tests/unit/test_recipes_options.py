"""Options: read by their declared types, and every wrong one answered with the right one."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Literal, Optional

import pytest
from hypothesis import given
from hypothesis import strategies as st

from narrowcast.errors import RecipeError, UnknownName, UsageError
from narrowcast.recipes.options import describe_options, parse_overrides


@dataclass
class Options:
    steps: int = 10
    lr: float = 0.1
    tied: bool = True
    text: str = "a"
    model: Literal["mlp", "vit"] = "mlp"
    width: int | None = None
    rate: Optional[float] = None  # noqa: UP045 -- the spelling that users of older books write
    bits: Literal[8, 16] | None = 8
    tag: str | None = "a"
    size: str | int = "large"


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("steps=7", 7),
        ("steps=-7", -7),
        ("steps=1_000", 1000),
        ("lr=1e-3", 1e-3),
        ("lr=2", 2.0),
        ("tied=false", False),
        ("tied=YES", True),
        ("tied=0", False),
        ("tied=on", True),
        ("text=", ""),
        ("text=a=b", "a=b"),
        ("text=none", "none"),
        ("model=vit", "vit"),
        ("width=3", 3),
        ("width=none", None),
        ("width=None", None),
        ("rate=0.5", 0.5),
        ("rate=none", None),
        ("bits=16", 16),
        ("bits=none", None),
        (" steps = 7 ", 7),
        ("tag=none", None),
        ("tag=nothing", "nothing"),
        ("size=3", 3),
        ("size=small", "small"),
    ],
)
def test_a_value_is_read_by_the_declared_type(override: str, expected: object) -> None:
    """Each type of option accepts what people write for it, and gives a value of that very type."""
    (value,) = parse_overrides(Options, [override]).values()

    assert value == expected
    assert type(value) is type(expected)


@given(
    steps=st.integers(),
    lr=st.floats(allow_nan=False, allow_infinity=False),
    tied=st.booleans(),
    text=st.text().map(str.strip),
    width=st.none() | st.integers(),
)
def test_what_python_writes_is_read_back(
    steps: int, lr: float, tied: bool, text: str, width: int | None
) -> None:
    """``name=str(value)`` gives the value again, for every value of every type."""
    values = {"steps": steps, "lr": lr, "tied": tied, "text": text, "width": width}

    assert parse_overrides(Options, [f"{k}={v}" for k, v in values.items()]) == values


@pytest.mark.parametrize(
    ("override", "message", "hint"),
    [
        ("stesp=7", "unknown option 'stesp'", "did you mean 'steps'?"),
        ("model=vits", "unknown model 'vits'", "did you mean 'vit'?"),
        ("bits=9", "unknown bits '9'", "valid: 16, 8"),
    ],
)
def test_an_unknown_name_or_choice_gets_the_nearest(override: str, message: str, hint: str) -> None:
    """A slip of the finger is answered with what was probably meant."""
    with pytest.raises(UnknownName, match=message) as caught:
        parse_overrides(Options, [override])

    assert hint in caught.value.hint


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("steps=1.5", "option 'steps' is of type int, and '1.5' is not"),
        ("steps=", "option 'steps' is of type int, and '' is not"),
        ("lr=fast", "option 'lr' is of type float, and 'fast' is not"),
        ("lr=nan", "option 'lr' is of type float, and 'nan' is not"),
        ("tied=maybe", "option 'tied' is of type bool, and 'maybe' is not"),
        ("width=wide", r"option 'width' is of type int \| none, and 'wide' is not"),
        ("steps", "'steps' is not name=value"),
    ],
)
def test_a_value_of_another_type_names_the_expected_one(override: str, message: str) -> None:
    """The request makes no sense, and the answer says what would."""
    with pytest.raises(UsageError, match=message) as caught:
        parse_overrides(Options, [override])

    assert caught.value.exit_code == 2
    assert "--set" in caught.value.hint


def test_an_option_set_twice_is_an_error() -> None:
    """Neither of two contradicting values is silently dropped."""
    with pytest.raises(UsageError, match="'steps' is set twice"):
        parse_overrides(Options, ["steps=1", "lr=1", "steps=2"])


def test_no_override_changes_nothing() -> None:
    """The defaults are the dataclass's own business."""
    assert parse_overrides(Options, []) == {}


def test_options_are_described_in_their_order_with_their_notes() -> None:
    """The list of options shows type, default, choices, and the string under the field."""
    source = '''
@dataclass
class Options:
    steps: int = 10
    """how
       long"""
    lr: float = 0.1
    model: Literal["mlp", "vit"] = "mlp"
    """which"""
'''
    described = describe_options(Options, source)

    assert [d.name for d in described] == [f.name for f in fields(Options)]
    steps, lr, *_ = described
    model = described[4]
    assert (steps.type, steps.default, steps.note) == ("int", 10, "how long")
    assert (lr.type, lr.note) == ("float", "")
    assert (model.type, model.choices, model.note) == ("mlp | vit", ("mlp", "vit"), "which")
    assert (described[5].type, described[5].default) == ("int | none", None)


@dataclass
class NoDefault:
    steps: int


@dataclass
class Factory:
    layers: list[int] = field(default_factory=list)


@dataclass
class MadeDefault:
    text: str = field(default_factory=str)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (NoDefault, "option 'steps' has no plain default"),
        (Factory, "option 'layers' has the type"),
        (MadeDefault, "option 'text' has no plain default"),
    ],
)
def test_a_field_that_no_text_can_set_is_an_error(options: type, message: str) -> None:
    """Every option can be shown in a list, set from a command line and recorded."""
    with pytest.raises(RecipeError, match=message):
        parse_overrides(options, [])
