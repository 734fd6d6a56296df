"""`narrowcast report` finds the record behind whatever it is pointed at, or says what is wrong."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from narrowcast.cli import report as verb
from narrowcast.errors import NarrowcastError, RunDirectoryError
from narrowcast.records.comparison import ComparisonRecord
from narrowcast.records.memory import MemoryRecord
from narrowcast.records.run import RunRecord
from narrowcast.report.sources import read_source
from report_records import GOLDEN


@pytest.fixture
def run_directory(tmp_path: Path) -> Path:
    home = tmp_path / "run"
    home.mkdir()
    shutil.copy(GOLDEN / "run.json", home)
    shutil.copy(GOLDEN / "metrics.jsonl", home)
    return home


@pytest.fixture
def comparison_directory(tmp_path: Path) -> Path:
    home = tmp_path / "comparison"
    home.mkdir()
    shutil.copy(GOLDEN / "comparison.json", home)
    return home


def test_a_run_directory_is_a_run_with_its_steps(run_directory: Path) -> None:
    """Evaluations in metrics.jsonl are not steps."""
    found = read_source(run_directory)

    assert isinstance(found.record, RunRecord)
    assert len(found.points) == 400
    assert found.report_path == run_directory / "report.html"


def test_a_run_that_is_being_written_can_be_read(run_directory: Path) -> None:
    """The last line may be half there; a run may not have a first one yet."""
    with (run_directory / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "step", "st')
    assert len(read_source(run_directory).points) == 400

    (run_directory / "metrics.jsonl").unlink()
    assert read_source(run_directory).points == ()


def test_a_comparison_directory_is_a_comparison(comparison_directory: Path) -> None:
    """Its report stands beside its record."""
    found = read_source(comparison_directory)

    assert isinstance(found.record, ComparisonRecord)
    assert found.report_path == comparison_directory / "report.html"


def test_a_ledger_in_a_directory_is_found(tmp_path: Path) -> None:
    """`narrowcast memory --output DIR` leaves memory.json there."""
    shutil.copy(GOLDEN / "memory.json", tmp_path)

    found = read_source(tmp_path)

    assert isinstance(found.record, MemoryRecord)
    assert found.report_path == tmp_path / "report.html"


@pytest.mark.parametrize(
    ("name", "kind"),
    [("memory", MemoryRecord), ("comparison", ComparisonRecord), ("run", RunRecord)],
)
def test_a_json_file_is_known_by_what_it_holds(name: str, kind: type, tmp_path: Path) -> None:
    """Whatever its name: `--json mine.json` gives mine.html."""
    shutil.copy(GOLDEN / f"{name}.json", tmp_path / "mine.json")

    found = read_source(tmp_path / "mine.json")

    assert isinstance(found.record, kind)
    assert found.report_path == tmp_path / "mine.html"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "invalid JSON"),
        (b"[" * 100_000, "not a record"),
        (b'{"protocol": 1' + b"0" * 5000 + b"}", "not a record"),
        (b"[1, 2]", "is not a record"),
        (b'{"a": 1}', "is not a record"),
        (b"\xff\xfe", "is not text"),
        (b'{"total_peak_bytes": 1}', "missing fields"),
    ],
)
def test_what_is_not_a_record_is_one_clear_error(
    content: bytes, message: str, tmp_path: Path
) -> None:
    """The error names the file and what is wrong with it."""
    (tmp_path / "odd.json").write_bytes(content)

    with pytest.raises(NarrowcastError, match=message) as caught:
        read_source(tmp_path / "odd.json")

    assert "odd.json" in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(schema=99), "has schema 99, and this version of narrowcast reads"),
        (lambda d: d.update(arms=[]), r"the arms are \[\]"),
        (lambda d: d["arms"].pop(), "and the protocol has"),
        (lambda d: d["verdicts"][0].update(verdict="GREAT"), "expected one of 'NON-INFERIOR'"),
        (lambda d: d["arms"][0].update(peak_bytes=10**400), "a double"),
        (lambda d: d["arms"][0].update(step_seconds=10**400), "a double"),
        (lambda d: d["arms"][1].update(final_losses=[1.0]), r"5 seeds, and \[1, 5\] values"),
        (lambda d: d["arms"][1]["metrics"].update(loss=[1.0]), r"5 seeds, and \[1, 5\] values"),
    ],
)
def test_an_edited_comparison_is_one_clear_error(
    change: Callable[[dict[str, Any]], object], message: str, tmp_path: Path
) -> None:
    """Whatever does not fit the rest is named with its file, before anything is drawn."""
    data = json.loads((GOLDEN / "comparison.json").read_text())
    change(data)
    (tmp_path / "odd.json").write_text(json.dumps(data))

    with pytest.raises(NarrowcastError, match=message) as caught:
        read_source(tmp_path / "odd.json")

    assert "odd.json" in caught.value.message
    assert caught.value.hint


def test_a_missing_place_and_an_empty_directory_are_errors(tmp_path: Path) -> None:
    """Neither is created nor guessed."""
    with pytest.raises(RunDirectoryError, match="No such file"):
        read_source(tmp_path / "nowhere")
    with pytest.raises(RunDirectoryError, match="holds no run, comparison"):
        read_source(tmp_path)


def test_a_comparison_that_has_not_ended_says_how_to_go_on(tmp_path: Path) -> None:
    """protocol.json without comparison.json is a comparison under way."""
    (tmp_path / "protocol.json").write_text("{}")

    with pytest.raises(RunDirectoryError, match="has not ended") as caught:
        read_source(tmp_path)

    assert "narrowcast compare" in caught.value.hint


@pytest.fixture
def app() -> typer.Typer:
    made = typer.Typer()
    verb.register(made)
    return made


def test_the_verb_prints_and_writes_the_report(app: typer.Typer, run_directory: Path) -> None:
    """The terminal view goes to stdout, the page beside the run, its path to stderr."""
    result = CliRunner().invoke(app, [str(run_directory)])

    assert result.exit_code == 0, result.output
    assert "fashion in fp16: finished" in result.stdout
    assert "report.html" in result.stderr
    assert (run_directory / "report.html").stat().st_size > 1_000_000


def test_with_json_on_stdout_nothing_else_is_there(
    app: typer.Typer, comparison_directory: Path, tmp_path: Path
) -> None:
    """`--json -` can be piped into jq; the record is unchanged by being read."""
    target = tmp_path / "elsewhere.html"

    result = CliRunner().invoke(
        app, [str(comparison_directory), "--json", "-", "--output", str(target)]
    )

    assert result.exit_code == 0, result.output
    written = json.loads(result.stdout)
    original = json.loads((GOLDEN / "comparison.json").read_text())
    assert {**written, "schema": 0} == {**written, **original, "schema": 0}
    assert target.exists()
    assert not (comparison_directory / "report.html").exists()


def test_the_verb_is_importable_without_torch_plotly_or_jinja() -> None:
    """`narrowcast --help` waits for none of them."""
    import subprocess

    code = (
        "import sys, narrowcast.cli.report\n"
        "print([m for m in ('torch', 'plotly', 'jinja2') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert out.stdout.strip() == "[]"
