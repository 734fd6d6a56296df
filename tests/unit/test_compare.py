"""From a request to a comparison of real trainings, through the library and the command line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from io import StringIO
from pathlib import Path

import pytest
import torch
import typer
from rich.console import Console
from rich.progress import Progress
from typer.testing import CliRunner

from narrowcast.cli import compare as verb
from narrowcast.comparison.compare import Plan, compare, default_directory, plan_comparison
from narrowcast.comparison.protocol import PROTOCOL_FILE
from narrowcast.errors import (
    NarrowcastError,
    ProtocolError,
    RecipeError,
    UnknownName,
    UnsupportedPrecision,
    UsageError,
)
from narrowcast.plan import plan_named
from narrowcast.recipes.load import load_recipe
from narrowcast.training.run_directory import RunDirectory
from narrowcast.training.train import TrainOptions, train

# Whole trainings or traces: left out of `make check`.
pytestmark = pytest.mark.slow

CPU = torch.device("cpu")

RECIPE = '''
"""A line through noisy points."""
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.data import TensorDataset

HIGHER_IS_BETTER = {"close": True, "error": False}


@dataclass
class Options:
    batch_size: int = 8
    steps: int = 6
    lr: float = 0.05
    factor: float = 1.0


def model(options):
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))


def data(options):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(96, 4, generator=generator)
    y = options.factor * (x.sum(1, keepdim=True) + 0.1 * torch.randn(96, 1, generator=generator))
    return TensorDataset(x[:64], y[:64]), TensorDataset(x[64:], y[64:])


def loss(model, batch):
    x, y = batch
    return (model(x) - y).square().mean()


def metrics(model, batch):
    x, y = batch
    error = (model(x) - y).abs().squeeze(1)
    return {"error": error, "close": (error < 1).float(), "undeclared": error}
'''


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    path = tmp_path / "line.py"
    path.write_text(RECIPE)
    return path


def plan(
    file: Path, precisions: str = "fp32,bf16", overrides: Sequence[str] = (), **request: object
) -> Plan:
    options = {"seeds": 2, "device": CPU} | request
    plans = [plan_named(name) for name in precisions.split(",")]
    return plan_comparison(load_recipe(file, overrides), plans, **options)  # type: ignore[arg-type]


def test_a_plan_fixes_all_that_the_protocol_names(recipe_file: Path) -> None:
    """Metric, direction, margin, horizon, seeds, arms, options and the recipe's source."""
    made = plan(recipe_file, "fp32,fp16,bf16", ["lr=0.1"], seeds=3, margin="1%").protocol

    assert (made.recipe, made.metric, made.direction) == ("line", "error", "lower")
    assert (made.margin, made.margin_text, made.margin_kind) == (0.01, "1%", "relative")
    assert (made.steps, len(made.seeds), made.arms) == (6, 3, ("fp32", "fp16", "bf16"))
    assert made.options["lr"] == 0.1
    assert made.plans["fp16"]["policy"]["scaling"] == "dynamic"
    assert len(made.recipe_digest) == 64


def test_a_plan_gives_the_metric_that_was_asked_for(recipe_file: Path) -> None:
    """Any metric of the recipe, or its loss, with the direction that the recipe declares."""
    close = plan(recipe_file, metric="close").protocol
    loss = plan(recipe_file, metric="loss").protocol

    assert (close.metric, close.direction) == ("close", "higher")
    assert (loss.metric, loss.direction) == ("loss", "lower")


def test_planning_leaves_the_callers_random_numbers_alone(recipe_file: Path) -> None:
    """Looking at the first batch draws from a stream of its own."""
    before = torch.get_rng_state()

    plan(recipe_file)

    assert torch.equal(torch.get_rng_state(), before)


def test_fp32_is_added_and_said(recipe_file: Path) -> None:
    """Every precision is judged against fp32, so it is there and first, whoever forgot it."""
    added, named = plan(recipe_file, "bf16,fp16"), plan(recipe_file, "bf16,fp32,fp16")

    assert added.protocol.arms == named.protocol.arms == ("fp32", "bf16", "fp16")
    assert added.notes == ("fp32 was added: every precision is judged against it",)
    assert named.notes == ()


