"""Records to JSON and back, from the fields themselves.

Nothing is listed by hand: a field that is added to a record is saved and loaded without a second
change, and one that is unknown or missing is an error that names it. NaN and infinities, which
JSON does not have, are written as the strings "NaN", "Infinity" and "-Infinity".
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import types
import typing
from typing import Any, TypeVar

from narrowcast.errors import NarrowcastError

__all__ = ["RecordError", "digest", "dumps", "from_json", "loads", "parse", "to_json"]

R = TypeVar("R")

# What any reader can compute with; Python's own integers have no end.
_TOO_LARGE = 2**1023

_SPECIAL = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class RecordError(NarrowcastError):
    """A JSON document is not the record it is read as."""


def to_json(value: Any) -> Any:
    """Turn a record (or any nest of records, tuples and dicts) into plain JSON values."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def from_json(kind: type[R], data: Any) -> R:
    """Build a record of type `kind` from plain JSON values.

    Raises RecordError, naming the field, for a missing or unknown one.
    """
    return typing.cast("R", _read(kind, data, kind.__name__))


def dumps(record: Any, *, indent: int | None = 2) -> str:
    """Write a record as JSON text that every JSON reader accepts."""
    return json.dumps(to_json(record), indent=indent, allow_nan=False)


def loads(kind: type[R], text: str) -> R:
    """Read a record from JSON text; raises RecordError if it is not one."""
    return from_json(kind, parse(text, kind.__name__))


def parse(text: str, what: str) -> Any:
    """Read JSON text; raises RecordError, which calls it not a `what`, if it is none."""
    hint = "the file is truncated or was edited"
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        message = f"not a {what}: invalid JSON at line {error.lineno} ({error.msg})"
        raise RecordError(message, hint=hint) from None
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits; a thousand brackets
        raise RecordError(f"not a {what}: {error}", hint=hint) from None


def digest(record: Any) -> str:
    """Return the SHA-256 (hex) of a record's canonical JSON: sorted keys, no white space."""
    text = json.dumps(to_json(record), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _read(kind: Any, data: Any, where: str) -> Any:
    origin = typing.get_origin(kind)
    if dataclasses.is_dataclass(kind):
        return _read_record(kind, data, where)
    if origin in (typing.Union, types.UnionType):
        return _read_optional(kind, data, where)
    if origin in (tuple, list):
        return _read_sequence(kind, data, where)
    if origin is dict:
        _expect(isinstance(data, dict), where, "an object", data)
        value_kind = typing.get_args(kind)[1]
        return {key: _read(value_kind, item, f"{where}[{key!r}]") for key, item in data.items()}
    if origin is typing.Literal:
        choices = typing.get_args(kind)
        _expect(data in choices, where, f"one of {', '.join(map(repr, choices))}", data)
    if kind in (int, float) and type(data) is int:
        _expect(abs(data) < _TOO_LARGE, where, "a number that a double holds", "one of many digits")
    if kind is float:
        return _read_float(data, where)
    if kind in (int, str, bool):
        _expect(
            isinstance(data, kind) and (kind is bool or type(data) is not bool), where, kind, data
        )
    return data


def _read_record(kind: Any, data: Any, where: str) -> Any:
    _expect(isinstance(data, dict), where, "an object", data)
    fields = {f.name: f for f in dataclasses.fields(kind)}
    if "schema" in fields and "schema" in data:
        _expect_schema(where, data["schema"], fields["schema"].default)
    unknown = sorted(set(data) - set(fields))
    missing = sorted(
        name
        for name, f in fields.items()
        if name not in data
        and f.default is dataclasses.MISSING
        and f.default_factory is dataclasses.MISSING
    )
    if unknown or missing:
        raise RecordError(
            f"{where}: unknown fields {unknown}, missing fields {missing}",
            hint="the file was written by another version of narrowcast, or was edited",
        )
    hints = typing.get_type_hints(kind)
    return kind(**{k: _read(hints[k], v, f"{where}.{k}") for k, v in data.items()})


def _expect_schema(where: str, found: Any, readable: Any) -> None:
    """Raise RecordError for a record whose keys have another meaning."""
    if found != readable:
        raise RecordError(
            f"{where} has schema {found!r:.80}, and this version of narrowcast reads schema "
            f"{readable}",
            hint="read it with the version of narrowcast that wrote it",
        )


def _read_optional(kind: Any, data: Any, where: str) -> Any:
    choices = typing.get_args(kind)
    if data is None and type(None) in choices:
        return None
    errors = []
    for choice in choices:
        if choice is not type(None):
            try:
                return _read(choice, data, where)
            except RecordError as error:
                errors.append(error)
    raise errors[0]


def _read_sequence(kind: Any, data: Any, where: str) -> Any:
    _expect(isinstance(data, list), where, "a list", data)
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is tuple and args[-1] is not Ellipsis:
        _expect(len(data) == len(args), where, f"{len(args)} items", data)
        return tuple(
            _read(a, item, f"{where}[{i}]")
            for i, (a, item) in enumerate(zip(args, data, strict=True))
        )
    return origin(_read(args[0], item, f"{where}[{i}]") for i, item in enumerate(data))


def _read_float(data: Any, where: str) -> float:
    if isinstance(data, str) and data in _SPECIAL:
        return _SPECIAL[data]
    _expect(isinstance(data, (int, float)) and not isinstance(data, bool), where, "a number", data)
    return float(data)


def _expect(condition: object, where: str, expected: object, data: Any) -> None:
    if not condition:
        raise RecordError(
            f"{where}: expected {expected}, got {data!r:.80}",
            hint="the file was written by another version of narrowcast, or was edited",
        )
