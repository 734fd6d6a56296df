"""`narrowcast plan`, and `train --plan` and `--budget`: a budget in, a training within it out."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from narrowcast.cli import compare, report, train
from narrowcast.cli import plan as plan_verb
from narrowcast.errors import (
    NarrowcastError,
    RecipeError,
    RunDirectoryError,
    UnknownName,
    UsageError,
)
from narrowcast.plan import Plan, plan_named
from narrowcast.plan_files import read_plan
from narrowcast.planning import speeds
from narrowcast.prediction.gpus import GPUS
from narrowcast.records.codec import from_json, loads, to_json
from narrowcast.records.plan import PlanRecord
from narrowcast.records.run import RunRecord
from narrowcast.units import parse_bytes

SMALL = ("--set", "batch_size=64", "--set", "width=64", "--device", "cpu")
BUDGET = "210KiB"
"""Less than the 238 KiB of plain fp32 training, and more than the least that fits."""
FEW = ("-p", "fp32", "--json", "-")


def run(*arguments: str) -> Result:
    app = typer.Typer()
    app.callback()(lambda: None)
    for verb in (plan_verb, train, report, compare):
        verb.register(app)
    result = CliRunner().invoke(app, arguments)
    if isinstance(result.exception, NarrowcastError):
        raise result.exception
    return result


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plan file for a budget that fp32 does not fit."""
    file = tmp_path_factory.mktemp("plan") / "plan.json"
    result = run("plan", "tabular", "--budget", BUDGET, *SMALL, "--output", str(file))
    assert result.exit_code == 0, result.output
    return file


@pytest.mark.slow
def test_a_plan_fits_and_says_why_and_how_to_run_it(planned: Path) -> None:
    """Keys as promised: budget, chosen plan and reason, frontier, command, code."""
    record = loads(PlanRecord, planned.read_text())

    assert record.budget_bytes == 210 * 1024
    assert record.chosen.predicted_bytes <= record.budget_bytes
    assert record.chosen.measured_bytes is not None
    assert record.chosen.measured_bytes <= record.chosen.predicted_bytes
    assert record.chosen.speed == "measured"
    assert record.why
    assert record.effects
    assert record.command.endswith(f"--plan {planned}")
    assert "--set width=64" in record.command
    assert "narrowcast.Engine" in record.code
    assert from_json(Plan, record.chosen.plan) == read_plan(planned)


@pytest.mark.slow
def test_the_frontier_falls_in_memory_as_it_rises_in_time(planned: Path) -> None:
    """No point of it is beaten, and the smallest is what an impossible budget would name."""
    points = loads(PlanRecord, planned.read_text()).frontier

    sizes = [point.predicted_bytes for point in points]
    seconds = [point.seconds for point in points]
    assert sizes == sorted(set(sizes), reverse=True)
    assert seconds == sorted(seconds)


@pytest.mark.slow
def test_train_runs_the_plan_and_stays_within_the_budget(planned: Path, tmp_path: Path) -> None:
    """The peak that a training measures of itself is the planner's promise kept."""
    place = tmp_path / "run"
    result = run(
        "train", "tabular", *SMALL, "--plan", str(planned), "--steps", "4", "--output", str(place)
    )

    assert result.exit_code == 0, result.output
    record = loads(RunRecord, (place / "run.json").read_text())
    promised = loads(PlanRecord, planned.read_text())
    assert record.plan == promised.chosen.plan
    assert record.peak_bytes is not None
    assert record.peak_bytes <= promised.budget_bytes
    assert read_plan(place / "run.json") == read_plan(planned)


@pytest.mark.slow
def test_train_plans_for_itself_when_given_a_budget(tmp_path: Path) -> None:
    """One command from a budget to a trained model; the choice and its reason are told."""
    place = tmp_path / "run"
    result = run(
        "train", "tabular", *SMALL, "--budget", BUDGET, "--steps", "4", "--output", str(place)
    )

    assert result.exit_code == 0, result.output
    record = loads(RunRecord, (place / "run.json").read_text())
    assert record.peak_bytes is not None
    assert record.peak_bytes <= parse_bytes(BUDGET)
    assert record.budget_bytes == parse_bytes(BUDGET)
    assert "plan " in result.stderr


@pytest.mark.slow
def test_json_alone_stands_on_stdout() -> None:
    """--json - is for programs."""
    result = run("plan", "tabular", "--budget", "1GiB", *SMALL, *FEW)

    record = json.loads(result.stdout)
    assert record["precisions"] == ["fp32"]
    assert record["chosen"]["exact"] is True
    assert result.exit_code == 0


