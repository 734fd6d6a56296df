"""A recipe's options: what there is to choose, and ``name=value`` read by the declared type.

An option is a field of the recipe's dataclass ``Options``: an int, a float, a bool, a str, a
``Literal`` of these, or one of them ``| None``. The string literal under a field, if there is one,
is its explanation.
"""

from __future__ import annotations

import ast
import dataclasses
import math
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from narrowcast.errors import RecipeError, UnknownName, UsageError

__all__ = [
    "OptionDescription",
    "OptionValue",
    "describe_options",
    "parse_overrides",
    "recorded_overrides",
]

OptionValue = str | int | float | bool | None

_BOOLS = {"true": True, "yes": True, "on": True, "1": True}
_BOOLS |= {"false": False, "no": False, "off": False, "0": False}
_NONE = "none"


@dataclass(frozen=True, kw_only=True)
class OptionDescription:
    """One option as users see it; `choices` is empty where any value of the type will do."""

    name: str
    type: str
    default: OptionValue
    choices: tuple[str, ...] = ()
    note: str = ""


def describe_options(options_class: type, source: str) -> tuple[OptionDescription, ...]:
    """List the options of a recipe in the order of their declaration.

    Raises RecipeError for a field without a default or of a type that no text can be read as.
    """
    kinds = _kinds(options_class)
    notes = _notes(source, options_class.__name__)
    return tuple(
        OptionDescription(
            name=field.name,
            type=_type_name(kinds[field.name]),
            default=typing.cast("OptionValue", field.default),  # _kinds has seen that there is one
            choices=tuple(str(c) for k in kinds[field.name] for c in _choices(k)),
            note=notes.get(field.name, ""),
        )
        for field in dataclasses.fields(options_class)
    )


def parse_overrides(options_class: type, overrides: Iterable[str]) -> dict[str, OptionValue]:
    """Read ``name=value`` pairs by the types that the options declare.

    Raises UnknownName for a name or a Literal's value that does not exist, and UsageError for a
    value of another type, an option given twice, or a text that is no pair.
    """
    kinds = _kinds(options_class)
    values: dict[str, OptionValue] = {}
    for override in overrides:
        name, equals, text = override.partition("=")
        name, text = name.strip(), text.strip()
        if not equals:
            raise UsageError(f"{override!r} is not name=value", hint="write --set batch_size=64")
        if name not in kinds:
            raise UnknownName.of("option", name, kinds)
        if name in values:
            raise UsageError(f"option {name!r} is set twice", hint="keep one of the two")
        values[name] = _parse(name, text, kinds[name])
    return values


def recorded_overrides(
    options_class: type, recorded: Mapping[str, OptionValue]
) -> dict[str, OptionValue]:
    """Take over the values that a record holds: they had their types before they were written.

    Raises UnknownName for an option that the recipe has no longer.
    """
    kinds = _kinds(options_class)
    for name in recorded:
        if name not in kinds:
            raise UnknownName.of("option", name, kinds)
    return dict(recorded)


def _kinds(options_class: type) -> dict[str, tuple[Any, ...]]:
    """Map each option to the simple types, Literals and NoneType that its values may have."""
    hints = typing.get_type_hints(options_class)
    kinds = {}
    for field in dataclasses.fields(options_class):
        hint = hints[field.name]
        union = typing.get_origin(hint) in (typing.Union, types.UnionType)
        alternatives = typing.get_args(hint) if union else (hint,)
        if not all(map(_is_simple, alternatives)):
            raise RecipeError(
                f"option {field.name!r} has the type {hint}",
                hint="declare it as int, float, bool, str, Literal[...], or one of these | None",
            )
        if field.default is dataclasses.MISSING:
            raise RecipeError(
                f"option {field.name!r} has no plain default",
                hint=f"give it one, such as {field.name}: {_type_name(alternatives)} = ...",
            )
        kinds[field.name] = alternatives
    return kinds


def _is_simple(kind: Any) -> bool:
    return kind in (int, float, bool, str, type(None)) or typing.get_origin(kind) is typing.Literal


def _choices(kind: Any) -> tuple[Any, ...]:
    return typing.get_args(kind) if typing.get_origin(kind) is typing.Literal else ()


def _type_name(kinds: Iterable[Any]) -> str:
    names = [
        _NONE if kind is type(None) else " | ".join(map(str, _choices(kind))) or kind.__name__
        for kind in kinds
    ]
    return " | ".join(names)


def _parse(name: str, text: str, kinds: tuple[Any, ...]) -> OptionValue:
    for kind in sorted(kinds, key=lambda kind: kind is str):  # last, since any text is a str
        try:
            return _read(text, kind)
        except ValueError:
            continue
    choices = [str(choice) for kind in kinds for choice in _choices(kind)]
    if choices:
        raise UnknownName.of(f"{name}", text, choices)
    raise UsageError(
        f"option {name!r} is of type {_type_name(kinds)}, and {text!r} is not",
        hint=f"write --set {name}=... with a value of this type",
    )


def _read(text: str, kind: Any) -> OptionValue:
    """Read a text as one simple type; raises ValueError if it is not one."""
    if kind is type(None):
        if text.lower() == _NONE:
            return None
    elif kind is bool:
        if text.lower() in _BOOLS:
            return _BOOLS[text.lower()]
    elif kind is float:
        number = float(text)
        if math.isfinite(number):
            return number
    elif kind in (int, str):
        value: OptionValue = kind(text)
        return value
    else:
        for choice in _choices(kind):
            if str(choice) == text:
                chosen: OptionValue = choice
                return chosen
    raise ValueError(text)


def _notes(source: str, class_name: str) -> dict[str, str]:
    """Find the string literals that stand directly under the fields of a class."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef) and node.name == class_name:
            return {
                field.target.id: " ".join(note.value.value.split())
                for field, note in zip(node.body, node.body[1:], strict=False)
                if isinstance(field, ast.AnnAssign)
                and isinstance(field.target, ast.Name)
                and isinstance(note, ast.Expr)
                and isinstance(note.value, ast.Constant)
                and isinstance(note.value.value, str)
            }
    return {}
