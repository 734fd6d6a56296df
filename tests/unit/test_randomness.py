"""All random states are seeded, saved and restored together."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from narrowcast.errors import CheckpointError
from narrowcast.randomness import (
    isolated,
    random_state,
    restore_random_state,
    seed_everything,
)
from narrowcast.training.state_tree import pack, unpack


def draw() -> tuple[float, float, float, float]:
    """One number of each source, and one Gaussian, of which Python keeps the second for later."""
    of_numpy = float(np.random.rand())  # noqa: NPY002 -- the global state is what is tested
    return (random.random(), random.gauss(0, 1), of_numpy, float(torch.rand(())))


def test_the_state_brings_back_the_same_numbers() -> None:
    """Also through a checkpoint's encoding, and in the middle of a Gaussian pair."""
    seed_everything(3, "test")
    draw()
    data, tensors = pack(random_state())
    expected = [draw() for _ in range(3)]
    seed_everything(4, "test")

    restore_random_state(unpack(data, tensors))

    assert [draw() for _ in range(3)] == expected


def test_streams_depend_on_seed_and_purpose() -> None:
    """The stream of the weights is not that of dropout, and seeds differ."""
    drawn = []
    for seed, purpose in ((0, "model"), (0, "training"), (1, "model"), (0, "model")):
        seed_everything(seed, purpose)
        drawn.append(draw())

    assert drawn[0] == drawn[3]
    assert len(set(drawn)) == 3


def test_an_isolated_block_leaves_no_trace() -> None:
    """Evaluating, whatever it draws, never shifts the numbers of the training."""
    seed_everything(0, "training")
    expected = draw()
    seed_everything(0, "training")

    with isolated(0, "evaluation"):
        inside = draw()

    assert draw() == expected
    assert inside != expected


def test_an_isolated_block_that_raises_gives_the_states_back() -> None:
    """An error in a user's metric does not change what a caller draws next."""
    seed_everything(0, "training")
    expected = draw()
    seed_everything(0, "training")

    with pytest.raises(ZeroDivisionError), isolated(0, "evaluation"):
        _ = draw()[0] / 0

    assert draw() == expected


def test_states_of_absent_devices_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run of two GPUs does not go on with one stream missing."""
    state = {**random_state(), "cuda": [torch.get_rng_state()] * 2}
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)

    with pytest.raises(CheckpointError, match="2 CUDA devices, and this machine has 1"):
        restore_random_state(state)