@pytest.mark.slow
def test_an_impossible_budget_names_the_least_that_fits() -> None:
    """The error is of use: that budget can be given, and is then met."""
    with pytest.raises(UsageError, match="the least that fits is") as raised:
        run("plan", "tabular", "--budget", "1KiB", *SMALL, "-p", "fp32")

    assert raised.value.exit_code == 2
    least = raised.value.message.rpartition("(")[2].split(" ")[0].replace(",", "")
    assert run("plan", "tabular", "--budget", least, *SMALL, "-p", "fp32").exit_code == 0


@pytest.mark.slow
def test_a_kept_batch_needs_more() -> None:
    """--keep-batch says so where it is what makes a budget impossible."""
    with pytest.raises(UsageError, match="while the batch is kept whole") as raised:
        run("plan", "tabular", "--budget", "1KiB", *SMALL, "-p", "fp32", "--keep-batch")

    assert "--keep-batch" in raised.value.hint


@pytest.mark.parametrize("budget", ["2 gibberish", "GiB", "-1GiB", "", "2GiB extra", "0"])
def test_a_budget_in_nonsense_units_is_one_clear_error(budget: str) -> None:
    """A budget is never guessed."""
    with pytest.raises(UsageError):
        run("plan", "tabular", f"--budget={budget}", *SMALL)


@pytest.mark.parametrize(
    "arguments",
    [
        ("tabluar", "--budget", "1GiB"),
        ("tabular", "--budget", "1GiB", "--device", "h20"),
        ("tabular", "--budget", "1GiB", "-p", "fp23", "--device", "cpu"),
        ("tabular", "--budget", "1GiB", "--set", "widht=3", "--device", "cpu"),
    ],
)
def test_an_unknown_name_is_an_error_with_the_nearest_match(arguments: tuple[str, ...]) -> None:
    """Recipe, device, precision, option."""
    with pytest.raises(UnknownName, match="unknown"):
        run("plan", *arguments)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("extra", "named"),
    [
        (("--precision", "bf16"), "--precision"),
        (("--keep-fp32", "head"), "--keep-fp32"),
        (("--autocast-rules", "cuda"), "--autocast-rules"),
        (("--budget", "1GiB"), "--budget"),
    ],
)
def test_what_a_plan_says_cannot_be_said_twice(
    planned: Path, extra: tuple[str, ...], named: str
) -> None:
    """Nothing is silently ignored: the error names both options."""
    with pytest.raises(UsageError, match=f"--plan and {named}"):
        run("train", "tabular", *SMALL, "--plan", str(planned), *extra)


