"""The planted faults are faults, and the healthy runs healthy: told without the diagnosis."""

from __future__ import annotations

import math

import pytest
import torch

from faults.catalogue import CASES, FAULTS, FP32_TOO, HEALTHY, Case
from faults.truth import is_well, shows, training
from narrowcast.errors import RecipeError

pytestmark = pytest.mark.slow

OF_PRECISION = [case for case in FAULTS if case.kinds != FP32_TOO]
WITH_A_SET = [case for case in OF_PRECISION if case.minimal]


@pytest.fixture(autouse=True)
def _one_thread() -> object:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def by_name(cases: object) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


def test_the_suite_is_as_large_as_was_promised() -> None:
    """At least 30 faults of all ten kinds and 15 healthy runs, each with a name of its own."""
    kinds = {case.kinds[0] for case in FAULTS}

    assert len(FAULTS) >= 30
    assert len(HEALTHY) >= 15
    assert len(kinds) == 10
    assert len({case.name for case in CASES}) == len(CASES)


@by_name(OF_PRECISION)
def test_fp32_trains_and_the_precision_fails(case: Case) -> None:
    """In fp32 the loss comes down; in the case's precision the symptom is there."""
    reference = training(case, "fp32")
    assert not reference.breaks
    if case.symptom == "raises":
        with pytest.raises(RecipeError):
            training(case, case.precision)
        return
    found = training(case, case.precision)

    assert not shows(case, reference, reference)
    assert shows(case, found, reference)
    if case.symptom in ("breaks", "learns less"):
        assert reference.loss_after < reference.loss_before


@by_name(WITH_A_SET)
def test_the_minimal_set_cures_and_no_smaller_one_does(case: Case) -> None:
    """With the set in fp32 the training works, and with any one of its modules given back not."""
    reference = training(case, "fp32")
    assert case.minimal is not None

    assert is_well(case, training(case, case.precision, case.minimal), reference)
    for other in case.as_small:
        assert len(other) == len(case.minimal)
        assert not shows(case, training(case, case.precision, other), reference)
    for module in case.minimal:
        rest = tuple(name for name in case.minimal if name != module)
        assert shows(case, training(case, case.precision, rest), reference)


@by_name([case for case in FAULTS if case.kinds == FP32_TOO])
def test_what_is_no_precision_problem_fails_in_fp32_too(case: Case) -> None:
    """fp32 breaks on the same data, though perhaps at another step."""
    assert training(case, "fp32").breaks
    assert training(case, case.precision).breaks


@by_name(HEALTHY)
def test_a_healthy_run_trains_as_fp32_does(case: Case) -> None:
    """No loss that is no number, few skips, and the loss comes down as far as in fp32."""
    reference = training(case, "fp32")
    found = training(case, case.precision)

    assert not reference.breaks
    assert is_well(case, found, reference)
    assert all(math.isfinite(loss) for loss in found.losses)
