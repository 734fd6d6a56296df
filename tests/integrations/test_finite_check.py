"""Steps are refused on gradients that are not finite, whatever these are in and wherever it is."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from torch import Tensor, nn

import narrowcast
from narrowcast.errors import CheckpointError, PrecisionError
from narrowcast.integrations.finite_check import FiniteCheck
from narrowcast.integrations.host_scaler import HostScaler
from narrowcast.integrations.looks import Flags
from small_training import X, Y, is_equal, small_model

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
BAD = [math.nan, math.inf, -math.inf]


def gradient(size: int, dtype: torch.dtype, *, strided: bool = False) -> Tensor:
    """Return what a healthy gradient could be, with extremes of the format."""
    values = torch.linspace(-2, 2, max(size, 1), dtype=torch.float64).to(dtype)[:size]
    if size > 1:
        values[0] = torch.finfo(dtype).max
        values[1] = torch.finfo(dtype).smallest_normal
    return values.repeat(2, 1).t()[:, 0] if strided else values


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize(("dtype", "size"), list(product(DTYPES, [0, 1, 15, 16, 17, 1000])))
def test_a_flag_is_up_exactly_when_an_element_is_not_finite(
    dtype: torch.dtype, size: int, strided: bool
) -> None:
    """One fp32 number for each format; healthy gradients keep every bit."""
    good = gradient(size, dtype, strided=strided)
    before = good.clone()

    (flag,) = Flags().raised([good])

    assert (flag.dtype, flag.shape, flag.item()) == (torch.float32, (), 0.0)
    assert torch.equal(good, before)
    for value, place in product(BAD, {0, size // 2, size - 1} if size else set()):
        broken = gradient(size, dtype, strided=strided)
        broken[place] = value
        (flag,) = Flags().raised([good, broken])
        assert flag.item() == 1.0


def test_gradients_of_several_formats_are_told_apart() -> None:
    """A flag for each, in the order in which they come; no gradients, no flags."""
    broken = torch.tensor([math.inf], dtype=torch.bfloat16)

    flags = Flags()
    raised = flags.raised([torch.ones(2), broken, torch.ones(3)])

    assert [flag.item() for flag in raised] == [0.0, 1.0]
    flags.lower()
    assert [flag.item() for flag in flags.raised([torch.ones(2)])] == [0.0]
    assert flags.raised([]) == []


def train(scaler: FiniteCheck | torch.amp.GradScaler, break_at: int, *, late: bool) -> nn.Module:
    """Train six steps; in one of them a gradient breaks before or after unscaling."""
    model: nn.Module = small_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for i in range(6):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(X[i]), Y[i])
        scaler.scale(loss).backward()
        weight = next(model.parameters())
        assert weight.grad is not None
        if i == break_at and not late:
            weight.grad[0, 0] = math.inf
        scaler.unscale_(optimizer)
        if i == break_at and late:
            weight.grad[0, 0] = math.nan
        scaler.step(optimizer)
        scaler.update()
    return model


@pytest.mark.parametrize("late", [False, True])
def test_the_scaler_for_hosts_is_the_drop_in_with_a_faster_second_look(late: bool) -> None:
    """The same weights, state and reasons, whether gradients break before or after unscaling."""
    ours, drop_in = HostScaler("cpu"), narrowcast.GradScaler("cpu")

    assert is_equal(train(ours, 3, late=late), train(drop_in, 3, late=late))
    assert ours.state_dict() == drop_in.state_dict()
    assert [skip.step for skip in ours.skips] == [4]
    assert ours.skips[0].reason == ("non-finite gradient" if late else "gradient overflow")


def test_a_check_without_a_scale_skips_the_same_steps() -> None:
    """The ledger says which, and its state goes on."""
    check = FiniteCheck(names=small_model().named_parameters())

    model = train(check, 2, late=False)

    assert all(p.isfinite().all() for p in model.parameters())
    assert [(s.step, s.reason) for s in check.skips] == [(3, "non-finite gradient")]
    assert check.last_outcome is not None
    assert check.last_outcome.applied
    again = FiniteCheck()
    again.load_state_dict(check.state_dict())
    assert again.skips == check.skips
    assert again.state_dict() == check.state_dict()


def test_sparse_gradients_are_looked_at() -> None:
    """An embedding's sparse gradient stops a step as a dense one does."""
    table = nn.Embedding(10, 4, sparse=True)
    optimizer = torch.optim.SparseAdam(table.parameters())
    check = FiniteCheck()

    for factor in (1.0, math.inf):
        optimizer.zero_grad()
        (table(torch.tensor([1, 2, 2])).sum() * factor).backward()
        check.step(optimizer)
        check.update()

    assert [skip.step for skip in check.skips] == [2]


def step_on_nan(check: FiniteCheck, weight: nn.Parameter, steps: int) -> None:
    optimizer = torch.optim.SGD([weight], lr=0.1)
    for _ in range(steps):
        weight.grad = torch.tensor([math.nan])
        check.step(optimizer)
        check.update()


def test_eight_in_a_row_end_it_and_a_number_ends_it_sooner() -> None:
    """No scale can cure what has none, so the automatic limit counts each."""
    for limit, expected in (("auto", 8), (3, 3)):
        check = FiniteCheck(max_consecutive_skips=limit)  # type: ignore[arg-type]
        weight = nn.Parameter(torch.ones(1))
        with pytest.raises(PrecisionError, match=f"{expected} optimizer steps in a row"):
            step_on_nan(check, weight, 20)
        assert len(check.skips) == expected
        assert weight.item() == 1.0


def test_the_state_of_a_loss_scaler_is_refused() -> None:
    """It was saved in another precision, and says so."""
    with pytest.raises(CheckpointError, match="cannot be used"):
        FiniteCheck().load_state_dict(torch.amp.GradScaler("cpu").state_dict())


@pytest.mark.parametrize("late", [False, True])
def test_sparse_and_fp64_gradients_go_torchs_way(late: bool) -> None:
    """Where gradients are not all alike the scaler for hosts does what the drop-in does."""
    ends = []
    for scaler in (HostScaler("cpu"), narrowcast.GradScaler("cpu")):
        torch.manual_seed(0)
        table, wide = nn.Embedding(10, 4, sparse=True), nn.Linear(4, 2).double()
        held = [*table.parameters(), *wide.parameters()]
        optimizer = torch.optim.SGD(held, lr=0.1)
        for i in range(4):
            optimizer.zero_grad()
            out = wide(table(torch.tensor([1, 2, 2])).double())
            scaler.scale(out.square().sum()).backward()
            assert wide.weight.grad is not None
            if i == 2 and not late:
                wide.weight.grad[0, 0] = math.inf
            scaler.unscale_(optimizer)
            if i == 2 and late:
                wide.weight.grad[0, 0] = math.nan
            scaler.step(optimizer)
            scaler.update()
        ends.append(([p.detach() for p in held], scaler.state_dict()))

    (ours, our_state), (theirs, their_state) = ends
    assert all(map(torch.equal, ours, theirs))
    assert our_state == their_state
    assert our_state["narrowcast"]["ledger"]["skips"][0]["step"] == 3
