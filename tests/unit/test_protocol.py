"""What is fixed before the first step stays fixed, and a change is noticed."""

from __future__ import annotations

import json
import tempfile
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from comparisons import protocol
from narrowcast.comparison.protocol import (
    PROTOCOL_FILE,
    derive_seeds,
    parse_margin,
    protocol_hash,
    read_protocol,
    write_down,
)
from narrowcast.errors import ProtocolError, RunDirectoryError, UsageError
from narrowcast.records.comparison import Protocol


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, (None, "absolute")),
        ("0.01", (0.01, "absolute")),
        (" 2e-3 ", (0.002, "absolute")),
        ("1%", (0.01, "relative")),
        (" 0.5 % ", (0.005, "relative")),
    ],
)
def test_a_margin_is_absolute_or_a_percentage(
    text: str | None, expected: tuple[float | None, str]
) -> None:
    """A number is in units of the metric, one with % is relative to the reference's mean."""
    assert parse_margin(text) == expected


@pytest.mark.parametrize("text", ["", "0", "-0.1", "nan", "inf", "1e999", "a lot", "%", "1%%"])
def test_anything_else_is_no_margin(text: str) -> None:
    """Zero, negative and unreadable margins are refused with an example of a good one."""
    with pytest.raises(UsageError, match="is not a margin") as caught:
        parse_margin(text)

    assert "0.01" in caught.value.hint


def test_seeds_follow_from_the_recipe_alone() -> None:
    """The same recipe has the same seeds, more of them begin with the same, others differ."""
    five, ten = derive_seeds("fashion", 5), derive_seeds("fashion", 10)

    assert ten[:5] == five
    assert len(set(ten)) == 10
    assert not set(five) & set(derive_seeds("austen", 5))
    assert all(0 <= seed < 2**31 for seed in ten)


def test_seeds_never_change_between_versions() -> None:
    """A comparison that is begun with one version goes on with the next one."""
    assert derive_seeds("fashion", 2) == (931882881, 732944440)


def test_no_seeds_make_no_comparison() -> None:
    """A count below 1 is a usage error."""
    with pytest.raises(UsageError, match="0 seeds"):
        derive_seeds("fashion", 0)


def test_the_hash_covers_every_field() -> None:
    """Changing any field changes the hash, but for the hash itself and the time of writing."""
    base = protocol(3)
    other = {
        "direction": "higher", "margin": 2.0, "margin_kind": "relative", "steps": 11,
        "seeds": (1,), "arms": ("fp32", "fp16"), "options": {"lr": 1}, "confidence": 0.9,
        "plans": {"fp32": {}}, "training": {"batch_size": 2},
    }  # fmt: skip
    covered = {
        f.name
        for f in fields(Protocol)
        if protocol_hash(replace(base, **{f.name: other.get(f.name, "other")}))
        != protocol_hash(base)
    }

    assert covered == {f.name for f in fields(Protocol)} - {"hash", "written"}


def test_a_protocol_is_written_once_and_recognised(tmp_path: Path) -> None:
    """The second request with the same content gets what was written the first time."""
    first = write_down(tmp_path, protocol(3), now="monday")
    second = write_down(tmp_path, protocol(3), now="tuesday")

    assert second == first == read_protocol(tmp_path)
    assert first.written == "monday"
    assert first.hash == protocol_hash(protocol(3))


@given(name=st.sampled_from([f.name for f in fields(Protocol) if f.name != "written"]))
def test_an_edited_protocol_is_noticed(name: str) -> None:
    """Whatever field is changed in the file, reading it is a ProtocolError."""
    with tempfile.TemporaryDirectory() as directory:
        write_down(Path(directory), protocol(3), now="monday")
        path = Path(directory) / PROTOCOL_FILE
        data = json.loads(path.read_text())
        data[name] = _changed(name, data[name])
        path.write_text(json.dumps(data))

        with pytest.raises(ProtocolError, match="was edited"):
            read_protocol(Path(directory))


def _changed(name: str, value: Any) -> Any:
    """Another value of the same JSON type, so that it is the hash that notices."""
    choices = {"direction": "higher", "margin_kind": "relative", "plans": {"fp32": {}}}
    if name in choices:
        return choices[name]
    if isinstance(value, dict):
        return {"added": 1}
    if isinstance(value, list):
        return [*value, value[0]]
    return f"{value}x" if isinstance(value, str) else value + 1


def test_another_protocol_in_the_directory_is_an_error_that_names_what_differs(
    tmp_path: Path,
) -> None:
    """A margin cannot be changed once the runs have begun."""
    write_down(tmp_path, protocol(3), now="monday")

    with pytest.raises(RunDirectoryError, match=r"margin is 1\.0 there, 2\.0 asked") as caught:
        write_down(tmp_path, protocol(3, margin=2.0), now="tuesday")
    assert "--output" in caught.value.hint


def test_a_directory_with_something_else_is_left_alone(tmp_path: Path) -> None:
    """Nothing is written beside files that are no comparison."""
    (tmp_path / "thesis.tex").write_text("years of work")

    with pytest.raises(RunDirectoryError, match=r"thesis\.tex"):
        write_down(tmp_path, protocol(3), now="monday")
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_runs_without_their_protocol_are_not_adopted(tmp_path: Path) -> None:
    """Deleting protocol.json does not make the runs free for another margin."""
    write_down(tmp_path, protocol(3), now="monday")
    (tmp_path / "arms").mkdir()
    (tmp_path / PROTOCOL_FILE).unlink()

    with pytest.raises(RunDirectoryError, match="arms"):
        write_down(tmp_path, protocol(3, margin=2.0), now="tuesday")


def test_reading_where_there_is_none_says_so(tmp_path: Path) -> None:
    """A missing protocol.json is a RunDirectoryError, not a traceback."""
    with pytest.raises(RunDirectoryError, match="holds no comparison"):
        read_protocol(tmp_path)
