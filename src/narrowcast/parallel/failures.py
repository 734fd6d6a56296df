"""How ranks end together: the one that fails says why, and the others follow without a word.

One that is interrupted says so too: to the others it would look as if it had been killed.

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

# What gloo, NCCL and the store raise when the other end is gone or late (torch 2.11 to 2.13), in
# whatever sentences around it, and what is said of it.
_SYMPTOMS = (
    (r"Ranks ([\d, ]+) failed to pass monitoredBarrier", r"no answer from rank \1"),
    (r"Connection (closed|reset|refused)", r"connection \1"),
    (r"Broken pipe", "connection closed"),
    (r"Timed out (after|waiting)|Application timeout|Socket Timeout|monitoredBarrier", "no answer"),
    (r"gloo/|\[Gloo\]|NCCL|ncclRemoteError", ""),
)
_SHORT = 80
"""Characters of a message that is none of these."""

# Where collectives are called from; what a user's own lines raise is a failure, whatever it says.
_CALLERS = tuple(str(Path(file).parent) for file in (torch.__file__, Path(__file__).parent))


_INTERRUPTED = 130
"""Exit code of what Ctrl-C ends; see ``errors``."""


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


def failure_of(error: BaseException, rank: int) -> Failure:
    """Describe an error of this rank, or the Ctrl-C that ends it, for the others."""
    message, exit_code = repr(error), 1
    if isinstance(error, NarrowcastError):
        message, exit_code = error.message, error.exit_code
    elif isinstance(error, KeyboardInterrupt):
        message, exit_code = str(error) or "interrupted", _INTERRUPTED
    return Failure(rank=rank, kind=type(error).__name__, message=message, exit_code=exit_code)


def symptom_in(error: BaseException | None) -> str:
    """Return what an error, or its cause, tells of a lost connection or a long wait; "" if nothing.

    In few words of ours: gloo's sentence has addresses, places in torch's C++, and good wishes.
    """
    while error is not None:
        known = _in_our_words(str(error))
        if isinstance(error, DistError):
            return known or _first_sentence(str(error))
        if known and isinstance(error, RuntimeError) and _comes_from_a_collective(error):
            return known
        error = error.__cause__ or error.__context__
    return ""


def _in_our_words(text: str) -> str:
    """Return what is said of a symptom; "" for a message that is none."""
    for pattern, said in _SYMPTOMS:
        found = re.search(pattern, text)
        if found:
            return found.expand(said) or _first_sentence(text)
    return ""


def _first_sentence(text: str) -> str:
    """Return what an unknown message begins with, without a place in C++ before it."""
    sentence = text.partition("\n")[0].rpartition("] ")[2].partition(". ")[0]
    return sentence[:_SHORT] or "no answer"


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
