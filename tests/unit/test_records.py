"""Records survive the way to JSON and back, with values that are not the defaults."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from narrowcast.errors import NarrowcastError
from narrowcast.records.codec import digest, dumps, from_json, loads, to_json
from narrowcast.records.comparison import Protocol, VerdictRecord
from narrowcast.records.memory import BreakEven, MemoryLine, MemoryRecord
from narrowcast.records.run import Environment, Evaluation, RunRecord, SkippedStep, StepPoint

RECORDS = (StepPoint, Evaluation, SkippedStep, MemoryRecord, Protocol, VerdictRecord)


@given(st.one_of(*(st.from_type(kind) for kind in RECORDS)))
def test_any_record_comes_back_equal(record: object) -> None:
    """load(dump(x)) == x for every field, NaN and infinities included."""
    back = loads(type(record), dumps(record))

    assert to_json(back) == to_json(record)
    assert digest(back) == digest(record)


def test_numbers_that_json_lacks_are_written_as_words() -> None:
    """The text is JSON for every reader, and NaN comes back as NaN."""
    point = Evaluation(
        step=1, precision="fp32", metrics={"a": math.nan, "b": -math.inf}, examples=3
    )

    text = dumps(point)
    back = loads(Evaluation, text)

    assert json.loads(text)["metrics"] == {"a": "NaN", "b": "-Infinity"}
    assert math.isnan(back.metrics["a"])
    assert back.metrics["b"] == -math.inf


def test_an_unknown_field_is_an_error_that_names_it() -> None:
    """A file of another version is refused, never half-read."""
    with pytest.raises(NarrowcastError, match="colour"):
        from_json(MemoryLine, {"category": "inputs", "bytes": 3, "colour": "red"})


def test_a_field_of_the_wrong_type_names_its_place() -> None:
    """The message says where in the document the value stands."""
    with pytest.raises(NarrowcastError, match=r"MemoryLine\.bytes"):
        from_json(MemoryLine, {"category": "inputs", "bytes": "many"})


def test_truncated_json_is_one_clear_error() -> None:
    """A half-written file is named as such."""
    with pytest.raises(NarrowcastError, match="invalid JSON"):
        loads(MemoryLine, '{"category": "inp')


def test_nested_records_keep_their_types() -> None:
    """A run record carries its ledger and environment as records, not as dicts."""
    environment = Environment(
        device="cpu",
        device_name="x",
        threads=2,
        platform="p",
        python="3",
        torch="2",
        narrowcast="0",
    )
    memory = MemoryRecord(
        recipe="r", precision="bf16", device="cpu", batch_size=8, total_peak_bytes=7,
        peak_phase="backward", peak_module="", lines=(MemoryLine(category="inputs", bytes=7),),
        modules=(), timeline=(), options={"a": 1, "b": None, "c": True, "d": 0.5},
        break_even=BreakEven(batch_size=3.5, cast_bytes=2, saved_bytes_per_sample=1.0, why="w"),
    )  # fmt: skip
    record = RunRecord(
        recipe="r", options={"a": "x"}, precision="bf16", plan={"name": "bf16"}, seed=1,
        planned_steps=2, batch_size=8, environment=environment, started="now", memory=memory,
        skipped=(
            SkippedStep(step=1, reason="gradient overflow", loss_scale=2.0, parameters=("w",)),
        ),
    )  # fmt: skip

    assert loads(RunRecord, dumps(record)) == record
