"""The verbs train, evaluate and verify-resume, as typed: output, files and exit codes."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest

from narrowcast.cli.app import main
from narrowcast.training import checkpoint
from narrowcast.training.run_directory import RunDirectory

SMALL = str(Path(__file__).parents[1] / "small_recipe.py")


class Said(NamedTuple):
    code: int
    out: str
    err: str


class Shell:
    """Runs the command line in this process, in a directory of its own."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch = monkeypatch
        self._capsys = capsys

    def __call__(self, *words: object) -> Said:
        self._monkeypatch.setattr(sys, "argv", ["narrowcast", *map(str, words)])
        with pytest.raises(SystemExit) as left:
            main()
        said = self._capsys.readouterr()
        return Said(int(left.value.code or 0), said.out, said.err)


@pytest.fixture
def narrowcast(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Shell:
    monkeypatch.chdir(tmp_path)
    return Shell(monkeypatch, capsys)


def test_a_training_prints_its_result_and_where_it_lies(narrowcast: Shell) -> None:
    """Metrics, memory, step time, skips and dtypes on stdout; the directory on stderr."""
    said = narrowcast("train", SMALL, "--precision", "bf16")

    place = RunDirectory(Path("runs/small_recipe-bf16-seed0"))
    assert said.code == 0
    for words in ("small_recipe in bf16: finished", "accuracy, evaluated in fp32",
                  "accuracy, evaluated in bf16", "peak memory", "step time", "steps skipped",
                  "matmul executed in", "bf16 x"):  # fmt: skip
        assert words in said.out
    assert "training small_recipe in bf16: 12 steps" in said.err
    assert f"run: {place.path}" in said.err
    assert place.read_record().status == "finished"
    assert "<html" in place.report_path.read_text()


def test_json_stands_alone_on_stdout(narrowcast: Shell) -> None:
    """The record, and nothing else; it is what run.json holds."""
    said = narrowcast("train", SMALL, "-p", "fp32", "--json", "-", "--output", "run")

    assert json.loads(said.out) == json.loads(Path("run/run.json").read_text())
    assert "finished" in said.err


def test_every_option_reaches_the_run(narrowcast: Shell) -> None:
    """What was typed is what the record says."""
    said = narrowcast(
        "train", SMALL, "-p", "16-mixed", "--set", "width=8", "--steps", 6, "--seed", 3,
        "--accumulate", 2, "--clip-norm", 0.5, "--autocast-rules", "cuda", "--device", "cpu",
        "--checkpoint-every", 3, "--evaluate-every", 2, "--keep-fp32", "layers.3",
        "--output", "here", "--json", "run.json",
    )  # fmt: skip
    record = json.loads(Path("run.json").read_text())

    assert said.code == 0
    assert record["precision"] == "fp16"
    assert record["options"]["width"] == 8
    assert (record["planned_steps"], record["seed"]) == (6, 3)
    assert (record["accumulate"], record["clip_norm"]) == (2, 0.5)
    assert record["plan"]["policy"]["autocast_rules"] == "cuda"
    assert record["plan"]["policy"]["keep_fp32"] == ["layers.3"]
    assert [e["step"] for e in record["evaluations"]] == [2, 2, 4, 4, 6, 6]
    assert [p.name for p in checkpoint.checkpoints_in(Path("here/checkpoints"))] == [
        "step-00000003.safetensors", "step-00000006.safetensors",
    ]  # fmt: skip
    assert record["command"].startswith("narrowcast train")


@pytest.mark.slow
def test_default_directories_are_never_reused(narrowcast: Shell) -> None:
    """The second run of the same command gets a number; --resume goes on with the newest."""
    for _ in range(2):
        narrowcast("train", SMALL, "-p", "fp32", "--no-measure")
    said = narrowcast("train", SMALL, "-p", "fp32", "--no-measure", "--resume")

    assert sorted(p.name for p in Path("runs").iterdir()) == [
        "small_recipe-fp32-seed0", "small_recipe-fp32-seed0-2",
    ]  # fmt: skip
    assert "runs/small_recipe-fp32-seed0-2 is finished: there is nothing left to do" in said.err


def test_auto_says_what_it_chose_and_why(narrowcast: Shell) -> None:
    """Without --precision the device decides, and the reason is printed."""
    said = narrowcast("train", SMALL, "--steps", 2, "--device", "cpu")

    assert said.code == 0
    assert "measured" in said.err


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["train", SMALL, "-p", "bf17"], 2, "did you mean 'bf16'"),
        (["train", "fashon"], 2, "did you mean 'fashion'"),
        (["train", SMALL, "--set", "widht=3"], 2, "did you mean 'width'"),
        (["train", SMALL, "--steps", "0"], 2, "steps is 0"),
        (["train", SMALL, "-p", "fp16", "--autocast-rules", "cudda"], 2, "did you mean 'cuda'"),
        (["train", SMALL, "--keep-fp32", "nowhere"], 2, "matches no module"),
        (["train", SMALL, "-p", "tf32", "--device", "cpu"], 3, "TF32 exists on CUDA devices only"),
        (["evaluate", "fashion"], 2, "no --weights were given"),
        (["evaluate", "absent.py", "--weights", "x.safetensors"], 2, "no recipe file"),
        (["train", "absent.py"], 2, "no recipe file"),
        (["verify-resume", "fashon"], 2, "did you mean 'fashion'"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else None,
)
def test_a_request_that_makes_no_sense_is_one_clear_error(
    narrowcast: Shell, words: list[str], code: int, message: str
) -> None:
    """An error, a hint, the documented exit code, and no run directory."""
    said = narrowcast(*words)

    assert said.code == code
    assert said.err.replace("\n", " ").count("error: ") == 1
    assert message in said.err
    assert not Path("runs").exists() or not list(Path("runs").iterdir())


