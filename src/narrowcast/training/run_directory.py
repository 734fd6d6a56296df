"""A run's directory: what lies where, who may write, and what a crash leaves readable.

    run.json             a RunRecord, rewritten whole as the run goes on
    metrics.jsonl        one line a step and an evaluation, appended and flushed
    checkpoints/         the newest ones
    weights.safetensors  the final weights as stored
    report.html          written by the command line
    .lock                held by the process that writes, with its number

The lock belongs to the process, not to the file: the system releases it however the process ends,
so one that was killed leaves nothing behind that would have to be recognised as stale.
"""

from __future__ import annotations

import fcntl
import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from narrowcast.errors import CheckpointError, RunDirectoryError
from narrowcast.files import cannot_write, remove_leftovers, write_atomically
from narrowcast.records.codec import RecordError, dumps, loads
from narrowcast.records.run import Evaluation, RunRecord, StepPoint, parse_metrics

__all__ = ["MetricsLog", "RunDirectory", "default_directory", "latest_directory"]

_LOCK = ".lock"


@dataclass(frozen=True)
class RunDirectory:
    """Where the parts of a run lie, and how they are read."""

    path: Path

    @property
    def record_path(self) -> Path:
        return self.path / "run.json"

    @property
    def metrics_path(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def weights_path(self) -> Path:
        return self.path / "weights.safetensors"

    @property
    def report_path(self) -> Path:
        return self.path / "report.html"

    def holds_a_run(self) -> bool:
        """Whether a run was begun here."""
        return self.record_path.exists()

    def is_unbegun(self) -> bool:
        """Whether the run here, if any, got no further than its first checkpoint, and not there."""
        parts = (self.metrics_path, self.checkpoints)
        return all(self._holds_nothing(part) for part in parts if part.exists())

    def read_record(self) -> RunRecord:
        """Read run.json; raises RunDirectoryError if there is none or it is damaged."""
        try:
            text = self.record_path.read_text()
        except OSError as error:
            raise RunDirectoryError(
                f"{self.path} holds no run: {self.record_path.name} cannot be read "
                f"({os.strerror(error.errno or 0)})",
                hint="give the directory of a run, such as runs/fashion-bf16-seed0",
            ) from None
        except ValueError:
            raise self._damaged("it is not text") from None
        try:
            return loads(RunRecord, text)
        except RecordError as error:
            raise self._damaged(error.message) from None

    def _damaged(self, what: str) -> RunDirectoryError:
        return RunDirectoryError(
            f"{self.record_path} is not the record of a run: {what}",
            hint="the file was edited or damaged; restore it, or run again in another directory",
        )

    def write_record(self, record: RunRecord) -> None:
        """Replace run.json; a reader sees the old one or the new one."""
        write_atomically(self.record_path, dumps(record) + "\n")

    def read_metrics(self) -> tuple[StepPoint | Evaluation, ...]:
        """Read metrics.jsonl, also while it grows; a torn last line is left out."""
        if not self.metrics_path.exists():
            return ()
        return parse_metrics(self.metrics_path.read_text())

    @contextmanager
    def lock(self) -> Iterator[tuple[str, ...]]:
        """Make the directory and be its only writer for the block; yields warnings.

        A directory made here and left by an error before anything was written is removed again.
        Raises RunDirectoryError if another process writes here, or if the disk refuses.
        """
        is_new = not self.path.exists()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            file = (self.path / _LOCK).open("a+")
        except OSError as error:
            raise cannot_write(self.path, error) from None
        with file:
            warnings: tuple[str, ...] = ()
            try:
                if not _acquire(file.fileno()):
                    file.seek(0)
                    raise _in_use(self.path, file.read().strip())
                file.truncate(0)
                file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
                file.flush()
            except OSError as error:
                why = os.strerror(error.errno or 0)
                warnings = (f"{self.path} cannot be locked ({why}): let no second run write here",)
            remove_leftovers(self.path)
            remove_leftovers(self.checkpoints)
            try:
                yield warnings
            except BaseException:
                if is_new:
                    self._remove_if_empty()
                raise

    def refuse_another_run(self) -> None:
        """Raise RunDirectoryError unless the directory is as good as empty.

        It is, if a run was killed here before its first checkpoint. Nothing is ever overwritten.
        """
        others = sorted(p.name for p in self.path.iterdir() if not self._holds_nothing(p))
        if not others:
            return
        if self.holds_a_run():
            record = self.read_record()
            way_on = "begin" if self.is_unbegun() else "continue"
            raise RunDirectoryError(
                f"{self.path} holds another run: {record.recipe} in {record.precision}, seed "
                f"{record.seed}, {record.status} at step {record.completed_steps} of "
                f"{record.planned_steps}",
                hint=f"{way_on} it with --resume, or choose another --output",
            )
        raise RunDirectoryError(
            f"{self.path} is not empty: it holds {', '.join(others[:3])}",
            hint="choose another --output; nothing is overwritten",
        )

    def _remove_if_empty(self) -> None:
        """Remove a directory with nothing but our lock in it."""
        if [p.name for p in self.path.iterdir()] == [_LOCK]:
            (self.path / _LOCK).unlink()
            self.path.rmdir()

    def _holds_nothing(self, path: Path) -> bool:
        """Whether this is our lock, or an empty file or directory of ours."""
        if path == self.metrics_path:
            return path.stat().st_size == 0
        if path == self.checkpoints:
            return not any(path.iterdir())
        return path.name == _LOCK


class MetricsLog:
    """The appending end of metrics.jsonl: each line reaches the system as soon as it is written."""

    def __init__(self, path: Path, *, position: int = 0) -> None:
        """Open, cutting off what was written after `position` bytes, the last checkpoint's end.

        Raises CheckpointError if the file is shorter, so that points were lost.
        """
        self._path = path
        try:
            # Unbuffered: nothing is left to be written, or to fail, when the file is closed.
            self._file = path.open("ab", buffering=0)
            size = self._file.tell()
            if size > position:
                self._file.truncate(position)
        except OSError as error:
            raise cannot_write(path, error) from None
        if size < position:
            self._file.close()
            raise CheckpointError(
                f"{path} has {size} bytes, and the checkpoint was written at {position}",
                hint="metrics.jsonl was cut or replaced; restore it, or begin a new run",
            )

    def append(self, *points: StepPoint | Evaluation) -> None:
        """Write points, one line each. Raises RunDirectoryError if the disk is full."""
        unwritten = memoryview("".join(dumps(p, indent=None) + "\n" for p in points).encode())
        try:
            while unwritten:
                unwritten = unwritten[self._file.write(unwritten) :]
        except OSError as error:
            raise cannot_write(self._path, error) from None

    def make_durable(self) -> int:
        """Flush to the disk and return the position, to be saved in a checkpoint."""
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise cannot_write(self._path, error) from None
        return self._path.stat().st_size

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def default_directory(root: Path, stem: str) -> Path:
    """Return the first of root/stem, root/stem-2, root/stem-3 ... that does not exist."""
    latest = latest_directory(root, stem)
    if latest is None:
        return root / stem
    return root / f"{stem}-{_number(latest, stem) + 1}"


def latest_directory(root: Path, stem: str) -> Path | None:
    """Return the one of root/stem, root/stem-2 ... with the highest number, if any exists."""
    found = [p for p in root.glob("*") if p.is_dir() and _number(p, stem)]
    return max(found, key=lambda p: _number(p, stem), default=None)


def _number(path: Path, stem: str) -> int:
    """1 for stem, n for stem-n, 0 for anything else."""
    if path.name == stem:
        return 1
    match = re.fullmatch(re.escape(stem) + r"-(\d+)", path.name)
    return int(match[1]) if match else 0


def _acquire(descriptor: int) -> bool:
    """Try to become the writer; a record lock, since forked data workers do not inherit it."""
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    return True


def _in_use(path: Path, owner: str) -> RunDirectoryError:
    return RunDirectoryError(
        f"{path} is in use by {owner or 'another process'}",
        hint="wait until that run has ended, or choose another --output",
    )
