"""Where ``--json`` puts a record: checked before the work begins, and alone on stdout.

The option's callback does both for every verb, so that no verb can forget it. What a recipe prints,
from Python or from C, goes to stderr while stdout is kept for the record.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, TextIO

import typer

from narrowcast.errors import RunDirectoryError
from narrowcast.files import cannot_write, require_replaceable, write_all, write_for_user
from narrowcast.records.codec import dumps

__all__ = ["emit_json", "is_record", "prepare_json"]

Write = Callable[[str], None]

_KEPT_BESIDE = {"run.json": "metrics.jsonl", "comparison.json": "protocol.json"}
"""Records that belong to a directory, and by what one knows such a directory."""

_stdout: list[Write] = []
"""How to reach the real stdout, while it is kept for the record; the innermost is the last."""


def prepare_json(context: typer.Context, target: str | None) -> str | None:
    """Refuse a target that could not be written after the work; keep stdout for ``-``."""
    if target == "-":
        context.with_resource(_stdout_kept())
    elif target is not None:
        _refuse_a_runs_own(Path(target))
        require_replaceable(Path(target), is_record)
    return target


def _refuse_a_runs_own(target: Path) -> None:
    """Raise RunDirectoryError for the record that a run or a comparison keeps of itself.

    It is ours, and yet not to be replaced: the rest of that directory belongs to it.
    """
    place = Path(os.path.realpath(target))
    companion = _KEPT_BESIDE.get(place.name)
    if companion is not None and os.path.exists(place.parent / companion):  # noqa: PTH110 -- never raises
        raise RunDirectoryError(
            f"{target} is the record that {place.parent} keeps of itself, and was left as it is",
            hint="choose another file",
        )


def emit_json(record: Any, target: str | None) -> None:
    """Write a record as JSON to stdout (``-``), to a file (whole or not at all), or nowhere (None).

    Raises RunDirectoryError if the file cannot be written or holds something that is not ours.
    """
    if target is None:
        return
    text = dumps(record) + "\n"
    if target != "-":
        write_for_user(Path(target), text, is_record)
        return
    try:
        (_stdout[-1] if _stdout else _writer(sys.stdout))(text)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise cannot_write(Path("stdout"), error) from None


def is_record(content: bytes) -> bool:
    """Whether this is JSON that one of the verbs writes, known by the keys that it must have."""
    from narrowcast.records.check import CheckRecord
    from narrowcast.records.comparison import ComparisonRecord
    from narrowcast.records.device import DeviceRecord
    from narrowcast.records.diagnosis import DiagnosisRecord
    from narrowcast.records.evaluation import EvaluationRecord
    from narrowcast.records.memory import MemoryRecord
    from narrowcast.records.plan import PlanRecord
    from narrowcast.records.run import RunRecord
    from narrowcast.records.verify import VerifyRecord

    try:
        data = json.loads(content)
    except (ValueError, RecursionError):
        return False
    if not isinstance(data, dict):
        return False
    kinds = (
        CheckRecord, ComparisonRecord, DeviceRecord, DiagnosisRecord, EvaluationRecord,
        MemoryRecord, PlanRecord, RunRecord, VerifyRecord,
    )  # fmt: skip
    return set(data) == {"recipes"} or any(_required(kind) <= set(data) for kind in kinds)


def _required(kind: Any) -> set[str]:
    return {f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING}


@contextmanager
def _stdout_kept() -> Iterator[None]:
    """Send what anybody prints to stderr, until the block ends; `emit_json` still reaches stdout.

    Descriptor 1 stays on stderr afterwards: C's buffers and exit handlers print when all is over.
    """
    shown: TextIO | None = sys.stdout
    if shown is None:
        raise RunDirectoryError(
            "stdout is closed, and --json - writes to it", hint="name a file: --json PATH"
        )
    shown.flush()
    _stdout.append(_descriptor_writer() if _is_descriptor_1(shown) else _writer(shown))
    sys.stdout = sys.stderr
    try:
        yield
    finally:
        sys.stdout = shown
        _stdout.pop()


def _descriptor_writer() -> Write:
    """Put stderr in the place of descriptor 1, and write to what that was."""
    kept = os.dup(1)
    os.dup2(2, 1)
    return lambda text: write_all(kept, text.encode())


def _is_descriptor_1(stream: TextIO) -> bool:
    try:
        return stream.fileno() == 1
    except (OSError, ValueError):  # a stream in memory, as tests have
        return False


def _writer(stream: TextIO) -> Write:
    def write(text: str) -> None:
        stream.write(text)
        stream.flush()

    return write
