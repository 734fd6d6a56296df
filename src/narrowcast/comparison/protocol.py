"""What a comparison fixes before its first step, and how a later change to it is noticed.

A margin that is chosen after the results, a metric that happens to look good, seeds that turned
out well: each of them makes any verdict possible. So all of it is written to ``protocol.json`` and
hashed before the first step, the seeds are derived and not chosen, and a directory goes on only
with the protocol it began with.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import fields, replace
from pathlib import Path

from narrowcast.errors import ProtocolError, RunDirectoryError, UsageError
from narrowcast.files import write_atomically
from narrowcast.records.codec import RecordError, digest, dumps, loads, to_json
from narrowcast.records.comparison import MarginKind, Protocol

__all__ = [
    "PROTOCOL_FILE",
    "derive_seeds",
    "parse_margin",
    "protocol_hash",
    "read_protocol",
    "refuse_anything_else",
    "write_down",
]

PROTOCOL_FILE = "protocol.json"

# What else may lie in the directory of a comparison that has not begun.
_HARMLESS = {".lock"}


def parse_margin(text: str | None) -> tuple[float | None, MarginKind]:
    """Read '0.01' (units of the metric) or '1%' (of the reference's mean); None stays None.

    Raises UsageError for anything that is not a positive number.
    """
    if text is None:
        return None, "absolute"
    number = text.strip().removesuffix("%")
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise UsageError(
            f"{text!r} is not a margin",
            hint="the largest acceptable harm: 0.01 (in the metric's units) or 1% (of fp32's mean)",
        )
    return (value, "absolute") if number == text.strip() else (value / 100, "relative")


def derive_seeds(recipe: str, count: int) -> tuple[int, ...]:
    """Return `count` seeds that follow from the recipe's name alone.

    Neither margin nor metric nor their number enters, so that no detail of the request can be
    varied until the seeds suit; asking for more seeds keeps the first ones.
    Raises UsageError for a count below 1.
    """
    if count < 1:
        raise UsageError(
            f"{count} seeds make no comparison", hint="take at least 3; 1 shows failures only"
        )
    texts = (f"narrowcast compare {recipe} {i}" for i in range(count))
    return tuple(
        int.from_bytes(hashlib.sha256(text.encode()).digest()[:4]) & 0x7FFFFFFF for text in texts
    )


def protocol_hash(protocol: Protocol) -> str:
    """Return the SHA-256 over every field but the hash itself and the time of writing."""
    return digest(replace(protocol, hash="", written=""))


def read_protocol(directory: Path) -> Protocol:
    """Read protocol.json; raises ProtocolError if damaged or not what its hash says."""
    path = directory / PROTOCOL_FILE
    try:
        text = path.read_text()
    except OSError as error:
        raise RunDirectoryError(
            f"{directory} holds no comparison: {path.name} cannot be read ({error.strerror})",
            hint="give the directory of a comparison, such as runs/compare-fashion-1a2b3c4d",
        ) from None
    except ValueError:
        raise _damaged(path, "it is not text") from None
    try:
        protocol = loads(Protocol, text)
    except RecordError as error:
        raise _damaged(path, error.message) from None
    found = protocol_hash(protocol)
    if found != protocol.hash:
        raise ProtocolError(
            f"{path} was edited after it was written down: it says hash {protocol.hash[:12]}, "
            f"and its content has {found[:12]}",
            hint="restore the file, or begin a new comparison with another --output",
        )
    return protocol


def _damaged(path: Path, what: str) -> ProtocolError:
    return ProtocolError(
        f"{path} is not a protocol: {what}",
        hint="restore the file, or begin a new comparison with another --output",
    )


def write_down(directory: Path, wanted: Protocol, *, now: str) -> Protocol:
    """Fix the protocol of this directory, or recognise it as the one that it began with.

    Returns it with its hash and the time when it was first written. Raises ProtocolError if the
    file was edited, RunDirectoryError if the directory holds a comparison under another protocol
    or anything else.
    """
    sealed = replace(wanted, hash=protocol_hash(wanted), written=now)
    if (directory / PROTOCOL_FILE).exists():
        there = read_protocol(directory)
        if there.hash != sealed.hash:
            raise _another_comparison(directory, there, sealed)
        return there
    refuse_anything_else(directory)
    write_atomically(directory / PROTOCOL_FILE, dumps(sealed) + "\n")
    return sealed


def refuse_anything_else(directory: Path) -> None:
    """Raise RunDirectoryError if the directory holds something that is no comparison."""
    if not directory.exists() or (directory / PROTOCOL_FILE).exists():
        return
    if not directory.is_dir():
        raise RunDirectoryError(
            f"{directory} is a file", hint="choose another --output; nothing is overwritten"
        )
    others = sorted(path.name for path in directory.iterdir() if path.name not in _HARMLESS)
    if others:
        raise RunDirectoryError(
            f"{directory} is not empty and holds no comparison: {', '.join(others[:3])}",
            hint="choose another --output; nothing is overwritten",
        )


def _another_comparison(directory: Path, there: Protocol, wanted: Protocol) -> RunDirectoryError:
    """Name the fields that differ, with both values."""
    old, new = to_json(there), to_json(wanted)
    changed = [
        f"{f.name} is {old[f.name]} there, {new[f.name]} asked"
        for f in fields(Protocol)
        if f.name not in ("hash", "written") and old[f.name] != new[f.name]
    ]
    return RunDirectoryError(
        f"{directory} holds a comparison under another protocol: {'; '.join(changed):.400}",
        hint="a protocol is fixed before the first step; begin a new one with another --output",
    )
