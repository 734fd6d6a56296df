"""Deterministic kernels only, for a block, with everything given back."""

from __future__ import annotations

import os

import pytest
import torch
import torch.utils.deterministic

from narrowcast.errors import RecipeError
from narrowcast.precision.speed import thread_count
from narrowcast.training.determinism import deterministic


def settings() -> tuple[object, ...]:
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
        torch.backends.cudnn.benchmark,
        os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
    )


def test_the_switches_hold_inside_and_are_as_before_outside(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also when the caller had set some of them, and when the block raises."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        before = settings()
        with deterministic():
            inside = settings()
        with pytest.raises(ZeroDivisionError), deterministic():
            _ = 1 / 0

        assert inside == (True, False, False, False, ":4096:8")
        assert settings() == before
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_workspace_that_the_user_chose_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """:16:8 is deterministic as well, and smaller."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")

    with deterministic():
        inside = os.environ["CUBLAS_WORKSPACE_CONFIG"]

    assert inside == os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"


def test_an_operation_without_a_deterministic_kernel_is_the_recipes_error() -> None:
    """torch's refusal names the operation; ours adds the way out. The CPU has such an operation."""
    source = torch.ones(2, 3)

    with pytest.raises(RecipeError, match="put_") as caught, deterministic():
        torch.zeros(4).put_(torch.tensor([0, 0]), source[0, :2], accumulate=False)

    assert "--no-deterministic" in caught.value.hint


def test_other_errors_pass() -> None:
    """Only torch's refusal is translated."""
    with pytest.raises(RuntimeError, match="mat1 and mat2"), deterministic():
        torch.zeros(2, 3) @ torch.zeros(2, 3)


def test_the_number_of_threads_is_given_back() -> None:
    """Inside the asked one, outside the caller's."""
    before = torch.get_num_threads()

    with thread_count(before + 1):
        inside = torch.get_num_threads()

    assert (inside, torch.get_num_threads()) == (before + 1, before)
