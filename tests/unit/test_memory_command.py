"""`narrowcast memory`: options in, one ledger out, as a table, as JSON, as a directory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from narrowcast.cli import memory
from narrowcast.errors import NarrowcastError, RunDirectoryError, UnknownName
from narrowcast.records.codec import loads
from narrowcast.records.memory import CATEGORIES, MemoryRecord

SMALL = ("--set", "batch_size=16", "--set", "width=32", "--device", "cpu")


def run(*arguments: str) -> Result:
    app = typer.Typer()
    app.callback()(lambda: None)
    memory.register(app)
    result = CliRunner().invoke(app, ["memory", *arguments])
    if isinstance(result.exception, NarrowcastError):
        raise result.exception
    return result


def test_json_on_stdout_is_json_alone_and_sums_to_the_total() -> None:
    """Keys as promised: total_peak_bytes, lines[] of category and bytes, modules[], timeline[]."""
    result = run("tabular", "--precision", "bf16", *SMALL, "--json", "-")

    record = json.loads(result.stdout)
    assert result.exit_code == 0
    assert {line["category"] for line in record["lines"]} == set(CATEGORIES)
    assert sum(line["bytes"] for line in record["lines"]) == record["total_peak_bytes"]
    assert sum(module["bytes"] for module in record["modules"]) == record["total_peak_bytes"]
    assert max(point["bytes"] for point in record["timeline"]) == record["total_peak_bytes"]
    assert len(record["timeline"]) <= 500
    assert record["memtracker_peak_bytes"] == record["total_peak_bytes"]
    assert record["options"]["width"] == 32


def test_a_person_reads_the_categories_the_peak_and_the_break_even() -> None:
    """The table on stdout names the phase of the peak and says from when autocast pays."""
    result = run("tabular", "-p", "bf16", *SMALL)

    assert result.exit_code == 0
    for words in ("autocast casts", "The peak of", "reak-even", "MemTracker"):
        assert words in result.stdout


def test_output_is_a_directory_with_record_and_report_and_overwrites_nothing(
    tmp_path: Path,
) -> None:
    """memory.json reads back as a record; a second run into the same directory is refused."""
    place = tmp_path / "ledger"
    arguments = ("tabular", "-p", "fp32", *SMALL, "--no-cross-check", "--output", str(place))

    run(*arguments)

    record = loads(MemoryRecord, (place / "memory.json").read_text())
    assert record.precision == "fp32"
    assert record.memtracker_peak_bytes is None
    assert "<html" in (place / "report.html").read_text()[:1000]
    before = (place / "memory.json").read_bytes()
    with pytest.raises(RunDirectoryError, match="not an empty directory"):
        run(*arguments)
    assert (place / "memory.json").read_bytes() == before


@pytest.mark.parametrize(
    "arguments",
    [
        ("tabular", "-p", "bf15"),
        ("tabluar", "-p", "bf16"),
        ("tabular", "-p", "bf16", "--set", "widht=3"),
        ("tabular", "-p", "bf16", "--autocast-rules", "coda"),
    ],
)
def test_an_unknown_name_is_an_error_with_the_nearest_match(arguments: tuple[str, ...]) -> None:
    """Precision, recipe, option and rules: one line, exit code 2, and a guess."""
    with pytest.raises(UnknownName, match="unknown") as raised:
        run(*arguments)

    assert raised.value.exit_code == 2
    assert "did you mean" in raised.value.hint


def test_rehearsing_cudas_rules_changes_what_is_held() -> None:
    """CUDA's autocast computes softmax and layer norm in fp32, so a GPT holds more."""
    held = {}
    for rules in ("native", "cuda"):
        result = run(
            "austen", "-p", "bf16", "--set", "batch_size=2", "--set", "context=32",
            "--device", "cpu", "--autocast-rules", rules, "--json", "-",
        )  # fmt: skip
        points = json.loads(result.stdout)["timeline"]
        held[rules] = max(point["categories"].get("activations", 0) for point in points)

    assert held["cuda"] > held["native"]
