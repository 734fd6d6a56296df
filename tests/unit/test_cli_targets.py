"""What the command line does with files and streams that a user names, and with Ctrl-C."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from narrowcast.cli.json_target import is_record
from narrowcast.errors import UsageError
from narrowcast.policy import POLICIES

# Whole trainings or traces: left out of `make check`.
pytestmark = pytest.mark.slow

TESTS = Path(__file__).parents[1]
GOLDEN_RUN = next(TESTS.glob("golden/**/run.json"))

CHATTY = """
import os
from small_recipe import *

print("from python", flush=True)
os.system("echo from a child process")
"""

# An import that Ctrl-C breaks off half-way, as torch's does: what arrives is an AttributeError.
BROKEN_IMPORT = """
import os, signal
try:
    os.kill(os.getpid(), signal.SIGINT)
    import time; time.sleep(5)
except BaseException:
    pass
raise AttributeError("partially initialized module 'sympy'")
"""

INTERRUPTED = """
import os, signal, time
os.kill(os.getpid(), signal.SIGINT)
time.sleep(5)
"""


def narrowcast(*words: object, cwd: Path, code: str = "") -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own, with descriptors of its own."""
    start = f"{code}\nfrom narrowcast.cli.app import main; main()"
    return subprocess.run(
        [sys.executable, "-c", start, *map(str, words)],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def run_json(tmp_path: Path) -> Path:
    """A run's record in a folder of its own."""
    (tmp_path / "run").mkdir()
    return Path(shutil.copy(GOLDEN_RUN, tmp_path / "run"))


@pytest.mark.parametrize("option", ["--output", "--json"])
def test_a_recipe_is_not_overwritten(tmp_path: Path, run_json: Path, option: str) -> None:
    """Exit code 6, with the file as it was."""
    victim = tmp_path / "tiny.py"
    victim.write_text("precious = 1")

    said = narrowcast("report", run_json.parent, option, victim, cwd=tmp_path)

    assert (said.returncode, victim.read_text()) == (6, "precious = 1")
    assert "hint: choose another file" in said.stderr


def test_our_own_report_and_record_are_replaced(tmp_path: Path, run_json: Path) -> None:
    """The same command works twice."""
    words = ("report", run_json.parent, "--output", "r.html", "--json", "r.json")
    codes = [narrowcast(*words, cwd=tmp_path).returncode for _ in range(2)]

    assert codes == [0, 0]
    assert is_record((tmp_path / "r.json").read_bytes())


def test_a_report_can_go_to_a_device(tmp_path: Path, run_json: Path) -> None:
    """/dev/null is still a device afterwards."""
    said = narrowcast("report", run_json.parent, "--output", "/dev/null", cwd=tmp_path)

    assert said.returncode == 0
    assert Path("/dev/null").is_char_device()


@pytest.mark.parametrize("target", ["absent/x.json", ".", "mine.json"])
def test_a_bad_json_target_is_found_before_the_work(tmp_path: Path, target: str) -> None:
    """Nothing was trained, and no folder was made."""
    (tmp_path / "mine.json").write_text('{"precious": 1}')
    recipe = TESTS / "small_recipe.py"

    said = narrowcast("train", recipe, "--output", "here", "--json", target, cwd=tmp_path)

    assert said.returncode == 6
    assert [p.name for p in tmp_path.iterdir()] == ["mine.json"]


@pytest.mark.parametrize(
    ("name", "beside"), [("run.json", "metrics.jsonl"), ("comparison.json", "protocol.json")]
)
def test_the_record_that_a_directory_keeps_of_itself_is_left(
    tmp_path: Path, run_json: Path, name: str, beside: str
) -> None:
    """It is ours, and not to be replaced by another one, through a link neither."""
    place = tmp_path / "other"
    place.mkdir()
    (place / name).write_bytes(run_json.read_bytes())
    (place / beside).write_text("")
    (tmp_path / "link.json").symlink_to(place / name)
    before = (place / name).read_bytes()

    for target in (place / name, "link.json"):
        said = narrowcast("report", run_json, "--json", target, cwd=tmp_path)

        assert said.returncode == 6
        assert "keeps of itself" in said.stderr
    assert (place / name).read_bytes() == before


def test_what_a_recipe_prints_stays_away_from_the_json(tmp_path: Path) -> None:
    """Python's own output and that of other processes goes to stderr."""
    (tmp_path / "chatty.py").write_text(CHATTY)
    path = f"import sys; sys.path.insert(0, {str(TESTS)!r})"

    said = narrowcast(
        "train", "chatty.py", "-p", "fp32", "--steps", 2, "--json", "-", cwd=tmp_path, code=path
    )

    assert json.loads(said.stdout)["completed_steps"] == 2
    assert "from python" in said.stderr
    assert "from a child process" in said.stderr


def test_a_failure_leaves_stdout_empty(tmp_path: Path) -> None:
    """A reader of the JSON sees nothing, and the exit code says why."""
    (tmp_path / "broken.py").write_text("print('working'); raise ValueError('no')")

    said = narrowcast("train", "broken.py", "--json", "-", cwd=tmp_path)

    assert (said.returncode, said.stdout) == (4, "")


@pytest.mark.parametrize("source", [BROKEN_IMPORT, INTERRUPTED])
def test_ctrl_c_during_an_import_is_one_word_and_130(tmp_path: Path, source: str) -> None:
    """Whatever the import makes of it, there is no traceback."""
    (tmp_path / "torch.py").write_text(source)

    said = narrowcast("doctor", cwd=tmp_path)

    assert (said.returncode, said.stdout, said.stderr) == (130, "", "stopped\n")


def test_a_record_is_known_by_its_keys() -> None:
    """One that lacks a key of ours, or is no object, is the user's."""
    whole = json.loads(GOLDEN_RUN.read_text())
    lacking = {k: v for k, v in whole.items() if k != "planned_steps"}

    assert is_record(json.dumps(whole).encode())
    assert not is_record(json.dumps(lacking).encode())
    assert not is_record(b"[1]")
    assert not is_record(b"\xff")


@pytest.mark.parametrize("entry", ["", " ", 3, len])
def test_what_names_no_module_cannot_be_kept_in_fp32(entry: object) -> None:
    """An empty glob, a number and a function are errors of the request."""
    with pytest.raises(UsageError, match="names no module"):
        POLICIES["bf16"].keeping_fp32(entry)  # type: ignore[arg-type]
