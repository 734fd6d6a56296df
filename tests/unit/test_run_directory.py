"""A run's directory: one writer, nothing overwritten, readable while it grows and after a crash."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from narrowcast.errors import CheckpointError, NarrowcastError, RunDirectoryError
from narrowcast.records.run import Environment, Evaluation, RunRecord, StepPoint
from narrowcast.training.run_directory import (
    MetricsLog,
    RunDirectory,
    default_directory,
    latest_directory,
)

RECORD = RunRecord(
    recipe="fashion",
    options={"lr": 0.1},
    precision="bf16",
    plan={"name": "bf16"},
    seed=0,
    planned_steps=10,
    batch_size=4,
    environment=Environment(
        device="cpu",
        device_name="a CPU",
        threads=1,
        platform="Linux",
        python="3.11",
        torch="2.13",
        narrowcast="0.1.0",
    ),
    started="2026-01-01T00:00:00+00:00",
)


def point(step: int) -> StepPoint:
    return StepPoint(
        step=step,
        loss=1.0 / step,
        loss_scale=1.0,
        gradient_norm=float("nan"),
        applied=True,
        seconds=0.1,
        learning_rate=0.01,
    )


EVALUATION = Evaluation(step=2, precision="fp32", metrics={"loss": 0.5}, examples=8)


def test_the_record_comes_back(tmp_path: Path) -> None:
    """run.json is the record, and nothing else is left beside it."""
    directory = RunDirectory(tmp_path)

    directory.write_record(RECORD)

    assert directory.read_record() == RECORD
    assert [p.name for p in tmp_path.iterdir()] == ["run.json"]


def test_a_directory_without_a_run_is_an_error(tmp_path: Path) -> None:
    """The error names the directory and what one looks like."""
    with pytest.raises(RunDirectoryError, match="holds no run"):
        RunDirectory(tmp_path / "absent").read_record()


def test_a_directory_that_holds_another_run_is_refused_and_untouched(tmp_path: Path) -> None:
    """The error says which run it is and how far it came."""
    directory = RunDirectory(tmp_path)
    directory.write_record(RECORD)
    before = directory.record_path.read_bytes()

    with (
        pytest.raises(RunDirectoryError, match="fashion in bf16, seed 0, running at step 0 of 10"),
        directory.lock(),
    ):
        directory.refuse_another_run()

    assert directory.record_path.read_bytes() == before


def test_a_directory_with_other_files_is_refused(tmp_path: Path) -> None:
    """A run does not move in with somebody's thesis."""
    (tmp_path / "thesis.tex").write_text("x")

    with pytest.raises(RunDirectoryError, match=r"not empty: it holds thesis\.tex"):
        RunDirectory(tmp_path).refuse_another_run()


def test_a_run_killed_before_its_first_checkpoint_left_nothing(tmp_path: Path) -> None:
    """An empty metrics.jsonl and an empty checkpoints/ are no other run; a checkpoint is."""
    directory = RunDirectory(tmp_path)
    directory.metrics_path.touch()
    directory.checkpoints.mkdir()

    directory.refuse_another_run()
    (directory.checkpoints / "step-00000000.safetensors").touch()
    with pytest.raises(RunDirectoryError, match="not empty: it holds checkpoints"):
        directory.refuse_another_run()


def test_a_new_directory_is_made_with_its_parents(tmp_path: Path) -> None:
    """And an empty one is as good as none."""
    directory = RunDirectory(tmp_path / "a" / "b")

    with directory.lock() as warnings:
        directory.refuse_another_run()

    assert warnings == ()
    assert directory.path.is_dir()


HOLDER = """
import sys, time
from pathlib import Path
from narrowcast.training.run_directory import RunDirectory
with RunDirectory(Path(sys.argv[1])).lock():
    print("locked", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path: Path) -> subprocess.Popen[str]:
    """Another process that writes to tmp_path."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "locked\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_two_processes_do_not_write_one_run(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    """The second is told the number of the first."""
    with (
        pytest.raises(RunDirectoryError, match=f"in use by process {holder.pid} on"),
        RunDirectory(tmp_path).lock(),
    ):
        pass


def test_a_killed_process_leaves_no_stale_lock(
    tmp_path: Path, holder: subprocess.Popen[str]
) -> None:
    """After kill -9 the directory can be taken at once, and the lock names the new owner."""
    holder.send_signal(signal.SIGKILL)
    holder.wait()

    with RunDirectory(tmp_path).lock() as warnings:
        owner = (tmp_path / ".lock").read_text()

    assert warnings == ()
    assert owner.startswith(f"process {os.getpid()} on")


def test_half_written_files_of_a_killed_process_are_removed(tmp_path: Path) -> None:
    """Ours and those of safetensors, here and among the checkpoints; nothing else."""
    directory = RunDirectory(tmp_path)
    directory.checkpoints.mkdir()
    for name in (".run.json.x1.tmp", "checkpoints/.step-00000001.safetensors.a.tmp",
                 "checkpoints/.tmpAbCdEf"):  # fmt: skip
        (tmp_path / name).write_text("half")
    (tmp_path / "checkpoints/step-00000001.safetensors").write_text("whole")

    with directory.lock():
        pass

    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")) == [
        ".lock",
        "checkpoints",
        "checkpoints/step-00000001.safetensors",
    ]


