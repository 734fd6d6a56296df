"""Ctrl-C as a request: the first one lets the run save itself, the second one ends it at once.

A signal to a whole group of processes reaches the compilers too that torch.compile has started, and
the step that waits for them fails: that is the interruption, and no error of the model or recipe.
"""

from __future__ import annotations

import signal
import textwrap
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["Interruption"]

_SIGNALS = (signal.SIGINT, signal.SIGTERM)

# What torch.compile raises, from which it cuts its own frames; and the files that are on the stack
# while it compiles forward (a backend's own errors too) and backward, and not while its code runs.
_COMPILERS_ERRORS = ("torch._dynamo.", "torch._inductor.")
_COMPILING = ("torch/_dynamo/convert_frame.py", "torch/_inductor/compile_fx.py")


class Interruption:
    """Whether the run was asked to stop."""

    def __init__(self) -> None:
        self.requested = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take SIGINT and SIGTERM for the block, and give their handlers back afterwards.

        Raises KeyboardInterrupt for a compilation that failed once a signal had come.
        In any thread but the main one, where Python delivers no signals, this does nothing.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._ask) for number in _SIGNALS}
        try:
            yield
        except Exception as error:
            if not (self.requested and _arose_in_compiling(error)):
                raise
            said = textwrap.shorten(str(error), 160, placeholder=" ...")
            raise KeyboardInterrupt(f"a signal broke off torch.compile: {said}") from error
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True


def _arose_in_compiling(error: BaseException | None) -> bool:
    """Whether an error, or a cause of it, arose while torch.compile compiled."""
    while error is not None:
        frames = traceback.walk_tb(error.__traceback__)
        if type(error).__module__.startswith(_COMPILERS_ERRORS) or any(
            frame.f_code.co_filename.endswith(_COMPILING) for frame, _ in frames
        ):
            return True
        error = error.__cause__ or error.__context__
    return False
