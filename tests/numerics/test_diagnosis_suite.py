"""The diagnosis says what is true of the planted faults, and accuses nobody else.

One case of each kind, and all healthy runs; `benchmarks/diagnosis.py` runs all cases and prints the
table, which takes a quarter of an hour.
"""

from __future__ import annotations

import math

import pytest
import torch

import narrowcast
from faults.catalogue import CASES, FAULTS, FP32_TOO, HEALTHY, Case
from faults.truth import shows, training
from narrowcast.records.diagnosis import DiagnosisRecord

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

ONE_OF_A_KIND = (
    "gpt-massive", "resnet-response", "mlp-quotient", "mlp-second-task", "mlp-small-rate",
    "vit-unit-patches", "series-time-bf16", "series-account", "mlp-rising-weight",
    "mlp-falling-weight", "t5-empty-texts",
)  # fmt: skip
WITH_A_SET = ("mlp-two-strong", "t5-last-wo", "moe-penalty", "moe-bias", "gpt-products")


@pytest.fixture(autouse=True)
def _one_thread() -> object:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def diagnosed(case: Case, *, minimal_fp32: bool = False) -> DiagnosisRecord:
    return narrowcast.diagnose(
        case.path, case.precision, case.options, steps=case.steps, minimal_fp32=minimal_fp32
    )


def named(name: str) -> Case:
    return next(case for case in CASES if case.name == name)


@pytest.mark.parametrize("case", HEALTHY, ids=lambda case: case.name)
def test_a_healthy_run_is_not_accused(case: Case) -> None:
    """Fine, and nothing else: neither a fault nor a doubt."""
    assert diagnosed(case).verdict in case.kinds


@pytest.mark.parametrize(
    "case", [case for case in FAULTS if case.kinds == FP32_TOO], ids=lambda case: case.name
)
def test_what_fails_in_fp32_too_is_not_blamed_on_precision(case: Case) -> None:
    """A rate, data or a bug: whatever the precision did besides."""
    assert diagnosed(case).verdict == "not a precision problem"


@pytest.mark.parametrize("name", ONE_OF_A_KIND)
def test_the_culprit_is_named_first(name: str) -> None:
    """The verdict and the module are right in the top rank."""
    case, record = named(name), diagnosed(named(name))

    assert record.verdict in case.kinds
    assert not case.modules or record.finding.module in case.modules


@pytest.mark.parametrize("name", WITH_A_SET)
def test_the_smallest_set_is_the_planted_one_and_cures(name: str) -> None:
    """Within 3 (k + 2) log2 N replays; a training with exactly it, without us, has no symptom."""
    case = named(name)
    record = diagnosed(case, minimal_fp32=True)
    found = record.minimal_fp32
    assert found is not None
    assert case.minimal is not None

    right = {frozenset(names) for names in (case.minimal, *case.as_small)}
    assert frozenset(found.modules) in right
    assert all(each.failed for each in found.dropped)
    bound = 3 * (len(found.keep_fp32) + 2) * math.log2(found.candidates)
    assert found.oracle_calls <= bound
    cured = training(case, case.precision, found.keep_fp32)
    assert not cured.breaks
    assert not shows(case, cured, training(case, "fp32"))
