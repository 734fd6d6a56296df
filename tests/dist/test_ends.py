"""How a training on several ranks ends: by the command line, as users start it."""

from __future__ import annotations

import json
import socket
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from dist.cases import RECIPE
from dist.launch import ended, start, torchrun
from narrowcast.cli.app import app

pytestmark = pytest.mark.slow

TRAIN = ("-m", "narrowcast", "train", RECIPE, "--precision", "bf16-split")
COMMAND = (*TRAIN, "--parallel", "ddp")


def by_hand(rank: int, size: int, port: int, *words: str) -> list[str]:
    """Return the command of one rank that no launcher watches."""
    variables = (f"RANK={rank}", f"WORLD_SIZE={size}", "MASTER_ADDR=127.0.0.1")
    return ["env", *variables, f"MASTER_PORT={port}", sys.executable, *COMMAND, *words]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_a_rank_that_fails_ends_all_with_its_own_error_and_resume_is_exact(
    tmp_path: Path, kind: str
) -> None:
    """Raised by the recipe on rank 1: its lines are printed, once, and run.json has them.

    Then a rank is killed, and the launcher has ended within 30 s of it. Resumed twice, the run ends
    with the weights of one that was left alone.
    """
    run, whole, killed_at = tmp_path / "run", tmp_path / "whole", tmp_path / "killed"
    words = (*TRAIN, "--parallel", kind, "--checkpoint-every", "2", "--set", "dropout=0.3")
    failed = torchrun(2, *words, "-o", str(run), TEST_FAILS="raise", TEST_RANK="1")
    record = json.loads((run / "run.json").read_text())

    assert failed.code != 0
    (said,) = failed.errors()
    assert said.startswith("error: rank 1: line.py: loss(model, batch) raised ValueError: the cat")
    assert "in _misbehave" in failed.stderr
    assert (record["status"], record["failure_kind"]) == ("failed", "RecipeError")
    assert record["failure"].startswith("rank 1: line.py")

    # From step 2 on the fourth forward pass is in step 6, after the checkpoint of step 4.
    kill = {"TEST_FAILS": "kill", "TEST_RANK": "1", "TEST_KILLED_AT": str(killed_at)}
    killed = torchrun(2, *words, "-o", str(run), "--resume", **kill)
    assert killed.code != 0
    assert time.time() - float(killed_at.read_text()) < 30
    (said,) = killed.errors()
    assert "rank 0 lost its connection to another rank, which left no word (connection " in said

    resumed = torchrun(2, *words, "-o", str(run), "--resume", "--json", "-")
    left_alone = torchrun(2, *words, "-o", str(whole))
    assert (resumed.code, left_alone.code) == (0, 0), resumed.stderr + left_alone.stderr
    assert json.loads(resumed.stdout)["status"] == "finished"  # one record: rank 0's
    first, second = (load_file(d / "weights.safetensors") for d in (run, whole))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("how", ["interrupt", "interrupt-twice"])
def test_ctrl_c_on_one_rank_interrupts_all(tmp_path: Path, how: str) -> None:
    """Both end as one process does: after the step under way, or at once when asked twice.

    The other rank was not told by a signal, and does not take rank 1 for lost. The run goes on.
    """
    run, port = tmp_path / "run", free_port()
    environment = {"NARROWCAST_WAIT_S": "60", "TEST_FAILS": how, "TEST_RANK": "1"}
    other = start(by_hand(1, 2, port, "-o", str(run)), environment)
    main = ended(by_hand(0, 2, port, "-o", str(run)), environment)
    _, stopped = other.communicate(timeout=60)
    record = json.loads((run / "run.json").read_text())
    resumed = torchrun(2, *COMMAND, "-o", str(run), "--resume", "--json", "-")

    assert (main.code, other.returncode) == (130, 130), main.stderr + stopped
    assert not main.errors()
    assert "error:" not in stopped
    assert (record["status"], record["failure"]) == ("interrupted", "")
    if how == "interrupt":
        assert record["completed_steps"] == 4
        assert "interrupted after step 4 of 6 and saved" in main.stderr
    else:
        assert record["completed_steps"] == 3
        assert "rank 1: interrupted" in record["warnings"]
        assert "note: rank 1: interrupted" in main.stderr
        assert stopped.endswith("stopped\n")
    assert json.loads(resumed.stdout)["status"] == "finished"


def test_the_whole_model_trains_in_shards_from_a_shell(tmp_path: Path) -> None:
    """One record on stdout, and the whole model's weights; tied ones once."""
    words = ("-m", "narrowcast", "train", "austen", "--precision", "bf16-split", "--steps", "3")
    ended = torchrun(2, *words, "--parallel", "fsdp2", "--json", "-", "-o", str(tmp_path / "run"))
    record = json.loads(ended.stdout)
    weights = load_file(tmp_path / "run" / "weights.safetensors")

    assert ended.code == 0, ended.stderr[-3000:]
    assert (record["status"], record["parallel"], record["ranks"]) == ("finished", "fsdp2", 2)
    assert len(record["rank_peak_bytes"]) == 2
    assert weights["tokens.weight"].shape == (256, 128)
    assert all(weight.dtype is torch.float32 for weight in weights.values())
    assert "Warning" not in ended.stderr


def test_a_missing_rank_is_an_error_after_the_limit(tmp_path: Path) -> None:
    """Nobody waits for ever, with no launcher to end the others."""
    words = by_hand(0, 2, free_port(), "-o", str(tmp_path / "run"))
    found = ended(words, {"NARROWCAST_WAIT_S": "5"})

    assert found.code == 9
    (said,) = found.errors()
    assert "within 5 s" in said
    assert not (tmp_path / "run").exists()


def test_ranks_that_were_started_otherwise_are_one_error_of_rank_0(tmp_path: Path) -> None:
    """It names the rank and the difference; both end with its exit code."""
    port, environment = free_port(), {"NARROWCAST_WAIT_S": "60"}
    other = start(by_hand(1, 2, port, "-o", str(tmp_path / "run"), "--clip-norm", "2"), environment)
    main = ended(by_hand(0, 2, port, "-o", str(tmp_path / "run")), environment)
    _, silent = other.communicate(timeout=60)

    (said,) = main.errors()
    assert "rank 1 was started for another training" in said
    assert "clip_norm: 2.0 there, None on rank 0" in said
    assert "error:" not in silent
    assert (main.code, other.returncode) == (2, 2)


def test_outside_of_torchrun_the_command_says_how_to_start_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Before anything is loaded."""
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    found = CliRunner().invoke(app, ["train", RECIPE, "--parallel", "ddp"])

    assert "RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT are not set" in str(found.exception)
    assert "torchrun --nproc-per-node 2" in str(found.exception)