def test_a_file_system_without_locks_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run goes on, with a warning in its record."""

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.lockf", refuse)
    with RunDirectory(tmp_path).lock() as warnings:
        pass

    assert "cannot be locked (No locks available)" in warnings[0]


def test_a_directory_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    """A file stands where the directory should be."""
    (tmp_path / "file").write_text("x")

    with (
        pytest.raises(RunDirectoryError, match="cannot write"),
        RunDirectory(tmp_path / "file" / "run").lock(),
    ):
        pass


def test_metrics_are_readable_while_they_grow(tmp_path: Path) -> None:
    """Each line is there as soon as it was appended, and a torn one is left out."""
    directory = RunDirectory(tmp_path)
    log = MetricsLog(directory.metrics_path)

    log.append(point(1))
    log.append(point(2), EVALUATION)
    seen = directory.read_metrics()
    with directory.metrics_path.open("a") as file:
        file.write('{"kind": "st')
    torn = directory.read_metrics()
    log.close()

    assert [type(p) for p in seen] == [StepPoint, StepPoint, Evaluation]
    assert (seen[1].step, seen[2]) == (2, EVALUATION)
    assert repr(torn) == repr(seen)  # a NaN is not equal to itself


def test_a_run_without_metrics_has_none(tmp_path: Path) -> None:
    """A run that was killed before its first step."""
    assert RunDirectory(tmp_path).read_metrics() == ()


def test_a_damaged_line_of_metrics_is_named(tmp_path: Path) -> None:
    """A line in the middle is no crash's work."""
    directory = RunDirectory(tmp_path)
    log = MetricsLog(directory.metrics_path)
    log.append(point(1), point(2))
    log.close()
    directory.metrics_path.write_text("nonsense\n" + directory.metrics_path.read_text())

    with pytest.raises(NarrowcastError, match=r"line 1 of metrics\.jsonl is not a point"):
        directory.read_metrics()


def test_metrics_go_on_where_the_checkpoint_was_written(tmp_path: Path) -> None:
    """Points after the checkpoint, and a torn one, are cut off, so that none is there twice."""
    directory = RunDirectory(tmp_path)
    log = MetricsLog(directory.metrics_path)
    log.append(point(1))
    position = log.make_durable()
    log.append(point(2), point(3))
    log.close()
    with directory.metrics_path.open("a") as file:
        file.write('{"torn')

    log = MetricsLog(directory.metrics_path, position=position)
    log.append(point(2))
    log.close()

    assert [p.step for p in directory.read_metrics()] == [1, 2]


def test_metrics_that_lost_points_are_an_error(tmp_path: Path) -> None:
    """A file shorter than the checkpoint says is not patched over, and not changed."""
    path = tmp_path / "metrics.jsonl"
    path.write_text("short\n")

    with pytest.raises(CheckpointError, match="has 6 bytes, and the checkpoint was written at 60"):
        MetricsLog(path, position=60)

    assert path.read_text() == "short\n"


def test_a_full_disk_is_said_when_a_point_is_written() -> None:
    """/dev/full refuses every byte as a full disk does."""
    log = MetricsLog(Path("/dev/full")) if sys.platform == "linux" else pytest.skip("Linux only")

    with pytest.raises(RunDirectoryError, match="No space left") as caught:
        log.append(point(1))
    log.close()

    assert "free some disk space" in caught.value.hint


def test_default_directories_are_numbered_and_never_reused(tmp_path: Path) -> None:
    """stem, stem-2, stem-3 ...: a gap is not filled, since the newest is the one to resume."""
    stem = "fashion-bf16-seed0"
    chosen = []
    for _ in range(3):
        chosen.append(default_directory(tmp_path, stem))
        chosen[-1].mkdir()
    (tmp_path / "fashion-bf16-seed01").mkdir()
    chosen[1].rmdir()

    assert [p.name for p in chosen] == [stem, f"{stem}-2", f"{stem}-3"]
    assert latest_directory(tmp_path, stem) == chosen[2]
    assert default_directory(tmp_path, stem).name == f"{stem}-4"


def test_there_is_no_latest_directory_before_the_first_run(tmp_path: Path) -> None:
    """Neither in an empty root nor in an absent one."""
    assert latest_directory(tmp_path, "x") is None
    assert latest_directory(tmp_path / "absent", "x") is None
