"""Outcomes of steps, the ledger, and when a row of skips is hopeless."""

from __future__ import annotations

import math
import pickle

import pytest
import torch
from torch import nn

from narrowcast.errors import PrecisionError
from narrowcast.records.run import SkippedStep, SkipReason
from narrowcast.scaling.skips import (
    SkipLedger,
    SkipLimit,
    SkipRow,
    StepOutcome,
    nonfinite_parameters,
    skip_reason,
    stuck_error,
)


def skip_of(reason: SkipReason = "gradient overflow", *, scale: float = 8.0) -> SkippedStep:
    return SkippedStep(step=1, reason=reason, loss_scale=scale, parameters=("w",))


def an_optimizer() -> torch.optim.Optimizer:
    return torch.optim.SGD([nn.Parameter(torch.zeros(2))])


def test_an_outcome_is_true_when_the_step_was_applied() -> None:
    """Truth, reason and parameters say the same."""
    applied, skipped = StepOutcome(3), StepOutcome(4, skip_of())

    assert (bool(applied), applied.applied, applied.reason, applied.parameters) == (
        (True, True, "", ())
    )
    assert (bool(skipped), skipped.applied, skipped.reason, skipped.parameters) == (
        (False, False, "gradient overflow", ("w",))
    )
    assert repr(skipped) == "<StepOutcome 4: skipped: gradient overflow>"


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ((0, 0, 0), ""),
        ((0, 0, 1), ""),
        ((1, 0, 0), "gradient overflow"),
        ((2, 1, 0), "gradient overflow"),
        ((0, 1, 0), "non-finite gradient"),
        ((1, 0, 1), "non-finite loss"),
        ((0, 1, 1), "non-finite loss"),
    ],
)
def test_flags_on_the_device_mean_what_the_host_decides(
    flags: tuple[int, int, int], reason: str
) -> None:
    """An unread outcome settles to the reason that `skip_reason` gives for the same facts."""
    outcome = StepOutcome(1, flags=torch.tensor([*flags, 8.0]))
    overflow, broken, bad_loss = (bool(flag) for flag in flags)

    assert outcome.flags is not None
    assert outcome.reason == reason
    assert outcome.flags is None
    assert skip_reason(overflow=overflow, broken=broken, bad_loss=bad_loss) == reason
    assert outcome.skip is None or outcome.skip.loss_scale == 8.0


@pytest.mark.parametrize(
    ("skipped", "incurable", "limit", "too_long"),
    [
        (100, 7, "auto", False),
        (8, 8, "auto", True),
        (2, 0, 3, False),
        (3, 0, 3, True),
        (10_000, 10_000, None, False),
    ],
)
def test_how_long_a_row_may_get(
    skipped: int, incurable: int, limit: SkipLimit, too_long: bool
) -> None:
    """'auto' counts what no scale cures, a number counts all, None never gives up."""
    assert SkipRow(skipped=skipped, incurable=incurable).is_too_long(limit) is too_long


def test_an_applied_step_ends_the_row() -> None:
    """Rows count consecutive skips only."""
    row = SkipRow().after_skip(curable=True).after_skip(curable=False)

    assert row == SkipRow(skipped=2, incurable=1)
    assert row.after_applied() == SkipRow()


