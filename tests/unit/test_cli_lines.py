"""Lines are folded for a reader at a terminal; what goes into a pipe or a file keeps its lines."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from narrowcast.cli.app import app
from narrowcast.cli.common import console, result_console
from narrowcast.report.outline import outline_of
from narrowcast.report.shapes import Prose, Verdicts
from report_records import KINDS, golden

ROOT = Path(__file__).parents[2]
LONG = "a-directory-whose-name-goes-on-and-on-past-the-edge-of-a-usual-terminal"


class Terminal(io.StringIO):
    """A stream that says of itself that somebody looks at it."""

    def isatty(self) -> bool:
        return True


def test_a_finding_in_a_long_path_is_one_line(tmp_path: Path) -> None:
    """Whoever searches the output for a rule and its file finds both, whatever COLUMNS says."""
    place = tmp_path / LONG / LONG
    place.mkdir(parents=True)
    script = place / "tutorial_cuda_amp.py"
    script.write_text((ROOT / "tests" / "scripts" / script.name).read_text())

    result = CliRunner().invoke(app, ["check", str(script)], env={"COLUMNS": "40"})

    assert result.exit_code == 0
    found = [line for line in result.stdout.splitlines() if "NC209 deprecated-amp" in line]
    assert re.fullmatch(rf"{re.escape(str(script))}:\d+  notice  NC209 deprecated-amp", found[0])


@pytest.mark.slow
@pytest.mark.parametrize("words", [["--version"], ["recipes"]])
def test_output_without_a_reader_ends_as_sigpipe_does(words: list[str]) -> None:
    """As `narrowcast ... | head`: in silence, and with the 141 that README gives."""
    reading, writing = os.pipe()
    os.close(reading)

    ended = subprocess.run(
        [sys.executable, "-m", "narrowcast", *words],
        stdout=writing, stderr=subprocess.PIPE, timeout=120, check=False,
    )  # fmt: skip
    os.close(writing)

    assert (ended.returncode, ended.stderr) == (141, b"")


@pytest.mark.parametrize("name", KINDS)
def test_the_sentences_of_a_report_are_whole(name: str, tmp_path: Path) -> None:
    """Each paragraph and each verdict's reason stands in one line of a piped report."""
    path = ROOT / "tests" / "golden" / f"{name}.json"
    target = tmp_path / "report.html"

    result = CliRunner().invoke(app, ["report", str(path), "--output", str(target)])

    assert result.exit_code == 0, result.stderr
    blocks = [b for section in outline_of(golden(name)).sections for b in section.blocks]
    sentences = [line for b in blocks if isinstance(b, Prose) for line in b.lines]
    sentences += [v.why for b in blocks if isinstance(b, Verdicts) for v in b.verdicts]
    assert sentences
    assert [s for s in sentences if s not in result.stdout] == []


def test_a_terminal_folds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where somebody looks, lines end at the edge."""
    monkeypatch.setattr(sys, "stdout", Terminal())
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("COLUMNS", "40")

    assert result_console(None).width == result_console("-").width == console().width == 40


def test_stdout_and_stderr_are_asked_each_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """`narrowcast ... | less` folds notes on the terminal, and no line of the result."""
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("COLUMNS", "40")

    assert console().width == 40
    assert result_console(None).width > 10_000


def test_no_verb_makes_a_console_of_its_own() -> None:
    """All get theirs from `cli.common`, which knows when to fold; one that says nothing is free."""
    made = {
        path.name: re.findall(r"\bConsole\((?!quiet=True\))", path.read_text())
        for path in (ROOT / "src" / "narrowcast" / "cli").glob("*.py")
        if path.name != "common.py"
    }

    assert {name for name, calls in made.items() if calls} == set()
    assert isinstance(console(), Console)