@pytest.mark.slow
def test_where_measured_peaks_exceed_the_predicted_ones_they_decide(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The least that fits is then a measured one, above the budget, and it is met when given."""
    peak = speeds.peak_of
    monkeypatch.setattr(speeds, "peak_of", lambda ledger: 3 * peak(ledger))
    arguments = ("plan", "tabular", *SMALL, "-p", "fp32", "--budget")

    with pytest.raises(UsageError, match=r"measured where .* were predicted") as raised:
        run(*arguments, BUDGET)

    least = int(raised.value.message.rpartition("(")[2].split(" ")[0].replace(",", ""))
    assert least > parse_bytes(BUDGET)
    assert run(*arguments, str(least)).exit_code == 0


@pytest.mark.slow
def test_a_roofline_does_not_buy_stores_that_round() -> None:
    """Everything fits: the master and the moments stay exact, and what looks faster is named."""
    result = run(
        "plan", "tabular", "--budget", "1GiB", "--device", "h200", "-p", "bf16-split", "--json", "-"
    )

    record = loads(PlanRecord, result.stdout)
    assert (record.chosen.plan["weights"], record.chosen.plan["states"]) == ("split16", "fp32")
    assert any("a bound alone is no reason" in note for note in record.notes)


@pytest.mark.slow
def test_no_plan_takes_more_than_a_gpu_can_give(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the budget: what is chosen fits into what can be used of the GPU, which a note says.

    The GPU is one of 64 MiB, since a plan that fills a real one takes long to trace.
    """
    small = replace(GPUS["t4"], memory_bytes=64 * 2**20)
    monkeypatch.setitem(GPUS, "t4", small)
    arguments = ("plan", "tabular", "--set", "width=512", "--device", "t4", *FEW, "--budget")

    record = loads(PlanRecord, run(*arguments, "100GiB").stdout)

    assert record.chosen.predicted_bytes <= small.usable_bytes
    assert any("about 61.4 MiB can be used on one t4" in note for note in record.notes)
    assert "stores that round more than they must were not" in record.why
    monkeypatch.setitem(GPUS, "t4", replace(small, memory_bytes=2**20))
    with pytest.raises(UsageError, match=r"all that can be used of one t4\).* least that fits"):
        run(*arguments, "100GiB")


@pytest.mark.parametrize("precisions", ["", ",", " , "])
def test_no_precision_is_one_clear_error(precisions: str) -> None:
    """In both verbs that take a list."""
    with pytest.raises(UsageError, match="no precision was named"):
        run("plan", "tabular", "--budget", "1GiB", *SMALL, f"--precisions={precisions}")
    with pytest.raises(UsageError):
        run("compare", "tabular", "--device", "cpu", f"--precisions={precisions}")


@pytest.mark.slow
def test_a_plan_of_another_training_is_told_and_its_budget_recorded(
    planned: Path, tmp_path: Path
) -> None:
    """A note for each difference, in run.json too, and a last word on a peak that was too high."""
    place = tmp_path / "run"
    wide = ("--set", "batch_size=64", "--set", "width=256", "--device", "cpu")
    result = run(
        "train", "tabular", *wide, "--plan", str(planned), "--steps", "4", "--output", str(place)
    )

    record = loads(RunRecord, (place / "run.json").read_text())
    assert record.budget_bytes == parse_bytes(BUDGET)
    assert any("width=64, and this is width=256" in note for note in record.warnings)
    assert any("exceeded the budget of 215,040 by" in note for note in record.warnings)
    assert all(f"note: {note}" in result.stderr for note in record.warnings)


def test_a_plan_that_cannot_be_carried_out_here_says_whose_it_is(tmp_path: Path) -> None:
    """A regression has no head whose loss could be taken in chunks; the plan's recipe had one."""
    file = tmp_path / "plan.json"
    plan = replace(plan_named("bf16"), loss="chunked")
    promise = {"recipe": "austen", "options": {}, "batch_size": 16, "device": "cpu"}
    chosen = {"chosen": {"plan": to_json(plan)}, "budget_bytes": 2**20}
    file.write_text(json.dumps(promise | chosen))

    with pytest.raises(UsageError, match="look like its head") as raised:
        run("train", "tabular", "--plan", str(file), "--output", str(tmp_path / "run"))

    assert "was found for recipe 'austen', and this is 'tabular'" in raised.value.hint


@pytest.mark.slow
def test_a_plan_of_this_training_is_no_matter_for_notes(planned: Path, tmp_path: Path) -> None:
    """The budget is recorded, and nothing is said; by `--precision` as by `--plan`."""
    for name, option in (("a", "--plan"), ("b", "--precision")):
        place = tmp_path / name
        run("train", "tabular", *SMALL, option, str(planned), "--steps", "4", "-o", str(place))

        record = loads(RunRecord, (place / "run.json").read_text())
        assert record.budget_bytes == parse_bytes(BUDGET)
        assert not any("budget" in note or "may not be" in note for note in record.warnings)


def test_a_budget_is_for_a_new_run() -> None:
    """To go on, the run's own plan is given."""
    with pytest.raises(UsageError, match="--budget and --resume"):
        run("train", "tabular", *SMALL, "--budget", "1GiB", "--resume")


def test_another_file_is_left_as_it_is(tmp_path: Path) -> None:
    """--output replaces a plan, and nothing else; that is checked before the work begins."""
    file = tmp_path / "notes.txt"
    file.write_text("mine")

    with pytest.raises(RunDirectoryError, match="was not written by narrowcast"):
        run("plan", "tabular", "--budget", "1GiB", *SMALL, "--output", str(file))
    assert file.read_text() == "mine"


@pytest.mark.slow
def test_a_report_is_rendered_again_from_the_file(planned: Path) -> None:
    """`narrowcast report plan.json` writes the page with the frontier."""
    result = run("report", str(planned))

    assert result.exit_code == 0, result.output
    assert "Memory against speed" in result.stdout
    assert "<html" in planned.with_suffix(".html").read_text()[:2000]


def test_a_model_that_reads_values_names_the_operation_and_offers_measuring(tmp_path: Path) -> None:
    """What cannot be traced cannot be planned, and that is one clear error."""
    file = tmp_path / "reads.py"
    text = (Path(__file__).parents[1] / "recipes" / "regression.py").read_text()
    file.write_text(
        text.replace(
            "batch\n    return (model", "batch\n    y = y if x.sum() > 0 else -y\n    return (model"
        )
    )

    with pytest.raises(RecipeError, match="_local_scalar_dense") as raised:
        run("plan", str(file), "--budget", "1GiB", "--device", "cpu")
    assert "narrowcast memory" in raised.value.hint