@pytest.mark.parametrize("reason", ["gradient overflow", "non-finite gradient", "non-finite loss"])
def test_the_error_names_step_scale_parameters_and_a_way_out(reason: SkipReason) -> None:
    """What a person needs at 2 a.m.: where, how large the scale was, and what to try."""
    last = SkippedStep(step=41, reason=reason, loss_scale=4.0, parameters=("block.0.w", "head"))

    error = stuck_error(SkipRow(skipped=9, incurable=8), last)

    assert isinstance(error, PrecisionError)
    for part in ("9 optimizer steps", "step 41", "loss scale 4", reason):
        assert part in error.message
    # A loss that is not finite makes every gradient so: then it is none of the parameters.
    assert ("block.0.w, head" in error.message) == (reason != "non-finite loss")
    assert ("in the batch" in error.hint) == (reason == "non-finite loss")


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_parameters_with_nonfinite_gradients_are_named(bad: float, dtype: torch.dtype) -> None:
    """One bad element is enough, in any dtype; parameters without a gradient are passed over."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(2, 2)).to(dtype)
    optimizer = torch.optim.SGD(model.parameters())
    names = {id(p): name for name, p in model.named_parameters()}
    for parameter in [*model[0].parameters(), *model[1].parameters()]:
        parameter.grad = torch.ones_like(parameter)
    model[0].weight.grad[2, 1] = bad
    model[1].bias.grad[0] = bad

    found = nonfinite_parameters(optimizer, names)

    assert found == ("1.bias", "0.weight"), "nearest the loss first"


def test_a_parameter_without_a_name_is_described() -> None:
    """Group, index and shape find it when no names were given."""
    parameters = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(5, 3))]
    optimizer = torch.optim.SGD([{"params": parameters[:1]}, {"params": parameters[1:]}])
    parameters[1].grad = torch.full((5, 3), math.nan)

    assert nonfinite_parameters(optimizer, {}) == ("group 1 parameter 0 of shape (5, 3)",)


def test_at_most_eight_parameters_are_named() -> None:
    """A model with thousands of bad gradients gives a message that can be read."""
    parameters = [nn.Parameter(torch.zeros(1)) for _ in range(20)]
    for parameter in parameters:
        parameter.grad = torch.tensor([math.nan])

    assert len(nonfinite_parameters(torch.optim.SGD(parameters), {})) == 8


def test_sparse_gradients_are_looked_into() -> None:
    """The values of a sparse gradient count."""
    parameter = nn.Parameter(torch.zeros(4, 2))
    indices, values = torch.tensor([[1]]), torch.tensor([[1.0, math.inf]])
    parameter.grad = torch.sparse_coo_tensor(indices, values, (4, 2), check_invariants=False)

    assert nonfinite_parameters(torch.optim.SGD([parameter]), {id(parameter): "e"}) == ("e",)


def test_an_optimizer_without_gradients_names_nothing() -> None:
    """No gradient, no name."""
    assert nonfinite_parameters(an_optimizer(), {}) == ()


def test_the_ledger_counts_rows_over_steps() -> None:
    """Above the floor an overflow is curable, at the floor it is not; an applied step ends it."""
    ledger, optimizer = SkipLedger(), an_optimizer()
    for scale in (4.0, 2.0, 1.0):
        ledger.record(optimizer, skip_of(scale=scale))
        ledger.close(floor=1.0)

    assert (ledger.steps, ledger.row) == (3, SkipRow(skipped=3, incurable=1))
    ledger.record(optimizer, None)
    assert ledger.close(floor=1.0) is None
    assert (ledger.steps, ledger.row) == (4, SkipRow())
    assert len(ledger.skips) == 3


def test_a_step_with_one_skipped_optimizer_of_two_counts_as_skipped() -> None:
    """The generator's steps do not hide that the discriminator never steps."""
    ledger = SkipLedger()
    ledger.record(an_optimizer(), skip_of("non-finite loss"))
    ledger.record(an_optimizer(), None)

    assert ledger.close(floor=1.0) == skip_of("non-finite loss")
    assert ledger.row == SkipRow(skipped=1, incurable=1)


def test_a_step_without_attempts_leaves_the_row_alone() -> None:
    """`update` after `unscale_` alone is neither applied nor skipped."""
    ledger = SkipLedger()
    ledger.record(an_optimizer(), skip_of())
    ledger.close(floor=1.0)

    ledger.close(floor=1.0)
    assert ledger.row == SkipRow(skipped=1)


def test_unread_outcomes_are_read_sixteen_at_a_time() -> None:
    """Closing a step decided on the device reads nothing until the sixteenth; asking reads all."""
    ledger, optimizer = SkipLedger(), an_optimizer()
    outcomes = []
    for _ in range(15):
        ledger.record_unread(optimizer, torch.tensor([1.0, 0.0, 0.0, 2.0]))
        outcomes.append(ledger.last)
        assert ledger.close(floor=1.0) is None

    assert all(outcome is not None and outcome.flags is not None for outcome in outcomes)
    ledger.record_unread(optimizer, torch.tensor([1.0, 0.0, 0.0, 2.0]))
    assert ledger.close(floor=1.0) is not None
    assert ledger.row.skipped == 16
    assert [skip.step for skip in ledger.skips] == list(range(1, 17))


def test_the_ledger_shows_unread_skips_when_asked() -> None:
    """`skips` is complete at any time, also within the step under way."""
    ledger = SkipLedger()
    for flag in (1.0, 0.0, 1.0):
        ledger.record_unread(an_optimizer(), torch.tensor([flag, 0.0, 0.0, 2.0]))
        ledger.close(floor=1.0)
    ledger.record_unread(an_optimizer(), torch.tensor([1.0, 0.0, 0.0, 2.0]))

    assert [skip.step for skip in ledger.skips] == [1, 3, 4]


def test_the_ledger_survives_saving_and_pickling() -> None:
    """Steps, row and skips come back; attributes that are not state do not matter."""
    ledger = SkipLedger()
    for skip in (skip_of(), None, skip_of("non-finite loss")):
        ledger.record(an_optimizer(), skip)
        ledger.close(floor=1.0)

    for copy in (SkipLedger.from_dict(ledger.to_dict()), pickle.loads(pickle.dumps(ledger))):
        assert (copy.steps, copy.row, copy.skips) == (ledger.steps, ledger.row, ledger.skips)
