"""How ranks end together: the one that fails says why, and the others follow without a word.

A rank that fails closes its connections, and the others then fail in whatever collective they wait
in: a hundred tracebacks that say nothing. What is only such a symptom is told from a failure here.
"""

from __future__ import annotations

import json
import re
import signal
import threading
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch.distributed import DistError

from narrowcast.errors import NarrowcastError, ParallelError

__all__ = ["Failure", "PeerFailed", "failure_of", "outlive_the_launcher", "symptom_in"]

# What gloo, NCCL and the store raise when the other end is gone or late (torch 2.11 to 2.13).
_SYMPTOM = re.compile(
    r"gloo/|\[Gloo\]|NCCL|ncclRemoteError|Connection (closed|reset|refused)|Broken pipe"
    r"|monitoredBarrier|Application timeout|Timed out (after|waiting)|Socket Timeout"
)

# Where collectives are called from; what a user's own lines raise is a failure, whatever it says.
_CALLERS = tuple(str(Path(file).parent) for file in (torch.__file__, Path(__file__).parent))


@dataclass(frozen=True, kw_only=True)
class Failure:
    """Why a rank failed, as it leaves it for the others."""

    rank: int
    kind: str
    message: str
    exit_code: int

    def to_text(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_text(cls, text: str) -> Failure:
        return cls(**json.loads(text))


class PeerFailed(ParallelError):
    """Another rank failed and says why itself: this one ends with its exit code, in silence."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(f"rank {failure.rank}: {failure.message}")
        self.kind = failure.kind
        """Class name of the other rank's error."""
        self.exit_code = failure.exit_code


def failure_of(error: Exception, rank: int) -> Failure:
    """Describe an error of this rank for the others."""
    is_ours = isinstance(error, NarrowcastError)
    return Failure(
        rank=rank,
        kind=type(error).__name__,
        message=error.message if isinstance(error, NarrowcastError) else repr(error),
        exit_code=error.exit_code if is_ours else 1,  # type: ignore[attr-defined]
    )


def symptom_in(error: BaseException | None) -> str:
    """Return what an error, or its cause, says of a lost connection or a long wait; "" if nothing.

    The sentence alone, without the places in torch's C++ that surround it.
    """
    while error is not None:
        text = str(error)
        is_technical = isinstance(error, DistError | RuntimeError)
        if is_technical and _SYMPTOM.search(text) and _comes_from_a_collective(error):
            return text.rpartition(".cc:")[2].partition("\n")[0].partition("] ")[2] or text[:120]
        if isinstance(error, DistError):
            return text[:120]
        error = error.__cause__ or error.__context__
    return ""


def _comes_from_a_collective(error: BaseException) -> bool:
    """Whether the line that raised is torch's or ours: they alone talk to other ranks."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is None or trace.tb_frame.f_code.co_filename.startswith(_CALLERS)


def outlive_the_launcher() -> None:
    """Ignore SIGTERM from now on: this rank is ending, and has yet to say or to write why.

    torchrun sends it as soon as the first rank is gone, and SIGKILL 30 s later.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