def test_another_run_in_the_directory_is_exit_code_6(narrowcast: Shell) -> None:
    """And the run that was there is as it was."""
    narrowcast("train", SMALL, "-p", "fp32", "-o", "run", "--no-measure")
    before = Path("run/run.json").read_bytes()

    said = narrowcast("train", SMALL, "-p", "bf16", "-o", "run")

    assert said.code == 6
    assert "holds another run" in said.err
    assert "--resume" in said.err
    assert Path("run/run.json").read_bytes() == before


def test_resuming_in_another_precision_is_exit_code_7(narrowcast: Shell) -> None:
    """The error names what differs."""
    narrowcast("train", SMALL, "-p", "fp32", "-o", "run", "--no-measure")

    said = narrowcast("train", SMALL, "-p", "bf16", "-o", "run", "--resume")

    assert said.code == 7
    assert "policy.compute: 'fp32' there, 'bf16' here" in said.err


def test_a_loss_that_is_nan_is_exit_code_5(narrowcast: Shell) -> None:
    """With what to try, and the reason in run.json."""
    old = "return F.cross_entropy(model(x), y)"
    text = Path(SMALL).read_text().replace(old, f"{old} * float('nan')")
    Path("broken.py").write_text(text)

    said = narrowcast("train", "broken.py", "-p", "bf16", "-o", "run")

    assert said.code == 5
    assert "non-finite loss" in said.err
    assert json.loads(Path("run/run.json").read_text())["status"] == "failed"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_run_with_130_and_a_checkpoint(
    narrowcast: Shell, number: signal.Signals
) -> None:
    """A process of its own, interrupted from outside: saved to the last step that it took."""
    words = ["train", SMALL, "-p", "fp16", "--steps", "100000", "--no-measure", "-o", "run"]
    process = subprocess.Popen(
        [sys.executable, "-m", "narrowcast", *words],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    place = RunDirectory(Path("run"))
    while len(place.read_metrics()) < 20:
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(number)
    _, errors = process.communicate()

    record = place.read_record()
    assert process.returncode == 130
    assert "--resume --output run goes on" in errors
    assert record.status == "interrupted"
    assert len([p for p in place.read_metrics() if p.kind == "step"]) == record.completed_steps
    assert checkpoint.load_latest(place.checkpoints)["step"] == record.completed_steps


def test_a_run_is_evaluated_as_its_record_says(narrowcast: Shell) -> None:
    """The same numbers as at the end of the training, in both precisions, and as JSON."""
    narrowcast("train", SMALL, "-p", "bf16-true", "--set", "width=8", "--seed", 5, "-o", "run")

    said = narrowcast("evaluate", "run", "--json", "-")

    record = json.loads(said.out)
    assert said.code == 0
    assert record["evaluations"] == json.loads(Path("run/run.json").read_text())["evaluations"]
    assert record["precision"] == "bf16-true"
    assert record["weights"] == "run/weights.safetensors"
    assert record["warnings"] == []


def test_an_option_that_was_set_to_none_is_none_when_evaluated(narrowcast: Shell) -> None:
    """The default is another value, with other figures."""
    text = Path(SMALL).read_text()
    text = text.replace("    lr: float", "    factor: float | None = 3.0\n    lr: float")
    Path("mine.py").write_text(
        text.replace("Net(options.width)", "Net(16 if options.factor else 8)")
    )
    narrowcast(
        "train", "mine.py", "-p", "fp32", "--set", "factor=none", "-o", "run", "--no-measure"
    )

    said = narrowcast("evaluate", "run", "--json", "-")

    assert json.loads(said.out)["options"]["factor"] is None
    assert json.loads(said.out)["warnings"] == []


def test_options_that_change_each_other_are_said_when_evaluated(narrowcast: Shell) -> None:
    """A __post_init__ that is applied to its own result gives other options than the run had."""
    twice = "    lr: float = 0.02\n\n    def __post_init__(self):\n        self.lr = self.lr / 2\n"
    text = Path(SMALL).read_text().replace("    lr: float = 0.02\n", twice)
    Path("mine.py").write_text(text)
    narrowcast("train", "mine.py", "-p", "fp32", "-o", "run", "--no-measure")

    said = narrowcast("evaluate", "run", "--json", "-")

    assert json.loads(said.out)["warnings"] == ["options are not those of the run: lr"]


def test_a_run_that_got_nowhere_has_nothing_to_evaluate(narrowcast: Shell) -> None:
    """One clear error, and how to go on."""
    narrowcast("train", SMALL, "-p", "fp32", "-o", "run", "--no-measure")
    for file in [*Path("run/checkpoints").iterdir(), Path("run/weights.safetensors")]:
        file.unlink()

    said = narrowcast("evaluate", "run")

    assert said.code == 6
    assert "holds neither weights nor a checkpoint" in said.err


def test_a_run_whose_recipe_has_moved_says_where_it_was(narrowcast: Shell) -> None:
    """Writing a new one would not help: the hint is the command for its new place."""
    Path("mine.py").write_text(Path(SMALL).read_text())
    narrowcast("train", "mine.py", "-p", "fp32", "-o", "run", "--no-measure")
    Path("mine.py").rename("moved.py")

    said = narrowcast("evaluate", "run")
    again = narrowcast("evaluate", "moved.py", "--weights", "run/weights.safetensors")

    assert said.code == 6
    assert f"is not at {Path('mine.py').resolve()} any more" in said.err
    assert "evaluate RECIPE --weights" in said.err
    assert "recipes new" not in said.err
    assert again.code == 0


REPEATS = """
    def forward(self, x):
        index = torch.zeros(3, dtype=torch.long)
        x = x + torch.zeros_like(x).put_(index, x.flatten()[:3])
        """


def test_a_run_without_determinism_is_evaluated_without(narrowcast: Shell) -> None:
    """As the run was; and where its weights are named, with the option that the error names."""
    text = Path(SMALL).read_text().replace("\n    def forward(self, x):\n        ", REPEATS)
    Path("mine.py").write_text(text)
    weights = ("--weights", "run/weights.safetensors")
    narrowcast("train", "mine.py", "-p", "fp32", "-o", "run", "--no-deterministic")

    of_run = narrowcast("evaluate", "run")
    strict = narrowcast("evaluate", "mine.py", *weights)
    loose = narrowcast("evaluate", "mine.py", *weights, "--no-deterministic")

    assert (of_run.code, strict.code, loose.code) == (0, 4, 0)
    assert "--no-deterministic" in strict.err


def test_weights_are_evaluated_by_a_recipe(narrowcast: Shell) -> None:
    """Exported ones and those in a checkpoint, in any precision."""
    narrowcast("train", SMALL, "-p", "fp32", "-o", "run", "--no-measure")
    checkpoint_file = checkpoint.checkpoints_in(Path("run/checkpoints"))[-1]

    of_export = narrowcast("evaluate", SMALL, "--weights", "run/weights.safetensors", "--json", "a")
    of_checkpoint = narrowcast("evaluate", SMALL, "--weights", checkpoint_file, "-p", "bf16",
                               "--json", "b")  # fmt: skip

    a, b = (json.loads(Path(name).read_text()) for name in "ab")
    assert (of_export.code, of_checkpoint.code) == (0, 0)
    assert "evaluated in" in of_export.out
    assert a["weights_hash"] == b["weights_hash"]
    assert [e["precision"] for e in a["evaluations"]] == ["fp32"]
    assert [e["precision"] for e in b["evaluations"]] == ["fp32", "bf16"]
    assert a["evaluations"][0]["metrics"] == b["evaluations"][0]["metrics"]


def test_an_edited_recipe_is_said_when_a_run_is_evaluated(narrowcast: Shell) -> None:
    """The weights may still fit; the figures are those of another recipe."""
    Path("mine.py").write_text(Path(SMALL).read_text())
    narrowcast("train", "mine.py", "-p", "fp32", "-o", "run", "--no-measure")
    Path("mine.py").write_text(Path(SMALL).read_text() + "\n# changed\n")

    said = narrowcast("evaluate", "run")

    assert said.code == 0
    assert "mine.py has changed since the run was made" in said.out.replace("\n", " ")


@pytest.mark.parametrize("kind", ["pickle", "truncated", "other model", "absent"])
def test_weights_that_cannot_be_used_are_exit_code_7(narrowcast: Shell, kind: str) -> None:
    """A pickle is never opened; the error names the file."""
    narrowcast("train", SMALL, "-p", "fp32", "-o", "run", "--no-measure")
    file = Path("run/weights.safetensors")
    if kind == "pickle":
        file.write_bytes(pickle.dumps({"layers.0.weight": print}))
    elif kind == "truncated":
        file.write_bytes(file.read_bytes()[:-7])
    elif kind == "absent":
        file.unlink()
    width = 8 if kind == "other model" else 16

    said = narrowcast("evaluate", SMALL, "--weights", file, "--set", f"width={width}")

    assert said.code == 7
    assert "run/weights.safetensors" in said.err


def test_a_runs_own_options_cannot_be_overridden(narrowcast: Shell) -> None:
    """An option that would have no effect is refused, not ignored."""
    narrowcast("train", SMALL, "-p", "fp32", "-o", "run", "--no-measure")

    said = narrowcast("evaluate", "run", "--set", "width=8")

    assert said.code == 2
    assert "evaluated with its own options" in said.err


@pytest.mark.slow
def test_verify_resume_prints_its_verdict_and_exits_with_it(narrowcast: Shell) -> None:
    """0 for EXACT, 5 otherwise; the record as JSON."""
    text = Path(SMALL).read_text()
    Path("hides.py").write_text(
        text.replace("HIGHER_IS", "seen = [0]\nHIGHER_IS").replace(
            "    x, y = batch\n    return F.",
            "    x, y = batch\n    seen[0] += 1\n    x = x * seen[0]\n    return F.",
        )
    )

    good = narrowcast("verify-resume", SMALL, "-p", "bf16", "--steps", 4, "--json", "v.json")
    bad = narrowcast("verify-resume", "hides.py", "-p", "bf16", "--steps", 4)

    record = json.loads(Path("v.json").read_text())
    assert (good.code, bad.code) == (0, 5)
    assert record["verdict"] == "EXACT"
    assert good.out.startswith("EXACT")
    assert bad.out.startswith("NOT EXACT")
    assert "first difference: model.layers.0.weight" in bad.out.replace("\n", " ")