@pytest.mark.parametrize(
    ("precisions", "request_", "error", "words"),
    [
        ("fp32", {}, UsageError, "nothing to compare"),
        ("fp16,16-mixed", {}, UsageError, "named twice"),
        ("fp32,tf32", {}, UnsupportedPrecision, "tf32"),
        ("fp32,bf16", {"seeds": 0}, UsageError, "0 seeds"),
        ("fp32,bf16", {"steps": 0}, UsageError, "0 steps"),
        ("fp32,bf16", {"margin": "some"}, UsageError, "not a margin"),
        ("fp32,bf16", {"metric": "eror"}, UnknownName, "eror"),
        ("fp32,bf16", {"metric": "undeclared"}, RecipeError, "undeclared"),
    ],
)
def test_a_request_that_makes_no_sense_ends_before_anything_is_written(
    recipe_file: Path,
    precisions: str,
    request_: dict[str, object],
    error: type[NarrowcastError],
    words: str,
) -> None:
    """One error each, with what to do; an unknown metric names the nearest."""
    with pytest.raises(error, match=words) as caught:
        plan(recipe_file, precisions, **request_)

    assert caught.value.hint
    if words == "eror":
        assert "did you mean 'error'" in caught.value.hint


def test_the_default_directory_belongs_to_the_protocol(recipe_file: Path) -> None:
    """The same request finds its runs again; another margin or an edited recipe does not."""
    first = default_directory(plan(recipe_file, margin="0.1"))
    same = default_directory(plan(recipe_file, margin="0.1"))
    other = default_directory(plan(recipe_file, margin="0.2"))
    recipe_file.write_text(RECIPE + "\n# edited\n")
    edited = default_directory(plan(recipe_file, margin="0.1"))

    assert first == same
    assert len({first, other, edited}) == 3


def test_a_comparison_of_real_trainings(recipe_file: Path, tmp_path: Path) -> None:
    """fp32, its control, fp16 and bf16 start alike, differ in what they compute, and are judged."""
    made = plan(recipe_file, "fp32,fp16,bf16", margin="50%", steps=40)

    record = compare(made, tmp_path / "out")

    fp32, fp16, bf16 = record.arms
    assert fp16.initial_weights_hashes == bf16.initial_weights_hashes == fp32.initial_weights_hashes
    assert len(set(fp32.initial_weights_hashes)) == 2
    assert bf16.data_order_hashes == fp32.data_order_hashes
    assert set(bf16.executed_dtypes["matmul"]) == {"bf16"}
    assert set(fp32.executed_dtypes["matmul"]) == {"fp32"}
    assert (fp16.precision_honoured, bf16.precision_honoured) == (True, True)
    assert bf16.same_as_reference == (False, False)
    assert bf16.metrics["error"] != bf16.training_precision_metrics["error"]
    assert all(arm.peak_bytes and arm.step_seconds for arm in record.arms)
    assert record.control is not None
    assert record.control.loss_changed == (True, True)
    assert record.control.arm.initial_weights_hashes != fp32.initial_weights_hashes
    assert [v.n for v in record.verdicts] == [2, 2]
    runs = [tmp_path / "out" / run for arm in record.arms for run in arm.run_directories]
    assert all((run / "weights.safetensors").exists() for run in runs)
    assert not any((run / "checkpoints").exists() for run in runs)


def test_a_comparison_ends_as_if_it_had_not_been_interrupted(
    recipe_file: Path, tmp_path: Path
) -> None:
    """Interrupted in its third run and called again: the same metrics, bit for bit."""
    made = plan(recipe_file, margin="0.5", steps=30)
    whole = compare(made, tmp_path / "whole")

    with pytest.raises(KeyboardInterrupt):
        compare(made, tmp_path / "cut", observe=_Interrupting(at_point=2 * 30 + 10))
    record = compare(made, tmp_path / "cut")

    assert [a.metrics for a in record.arms] == [a.metrics for a in whole.arms]
    assert record.verdicts == whole.verdicts
    resumed = RunDirectory(tmp_path / "cut" / record.arms[1].run_directories[0]).read_record()
    assert resumed.resumed_at != ()


