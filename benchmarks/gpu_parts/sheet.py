"""The rows of one part, on the disk after each: a run that is cut or dies keeps them.

A row is begun before it is tried. One that was begun and never ended took its process down with it
(an illegal access on a GPU ends all that the process could still do), so that the next process
leaves it out and says so.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from provenance import provenance

from gpu_parts.clock import Clock
from gpu_parts.device import machine
from narrowcast.files import write_atomically

__all__ = ["Ask", "Sheet", "is_fatal"]

_DIED = "the process ended while it was tried"


@dataclass(frozen=True, kw_only=True)
class Ask:
    """What a part is asked."""

    run: str
    """When the whole run began; rows of another run are not carried on."""
    output: Path
    clock: Clock
    rehearse: bool
    workload: str | None = None
    commit: str = ""

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.rehearse else "cuda")


class Sheet:
    """Rows with what identifies each, written whole after every change."""

    def __init__(self, part: str, ask: Ask, **about: Any) -> None:
        self.path = ask.output / f"gpu-{part}.json"
        self._head = {
            **provenance(),
            "run": ask.run,
            "rehearsal": ask.rehearse,
            "machine": machine(ask.device),
            **about,
        }
        self._head["commit"] = ask.commit or self._head["commit"]
        self.rows: list[dict[str, Any]] = []
        earlier = json.loads(self.path.read_text()) if self.path.exists() else {}
        if earlier.get("run") == ask.run:
            self.rows = earlier["rows"]
        for row in self.rows:
            if row.pop("begun", False):
                row["not_run"] = _DIED

    def find(self, **key: Any) -> dict[str, Any] | None:
        """Return the row of this identity."""
        return next((r for r in self.rows if all(r.get(k) == v for k, v in key.items())), None)

    def put(self, key: dict[str, Any], **values: Any) -> None:
        """Add values to a row, and write."""
        row = self.find(**key)
        if row is None:
            row = dict(key)
            self.rows.append(row)
        row.update(values)
        self.write()

    def write(self, **about: Any) -> None:
        self._head.update(about)
        text = json.dumps({**self._head, "rows": self.rows}, indent=1)
        write_atomically(self.path, text + "\n")

    @contextmanager
    def trying(self, **key: Any) -> Iterator[dict[str, Any]]:
        """Begin a row; what the block adds to the yielded mapping, or why it failed, ends it.

        An error that leaves the GPU unusable is raised again: nothing that follows could work.
        """
        found: dict[str, Any] = {}
        self.put(key, begun=True)
        row = self.find(**key)
        assert row is not None, "it was put there"
        try:
            yield found
        except Exception as error:
            found["not_run"] = f"{type(error).__name__}: {error}".split("\n", 1)[0][:300]
            print(f"  {key}: {found['not_run']}", flush=True)
            if is_fatal(error):
                raise
        finally:
            row.pop("begun", None)
            self.put(key, **found)


def is_fatal(error: BaseException) -> bool:
    """Whether a CUDA context is lost: running out of memory is not, an illegal access is."""
    if isinstance(error, torch.OutOfMemoryError):
        return False
    return "CUDA error" in str(error) or "device-side assert" in str(error)
