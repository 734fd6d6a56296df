"""`check` as a whole: scripts are only read, recipes take one step, and the record says it all."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from narrowcast.cli import check as command
from narrowcast.errors import RecipeError, UnknownName, UsageError
from narrowcast.preflight.catalogue import SOURCE_RULES
from narrowcast.preflight.check import check
from narrowcast.preflight.trace import TRACED_RULES
from narrowcast.records.check import CheckRecord
from narrowcast.records.codec import from_json, to_json
from scripts.marked import fired, marks

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "tests" / "scripts"
TUTORIALS = sorted(SCRIPTS.glob("tutorial_*.py"))


def run(*arguments: str) -> tuple[int, str, str]:
    """Call the verb alone; returns exit code, stdout and stderr."""
    app = typer.Typer()
    command.register(app)
    result = CliRunner().invoke(app, list(arguments))
    return result.exit_code, result.stdout, result.stderr


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda p: p.stem)
def test_the_loop_that_everybody_copies(path: Path) -> None:
    """With torch.amp nothing is found, with torch.cuda.amp the deprecation alone."""
    assert fired(path) == marks(path.read_text())


def test_only_a_deprecation_is_a_clean_result() -> None:
    """The tutorial loop passes: exit code 0, one notice."""
    code, out, _ = run(str(SCRIPTS / "tutorial_cuda_amp.py"))

    assert code == 0
    assert "NC209 deprecated-amp" in out
    assert "0 errors, 0 warnings, 1 notices" in out


def test_a_faulty_loop_fails_with_line_reason_and_fix() -> None:
    """Each finding shows its file, line, code, reason and cure, and the exit code is 1."""
    path = SCRIPTS / "tutorial_faulty.py"
    code, out, _ = run(str(path))

    assert code == 1
    assert f"{path}:" in out
    assert "torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm=0.1)" in out
    assert "still multiplied by the loss scale" in " ".join(out.split())
    assert "fix: call scaler.unscale_(optimizer)" in out


def test_a_script_is_never_run(tmp_path: Path) -> None:
    """Neither its imports nor its lines are executed."""
    path = tmp_path / "script.py"
    path.write_text(f"import no_such_module\nopen({str(tmp_path / 'made')!r}, 'w')\n")

    record = check(path)

    assert not (tmp_path / "made").exists()
    assert (record.is_recipe, record.findings) == (False, ())


def test_json_is_the_record_alone(tmp_path: Path) -> None:
    """`--json` writes what `check` returns, and reads back as the same record."""
    path, target = SCRIPTS / "tutorial_faulty.py", tmp_path / "record.json"
    code, _, _ = run(str(path), "--json", str(target))

    assert code == 1
    record = from_json(CheckRecord, json.loads(target.read_text()))
    assert record == check(path)
    assert from_json(CheckRecord, to_json(record)) == record


@pytest.mark.parametrize(
    ("content", "message"),
    [("def broken(:\n", "line 1"), (b"\xff\xfe\x00", "not text"), ("x = '\x00'", "not Python")],
)
def test_a_file_that_is_not_python_gets_one_clear_error(
    content: str | bytes, message: str, tmp_path: Path
) -> None:
    """The error names the file and the line, and says what is wrong with it."""
    path = tmp_path / "script.py"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())

    with pytest.raises(UsageError, match=message):
        check(path)


def test_a_file_that_is_not_there_gets_one_clear_error(tmp_path: Path) -> None:
    """The error names it."""
    with pytest.raises(UsageError, match="cannot read"):
        check(tmp_path / "nothing.py")


def test_an_unknown_precision_is_refused() -> None:
    """Before anything is read."""
    with pytest.raises(UnknownName):
        check(SCRIPTS / "tutorial_faulty.py", "fp61")


def test_there_are_more_than_twenty_rules_with_names_of_their_own() -> None:
    """Codes and names are unique; each rule has a cure and a source."""
    rules = [*SOURCE_RULES, *TRACED_RULES]

    assert len(rules) >= 20
    assert len({r.code for r in rules}) == len({r.name for r in rules}) == len(rules)
    assert all(r.fix and r.source.startswith("https://") for r in rules)


def test_the_page_lists_every_rule() -> None:
    """docs/check.md has a row for each, with its severity and its source."""
    page = (ROOT / "docs" / "check.md").read_text()
    rows = dict(re.findall(r"^\| (NC\d+) \| (.*)$", page, re.MULTILINE))

    for rule in (*SOURCE_RULES, *TRACED_RULES):
        assert rows[rule.code].startswith(f"{rule.name} | {rule.severity} |"), rule.title
        assert rule.source in rows[rule.code], rule.title
    assert len(rows) == len(SOURCE_RULES) + len(TRACED_RULES)


def test_every_rule_on_the_source_has_a_test_that_fires() -> None:
    """Each code is marked in a script of these tests."""
    tests = "".join(p.read_text() for p in (ROOT / "tests" / "unit").glob("test_preflight_*.py"))

    assert [r.code for r in SOURCE_RULES if f"!{r.code}" not in tests] == []


def test_a_recipe_that_raises_everywhere_is_the_recipes_error(tmp_path: Path) -> None:
    """Only what raises in low precision alone is a finding."""
    source = (ROOT / "tests" / "recipes" / "regression.py").read_text()
    path = tmp_path / "recipe.py"
    path.write_text(
        source.replace("x, y = batch\n    return (", "x, y = batch\n    1 / 0\n    return (")
    )

    with pytest.raises(RecipeError, match="ZeroDivisionError"):
        check(path)
