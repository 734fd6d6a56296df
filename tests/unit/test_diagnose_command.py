"""`narrowcast diagnose`: a recipe and options in, a verdict, a record and files out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from narrowcast.cli import diagnose
from narrowcast.errors import NarrowcastError, RunDirectoryError, UnknownName, UsageError
from narrowcast.plan_files import read_plan
from narrowcast.records.codec import loads
from narrowcast.records.diagnosis import DiagnosisRecord

# Whole diagnoses: left out of `make check`.
pytestmark = pytest.mark.slow

RECIPES = Path(__file__).parents[1] / "recipes"
T5 = str(RECIPES / "t5_like_overflow.py")
HEALTHY = ("tabular", "--steps", "8", "--set", "width=32", "--set", "batch_size=16")


def run(*arguments: str) -> Result:
    app = typer.Typer()
    app.callback()(lambda: None)
    diagnose.register(app)
    result = CliRunner().invoke(app, ["diagnose", *arguments])
    if isinstance(result.exception, NarrowcastError):
        raise result.exception
    return result


def test_the_overflow_of_t5_is_found_and_its_smallest_set_becomes_a_policy(tmp_path: Path) -> None:
    """What `transformers` keeps in fp32 by hand: the `wo` modules and only those."""
    out = tmp_path / "diagnosis"
    result = run(T5, "-p", "fp16", "--steps", "6", "--minimal-fp32", "-o", str(out), "--json", "-")

    record = loads(DiagnosisRecord, result.stdout)
    wo = {f"encoder.block.{i}.layer.1.DenseReluDense.wo" for i in range(3)}
    assert result.exit_code == 0
    assert record.verdict == "forward overflow"
    assert record.finding.module in wo
    assert record.minimal_fp32 is not None
    assert set(record.minimal_fp32.keep_fp32) == wo
    assert set(read_plan(Path(record.minimal_fp32.policy_file)).policy.keep_fp32) == wo
    assert (out / "report.html").exists()
    assert loads(DiagnosisRecord, (out / "diagnosis.json").read_text()) == record


def test_a_smallest_set_is_written_where_no_place_was_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Into a new directory under runs/; a second one does not overwrite the first."""
    monkeypatch.chdir(tmp_path)
    found = [
        json.loads(
            run(T5, "-p", "fp16", "--steps", "4", "--set", "depth=1", "--minimal-fp32", "--json",
                "-").stdout
        )["minimal_fp32"]["policy_file"]
        for _ in range(2)
    ]  # fmt: skip

    assert found[0] != found[1]
    assert all(Path(file).is_file() for file in found)
    assert found[0] == "runs/t5_like_overflow-fp16-diagnosis/policy.json"


def test_a_healthy_training_ends_with_exit_code_0_and_the_word_fine() -> None:
    """The verdict decides no exit code."""
    result = run(*HEALTHY, "--precision", "bf16")

    assert result.exit_code == 0
    assert "fine" in result.stdout


@pytest.mark.parametrize(
    "extra",
    [
        ("--seed", "1"),
        ("--device", "cpu"),
        ("--autocast-rules", "cuda"),
        ("--keep-fp32", "*norm*", "--set", "width=16"),
    ],
)
def test_every_option_reaches_the_record(extra: tuple[str, ...]) -> None:
    """Accepted, and carried out."""
    if "--keep-fp32" in extra:
        arguments = (T5, "--steps", "3", "--keep-fp32", "*.wo")
        kept = json.loads(run(*arguments, "-p", "fp16", "--json", "-").stdout)
        assert kept["plan"]["policy"]["keep_fp32"] == ["*.wo"]
        assert kept["verdict"] == "fine"
        return
    record = json.loads(run(*HEALTHY, *extra, "-p", "bf16", "--json", "-").stdout)

    assert record["steps"] == 8
    assert record["options"]["width"] == 32
    assert record["seed"] == (1 if "--seed" in extra else 0)
    rules = record["plan"]["policy"]["autocast_rules"]
    assert rules == ("cuda" if "--autocast-rules" in extra else "native")


def test_without_steps_the_recipes_own_are_taken_and_the_cap_is_told() -> None:
    """100 of them at most."""
    arguments = ("tabular", "--set", "width=16", "--set", "batch_size=8", "-p", "fp32")
    record = json.loads(run(*arguments, "--set", "steps=400", "--json", "-").stdout)

    assert record["steps"] == 100
    assert any("100 of the 400 steps" in note for note in record["notes"])


def test_bad_requests_get_one_clear_error(tmp_path: Path) -> None:
    """Before any step is taken."""
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()

    with pytest.raises(UnknownName, match="fp17"):
        run("tabular", "-p", "fp17")
    with pytest.raises(UsageError, match="no recipe file"):
        run("nothing.py", "-p", "fp16")
    with pytest.raises(UsageError, match="steps is 0"):
        run("tabular", "-p", "fp16", "--steps", "0")
    with pytest.raises(RunDirectoryError, match="not an empty directory"):
        run("tabular", "-p", "fp16", "-o", str(tmp_path / "full"))
