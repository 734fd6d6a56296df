"""What ranks tell each other beside their collectives: who is there, what they want, why one fails.

All of it goes through torch's key-value store, which torchrun keeps outside of the ranks: it works
before there is a process group, and when one of its members is gone. Every wait has a limit.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta

from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from narrowcast.errors import NarrowcastError, ParallelError, UsageError
from narrowcast.parallel.failures import (
    Failure,
    PeerFailed,
    failure_of,
    outlive_the_launcher,
    symptom_in,
)
from narrowcast.parallel.world import WAIT_LIMIT, World

__all__ = ["Meeting", "connect"]

_POLL_S = 0.02
# How long the cause of a lost connection may take to arrive, and a lower rank to say the same.
_GRACE_S = 3.0
_ABSENT = "(absent)"


def connect(world: World) -> Meeting:
    """Reach the store; raises ParallelError if nobody answers within the limit."""
    limit = timedelta(seconds=world.limit_s)
    try:
        store, _, _ = next(rendezvous("env://", world.rank, world.size, timeout=limit))
    except (RuntimeError, OSError) as error:
        first = str(error).splitlines()[0]
        raise ParallelError(
            f"rank {world.rank} met nobody at {world.address} within {world.limit_s:g} s: {first}",
            hint=f"is a rank of {world.size} missing? {WAIT_LIMIT} sets the limit",
        ) from None
    store.set_timeout(limit)
    return Meeting(world, store)


class Meeting:
    """One rank's end of the conversation."""

    def __init__(self, world: World, store: Store) -> None:
        self.world = world
        self.store = store
        self._notes = PrefixStore(f"narrowcast/{world.attempt}", store)
        self._accounted: Exception | None = None

    def from_main(self, name: str, value: Callable[[], str]) -> str:
        """Return what rank 0 makes of `value`, on every rank."""
        if self.world.is_main:
            text = value()
            self._notes.set(name, text)
            return text
        return self._wait_for(name)

    def agree(self, facts: Mapping[str, object]) -> None:
        """See that all ranks are there and want the same training.

        Rank 0 compares and raises, ParallelError for a rank that does not come and UsageError for
        one that differs; the others raise PeerFailed then.
        """
        rank = self.world.rank
        self._notes.set(f"facts/{rank}", json.dumps(dict(facts), sort_keys=True, default=str))
        if rank:
            self._wait_for("facts/0")
            # Rank 0 waits from now on for as long as the limit, and is to be the one that says so.
            self._wait_for("agreed", patience_s=_GRACE_S)
            return
        deadline = time.monotonic() + self.world.limit_s
        mine = json.loads(self._wait_for("facts/0"))
        names = {other: f"facts/{other}" for other in range(1, self.world.size)}
        arrived = {other: self._await(name, deadline) for other, name in names.items()}
        missing = [other for other, text in arrived.items() if text is None]
        if missing:
            raise ParallelError(
                f"{_ranks(missing)} of {self.world.size} did not come within "
                f"{self.world.limit_s:g} s",
                hint=f"see what that process printed; {WAIT_LIMIT} sets the limit",
            )
        for other, text in arrived.items():
            _require_same(mine, json.loads(text or "{}"), other)
        self._notes.set("agreed", "yes")

    @contextmanager
    def failing_together(self) -> Iterator[None]:
        """Turn what the block raises into what this rank is to say, and tell the other ranks."""
        try:
            yield
        except KeyboardInterrupt as stop:
            outlive_the_launcher()
            self._leave_word(failure_of(stop, self.world.rank))
            raise
        except Exception as error:
            outlive_the_launcher()
            accounted = self._account_for(error)
            if accounted is error:
                raise
            raise accounted from error

    def _account_for(self, error: Exception) -> Exception:
        """Return the error to end with; PeerFailed where another rank speaks."""
        if error is self._accounted or isinstance(error, PeerFailed):
            return error
        symptom = symptom_in(error)
        self._accounted = self._cause_of(symptom) if symptom else self._own(error)
        return self._accounted

    def _own(self, error: Exception) -> Exception:
        """Leave word of this rank's own failure; a lower rank that says the same speaks for all."""
        rank = self.world.rank
        own = failure_of(error, rank)
        self._leave_word(own)
        if rank == 0:
            return error
        deadline = time.monotonic() + _GRACE_S
        while time.monotonic() < deadline:
            for lower in range(rank):
                known = self._failure(lower)
                if known is not None and (known.kind, known.message) == (own.kind, own.message):
                    return PeerFailed(known)
            time.sleep(_POLL_S)
        if isinstance(error, NarrowcastError):
            error.message = f"rank {rank}: {error.message}"
        return error

    def _cause_of(self, symptom: str) -> Exception:
        """Find who failed; where nobody said so, the first rank to ask says that one is lost."""
        rank = self.world.rank
        # Rank 0 is the first to speak, unless it is the one that was lost.
        deadline = time.monotonic() + (_GRACE_S if rank == 0 else 2 * _GRACE_S)
        while time.monotonic() < deadline:
            for other in range(self.world.size):
                known = self._failure(other)
                if known is not None and other != rank:
                    return PeerFailed(known)
            time.sleep(_POLL_S)
        lost = ParallelError(
            f"rank {rank} lost its connection to another rank, which left no word ({symptom})",
            hint="it was killed (out of memory?), or waited for longer than "
            f"{self.world.limit_s:g} s ({WAIT_LIMIT}); --resume goes on from the last checkpoint",
        )
        self._leave_word(failure_of(lost, rank))
        return lost

    def _leave_word(self, failure: Failure) -> None:
        # A store that went with the process that kept it has nobody left to tell.
        with suppress(RuntimeError, OSError):
            self._notes.set(f"failed/{failure.rank}", failure.to_text())

    def _failure(self, rank: int) -> Failure | None:
        name = f"failed/{rank}"
        try:
            if not self._notes.check([name]):
                return None
            return Failure.from_text(self._notes.get(name).decode())
        except (RuntimeError, OSError):
            return None

    def _wait_for(self, name: str, *, patience_s: float = 0.0) -> str:
        text = self._await(name, time.monotonic() + self.world.limit_s + patience_s)
        if text is None:
            raise ParallelError(
                f"rank {self.world.rank} waited {self.world.limit_s:g} s for rank 0",
                hint=f"see what rank 0 printed; {WAIT_LIMIT} sets the limit",
            )
        return text

    def _await(self, name: str, deadline: float) -> str | None:
        """Return a note once it is there, None at the deadline; raises if another rank failed."""
        while True:
            if self._notes.check([name]):
                return str(self._notes.get(name).decode())
            for rank in range(self.world.size):
                known = self._failure(rank) if rank != self.world.rank else None
                if known is not None:
                    raise PeerFailed(known)
            if time.monotonic() > deadline:
                return None
            time.sleep(_POLL_S)


def _require_same(mine: Mapping[str, object], theirs: Mapping[str, object], rank: int) -> None:
    differences = [
        f"{key}: {theirs.get(key, _ABSENT)!r} there, {mine.get(key, _ABSENT)!r} on rank 0"
        for key in sorted({*mine, *theirs})
        if mine.get(key, _ABSENT) != theirs.get(key, _ABSENT)
    ]
    if differences:
        raise UsageError(
            f"rank {rank} was started for another training than rank 0. It differs in "
            f"{'; '.join(differences)}",
            hint="start all ranks with the same command, recipe, environment and versions",
        )


def _ranks(numbers: list[int]) -> str:
    return f"rank{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"
