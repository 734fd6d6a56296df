"""Every random state that a training draws from: seeded, saved and restored together.

A stream is named by what it is for, so that building the model, training and evaluating never
shift each other's random numbers, whatever one of them draws.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from narrowcast.errors import CheckpointError

__all__ = ["isolated", "random_state", "restore_random_state", "seed_everything"]


def seed_everything(seed: int, purpose: str) -> None:
    """Seed Python, numpy and torch (the CPU and every CUDA device) for one purpose."""
    digest = hashlib.sha256(f"{seed}:{purpose}".encode()).digest()
    number = int.from_bytes(digest[:4], "big")  # numpy takes 32 bits
    random.seed(number)
    np.random.seed(number)  # noqa: NPY002 -- the global state is what a user's recipe draws from
    torch.manual_seed(number)


def random_state() -> dict[str, Any]:
    """Return all random states; CUDA's only once CUDA is used."""
    numpy_state = dict(np.random.get_state(legacy=False))  # noqa: NPY002 -- see above
    used = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return {
        "python": random.getstate(),
        "numpy": numpy_state,
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if used else [],
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """Set all random states to what `random_state` returned.

    Raises CheckpointError if it holds the states of another number of CUDA devices.
    """
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])  # noqa: NPY002 -- see above
    torch.set_rng_state(state["torch"])
    if not state["cuda"]:
        return
    if torch.cuda.device_count() != len(state["cuda"]):
        raise CheckpointError(
            f"the checkpoint holds random states of {len(state['cuda'])} CUDA devices, "
            f"and this machine has {torch.cuda.device_count()}",
            hint="make the same devices visible (CUDA_VISIBLE_DEVICES) to continue exactly",
        )
    torch.cuda.set_rng_state_all(state["cuda"])


@contextmanager
def isolated(seed: int, purpose: str) -> Iterator[None]:
    """Run the block on a stream of its own, and give the outer streams back untouched."""
    state = random_state()
    seed_everything(seed, purpose)
    try:
        yield
    finally:
        restore_random_state(state)
