"""What a run says of the budget that its plan was found for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from narrowcast.records.codec import loads
from narrowcast.records.run import RunRecord
from narrowcast.training.budget import budget_not_kept

RUN = loads(RunRecord, (Path(__file__).parents[1] / "golden" / "run.json").read_text())


def test_a_run_without_a_budget_says_nothing() -> None:
    """As all runs before."""
    assert budget_not_kept(replace(RUN, budget_bytes=None)) == ""


@pytest.mark.parametrize("peak", [999, 1000])
def test_a_peak_within_the_budget_is_as_promised(peak: int) -> None:
    """To the byte."""
    assert budget_not_kept(replace(RUN, budget_bytes=1000, peak_bytes=peak, memory=None)) == ""


def test_a_peak_above_the_budget_is_told_with_both_figures() -> None:
    """And by how much."""
    said = budget_not_kept(replace(RUN, budget_bytes=1000, peak_bytes=1250, memory=None))

    assert said == "the peak of 1,250 bytes exceeded the budget of 1,000 by 250 (25.0%)"


def test_on_a_gpu_what_the_allocator_reserved_counts() -> None:
    """That is what was planned for; what tensors took is less."""
    assert RUN.memory is not None
    reserved = replace(RUN.memory, reserved_bytes=1100)

    assert "1,100" in budget_not_kept(
        replace(RUN, budget_bytes=1000, peak_bytes=900, memory=reserved)
    )


def test_a_budget_that_was_not_checked_is_not_passed_over() -> None:
    """`--no-measure` on a CPU."""
    said = budget_not_kept(replace(RUN, budget_bytes=1000, peak_bytes=None, memory=None))

    assert "was not checked" in said