class _Interrupting:
    """An observer that sends Ctrl-C to its own process once, after some training steps."""

    def __init__(self, *, at_point: int) -> None:
        self.left = at_point

    def __call__(self, event: object) -> None:
        if type(event).__name__ == "StepPoint":
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGINT)


def test_what_died_before_its_first_checkpoint_begins_anew(
    recipe_file: Path, tmp_path: Path
) -> None:
    """A run directory without a checkpoint, left by a crash or a full disk, does not block."""
    made = plan(recipe_file)
    dead = tmp_path / "out" / "arms" / "bf16" / f"seed-{made.protocol.seeds[0]}"
    whole = compare(made, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        compare(made, tmp_path / "out", observe=_Interrupting(at_point=3))
    dead.mkdir(parents=True)
    (dead / "metrics.jsonl").write_text("")

    record = compare(made, tmp_path / "out")

    assert record.arms[1].metrics == whole.arms[1].metrics


def test_an_edited_recipe_does_not_go_on_with_the_old_runs(
    recipe_file: Path, tmp_path: Path
) -> None:
    """The recipe's source is part of the protocol."""
    compare(plan(recipe_file), tmp_path / "out")
    recipe_file.write_text(RECIPE.replace("0.1 * torch.randn", "0.2 * torch.randn"))

    with pytest.raises(NarrowcastError, match="recipe_digest"):
        compare(plan(recipe_file), tmp_path / "out")


def test_overflow_in_fp16_alone_is_failed(recipe_file: Path, tmp_path: Path) -> None:
    """Activations beyond 65,504: fp16 diverges on every seed, bf16 holds them."""
    recipe_file.write_text(RECIPE.replace("nn.Tanh()", "Huge()") + HUGE)

    record = compare(plan(recipe_file, "fp32,fp16,bf16", steps=40, margin="200%"), tmp_path / "out")

    fp16, bf16 = record.verdicts
    assert fp16.verdict == "FAILED"
    assert fp16.failed_runs == 2
    assert bf16.verdict not in ("FAILED", "NOT A PRECISION PROBLEM")
    assert record.arms[1].metrics["error"] == (None, None)


HUGE = """

class Huge(nn.Module):
    def forward(self, x):
        return (x * 1e6) / 1e6
"""


def test_nan_everywhere_is_not_a_precision_problem(recipe_file: Path, tmp_path: Path) -> None:
    """A loss that is NaN in fp32 too: each run fails, and precision is not blamed."""
    recipe_file.write_text(RECIPE.replace(".square().mean()", ".square().mean() * float('nan')"))

    record = compare(plan(recipe_file, steps=40, margin="0.1"), tmp_path / "out")

    assert [v.verdict for v in record.verdicts] == ["NOT A PRECISION PROBLEM"]
    assert record.arms[0].diverged == record.protocol.seeds


LOSS = "    return (model(x) - y).square().mean()"
COUNTING = f"    global calls\n    calls += 1\n{LOSS} / (1 + calls / 20)"
ANNEALED = RECIPE.replace(LOSS, COUNTING).replace("HIGHER", "calls = 0\nHIGHER", 1)


def test_no_arm_inherits_the_globals_of_another(recipe_file: Path, tmp_path: Path) -> None:
    """A weight of the loss that a module's global anneals begins anew with each training."""
    recipe_file.write_text(ANNEALED)
    made = plan(recipe_file)

    record = compare(made, tmp_path / "out")
    alone = train(
        load_recipe(recipe_file),
        plan_named("bf16"),
        TrainOptions(seed=made.protocol.seeds[1], measure=False),
        tmp_path / "alone",
        device=CPU,
    )

    assert record.arms[1].metrics["loss"][1] == alone.evaluations[0].metrics["loss"]
    assert record.arms[1].final_losses[1] == alone.final_loss


def test_a_recipe_that_is_edited_under_way_stops_the_comparison(
    recipe_file: Path, tmp_path: Path
) -> None:
    """Each training loads the file anew, and sees that it is another one."""
    made = plan(recipe_file)
    recipe_file.write_text(RECIPE + "\n# edited\n")

    with pytest.raises(RecipeError, match="was edited since it was loaded"):
        compare(made, tmp_path / "out")


def test_evaluation_data_exchanged_during_an_interruption_are_found(
    recipe_file: Path, tmp_path: Path
) -> None:
    """Also samples beyond the first batch, which the protocol's hash does not cover."""
    changed = "x[-1] = 0 if __import__('os').path.exists(__file__ + '.on') else x[-1]"
    recipe_file.write_text(RECIPE.replace("    y = options", f"    {changed}\n    y = options"))
    made = plan(recipe_file, margin="0.5", steps=30)
    with pytest.raises(KeyboardInterrupt):
        compare(made, tmp_path / "out", observe=_Interrupting(at_point=2 * 30 + 10))
    recipe_file.with_name(recipe_file.name + ".on").write_text("")

    with pytest.raises(ProtocolError, match="bf16 did not have the same evaluation samples"):
        compare(made, tmp_path / "out")


REPEATED = """

class Repeated(nn.Module):
    def forward(self, x):
        index = torch.zeros(3, dtype=torch.long)
        return x + torch.zeros_like(x).put_(index, x.flatten()[:3].detach())
"""


def test_an_operation_without_a_deterministic_kernel_can_be_allowed(
    recipe_file: Path, tmp_path: Path
) -> None:
    """The error names an option that the verb has; with it, the protocol and the runs say so."""
    recipe_file.write_text(RECIPE.replace("nn.Tanh()", "Repeated()") + REPEATED)
    with pytest.raises(RecipeError, match="put_") as caught:
        compare(plan(recipe_file), tmp_path / "strict")
    made = plan(recipe_file, deterministic=False)

    record = compare(made, tmp_path / "loose")

    assert "--no-deterministic" in caught.value.hint
    assert record.protocol.training["deterministic"] is False
    run = RunDirectory(tmp_path / "loose" / record.arms[0].run_directories[0])
    assert run.read_record().deterministic is False


def test_weights_from_an_unseeded_source_are_an_error(recipe_file: Path, tmp_path: Path) -> None:
    """A recipe that draws weights from the clock cannot be compared, and is told why."""
    recipe_file.write_text(
        RECIPE.replace(
            "    return nn.Sequential(",
            "    import time\n    torch.manual_seed(time.time_ns())\n    return nn.Sequential(",
        )
    )

    with pytest.raises(ProtocolError, match="initial fp32 weights"):
        compare(plan(recipe_file), tmp_path / "out")


@pytest.fixture
def command() -> typer.Typer:
    app = typer.Typer(pretty_exceptions_enable=False)
    verb.register(app)
    app.callback()(lambda: None)
    return app


def invoke(command: typer.Typer, *arguments: object) -> tuple[int, str, str, object]:
    result = CliRunner().invoke(command, ["compare", *map(str, arguments)])
    return result.exit_code, result.stdout, result.stderr, result.exception


def test_the_verb_prints_json_alone_on_stdout(
    command: typer.Typer, recipe_file: Path, tmp_path: Path
) -> None:
    """`--json -`: stdout is one JSON document, and the verdict goes to stderr."""
    out = tmp_path / "out"

    code, stdout, stderr, _ = invoke(
        command, recipe_file, "--precisions", "fp32,bf16-mixed", "--seeds", 2, "--margin", 0.5,
        "--metric", "error", "--steps", 4, "--set", "lr=0.01", "--device", "cpu",
        "--autocast-rules", "cuda", "--no-deterministic", "--output", out, "--json", "-",
    )  # fmt: skip

    data = json.loads(stdout)
    assert code == 0
    assert data["protocol"]["margin"] == 0.5
    assert data["protocol"]["options"]["lr"] == 0.01
    assert data["protocol"]["training"]["deterministic"] is False
    assert data["protocol"]["plans"]["bf16"]["policy"]["autocast_rules"] == "cuda"
    assert data["protocol"]["plans"]["fp32"]["policy"]["autocast_rules"] == "native"
    assert [v["precision"] for v in data["verdicts"]] == ["bf16"]
    assert data["verdicts"][0]["verdict"] in stderr
    assert (out / "report.html").stat().st_size > 1000
    assert json.loads((out / PROTOCOL_FILE).read_text())["hash"] == data["protocol"]["hash"]


def test_the_verb_shows_the_verdict_and_is_quiet_otherwise(
    command: typer.Typer, recipe_file: Path, tmp_path: Path
) -> None:
    """No progress without a terminal; stdout has the verdict, stderr where the report is."""
    code, stdout, stderr, _ = invoke(
        command, recipe_file, "-p", "bf16", "--seeds", 2, "--steps", 4, "-o", tmp_path / "out"
    )

    assert code == 0
    assert "NO MARGIN" in stdout
    assert "What was not tested" in stdout
    assert stderr.splitlines()[0] == "note: fp32 was added: every precision is judged against it"
    assert "report.html" in stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--precisions", "fp32,fb16"], UnknownName),
        (["--autocast-rules", "cuba"], UnknownName),
        (["--set", "lrr=1"], UnknownName),
        (["--seeds", "0"], UsageError),
        (["--margin", "-1"], UsageError),
    ],
)
def test_the_verb_raises_usage_errors(
    command: typer.Typer, recipe_file: Path, tmp_path: Path, arguments: list[str], error: type
) -> None:
    """Errors reach the one place that prints them, and no directory is made."""
    *_, raised = invoke(command, recipe_file, *arguments, "--output", tmp_path / "out")

    assert isinstance(raised, error)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_ctrl_c_ends_with_130_and_the_same_command_goes_on(
    recipe_file: Path, tmp_path: Path
) -> None:
    """A real process, a real signal: it says how many runs have ended, and loses none of them."""
    out = tmp_path / "out"
    arguments = [recipe_file, "-p", "bf16", "--seeds", "2", "--steps", "600", "-o", out]
    command = [sys.executable, "-m", "narrowcast", "compare", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    first = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    second_run = out / "arms" / "fp32-perturbed"
    deadline = time.monotonic() + 120
    while not list(second_run.glob("*/run.json")) and time.monotonic() < deadline:
        time.sleep(0.02)

    first.send_signal(signal.SIGINT)
    _, said = first.communicate(timeout=120)
    again = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    assert first.returncode == 130
    assert "the same command goes on with the rest" in said
    assert "Traceback" not in said
    assert again.returncode == 0, again.stderr
    assert "NO MARGIN" in again.stdout


def test_progress_counts_every_run_and_guesses_the_rest(recipe_file: Path, tmp_path: Path) -> None:
    """The bar ends full, also where runs were reused, and says nothing of a rest that is none."""
    made = plan(recipe_file)
    for _ in range(2):
        shown = Progress(console=Console(file=StringIO(), force_terminal=True))
        watch = verb._Watch(made, shown)

        compare(made, tmp_path / "out", observe=watch)

        (task,) = shown.tasks
        assert task.completed == task.total == 6 * 2 * 3
        assert task.fields["left"] == ""
        assert (watch.ended, watch.runs) == (6, 6)


def test_a_failure_is_told_once_with_what_to_do(recipe_file: Path, tmp_path: Path) -> None:
    """Further seeds refer to the first; the record has the hint, and so has the report."""
    text = recipe_file.read_text()
    assert "def loss(model, batch):\n" in text
    recipe_file.write_text(
        text.replace(
            "def loss(model, batch):\n",
            "def loss(model, batch):\n    if torch.is_autocast_enabled('cpu'):\n"
            "        raise RuntimeError('could not create a primitive')\n",
        )
    )
    made = plan(recipe_file)
    shown = Progress(console=Console(file=StringIO(), force_terminal=False, width=10_000))

    record = compare(made, tmp_path / "out", observe=verb._Watch(made, shown))

    said = shown.console.file.getvalue().splitlines()
    first, second = made.protocol.seeds[:2]
    what = "line.py: loss(model, batch) raised RuntimeError: could not create a primitive"
    assert [line for line in said if line.startswith("note: bf16 failed")] == [
        f"note: bf16 failed on seed {first}: {what}",
        f"note: bf16 failed on seed {second} as on seed {first}",
    ]
    assert len([line for line in said if line.startswith("hint: the CPU has no kernel")]) == 1
    assert record.arms[1].failures[0].splitlines()[-1].startswith("hint: the CPU has no kernel")
