"""The first Ctrl-C is a request, the second one an end."""

from __future__ import annotations

import os
import signal

import pytest

from narrowcast.training.interruption import Interruption


def test_the_first_signal_only_asks() -> None:
    """The block goes on, and knows."""
    interruption = Interruption()

    with interruption.listening():
        os.kill(os.getpid(), signal.SIGINT)

        assert interruption.requested


def test_the_second_signal_ends_the_block() -> None:
    """Whichever of the two it is."""
    interruption = Interruption()

    with interruption.listening():
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_the_callers_handlers_come_back() -> None:
    """After the block Ctrl-C is what it was before."""
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]

    with Interruption().listening():
        inside = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]

    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before
    assert inside != before
