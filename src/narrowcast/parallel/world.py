"""What torchrun tells a process about itself: its rank, the number of ranks, where they meet.

The environment is read here, once, into a value.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from narrowcast.errors import UsageError

__all__ = ["WAIT_LIMIT", "World", "world_from"]

WAIT_LIMIT = "NARROWCAST_WAIT_S"
"""Environment variable: how many seconds one rank waits for another before it gives up."""

# Long enough for one rank to write a checkpoint of some GiB while the others wait for it.
_DEFAULT_WAIT_S = 300.0

_REQUIRED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True, kw_only=True)
class World:
    """The ranks of one training, as one of them sees it."""

    rank: int
    size: int
    local_rank: int = 0
    """Place among the ranks of this machine: the number of its GPU."""
    attempt: int = 0
    """How often torchrun has started the ranks anew; what an earlier attempt left is not heard."""
    address: str
    limit_s: float = _DEFAULT_WAIT_S

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which alone prints and writes."""
        return self.rank == 0


def world_from(environment: Mapping[str, str]) -> World:
    """Read the variables that torchrun sets; raises UsageError where they are missing or wrong."""
    missing = [name for name in _REQUIRED if not environment.get(name)]
    if missing:
        raise UsageError(
            f"--parallel needs several processes, and {', '.join(missing)} are not set",
            hint="start it with torchrun: torchrun --nproc-per-node 2 -m narrowcast train ...",
        )
    rank, size = _number(environment, "RANK"), _number(environment, "WORLD_SIZE")
    if not 0 <= rank < size:
        raise UsageError(
            f"RANK is {rank} and WORLD_SIZE is {size}", hint="ranks count from 0 to WORLD_SIZE - 1"
        )
    return World(
        rank=rank,
        size=size,
        local_rank=_number(environment, "LOCAL_RANK", rank),
        attempt=_number(environment, "TORCHELASTIC_RESTART_COUNT", 0),
        address=f"{environment['MASTER_ADDR']}:{environment['MASTER_PORT']}",
        limit_s=_limit(environment.get(WAIT_LIMIT, "")),
    )


def _number(environment: Mapping[str, str], name: str, default: int = -1) -> int:
    text = environment.get(name)
    try:
        return default if text is None else int(text)
    except ValueError:
        raise UsageError(f"{name} is {text!r}", hint="torchrun sets it to a number") from None


def _limit(text: str) -> float:
    try:
        limit = float(text) if text else _DEFAULT_WAIT_S
    except ValueError:
        limit = 0.0
    if not 0 < limit < float("inf"):
        raise UsageError(f"{WAIT_LIMIT} is {text!r}", hint="it is a number of seconds, such as 300")
    return limit
