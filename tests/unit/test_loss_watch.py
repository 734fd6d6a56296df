"""Losses held unread: which of them count as bad, and what holding costs."""

from __future__ import annotations

import math
import weakref

import pytest
import torch
from torch import Tensor

from narrowcast.scaling.loss_watch import LossWatch

CPU = torch.device("cpu")


def was_bad(*losses: object) -> bool:
    watch = LossWatch()
    for loss in losses:
        watch.passing(loss)
    answer = watch.was_bad(CPU)

    assert (answer.shape, answer.dtype) == ((), torch.float32)
    return bool(answer)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("value", [0.0, -1.0, 6e4])
@pytest.mark.parametrize("shape", [(), (1,), (5,), (2, 3), (0,)])
def test_finite_losses_are_not_bad(dtype: torch.dtype, value: float, shape: tuple[int]) -> None:
    """In every dtype and shape, empty ones too."""
    assert not was_bad(torch.full(shape, value, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("shape", [(), (1,), (5,), (2, 3)])
def test_one_bad_element_is_enough(dtype: torch.dtype, value: float, shape: tuple[int]) -> None:
    """Infinity of either sign and NaN count, wherever they stand in what is scaled."""
    loss = torch.zeros(shape, dtype=dtype)
    loss.view(-1)[-1] = value

    assert was_bad(loss)
    assert was_bad(torch.tensor(1.0), loss, torch.tensor(2.0))


def test_a_finite_fp64_loss_beyond_fp32_is_not_bad() -> None:
    """1e300 is finite, though not in the dtype of the answer."""
    assert not was_bad(torch.tensor(1e300, dtype=torch.float64))


def test_containers_are_looked_into() -> None:
    """A list or tuple of losses, nested too, as `GradScaler.scale` takes them."""
    bad = torch.tensor(math.nan)

    assert was_bad([torch.tensor(1.0), (torch.tensor(1.0), bad)])
    assert not was_bad([torch.tensor(1.0), (torch.tensor(1.0),)])


def test_a_lazy_iterable_stays_lazy() -> None:
    """Nothing is taken from a generator before its user takes it, and each loss is held then."""
    watch, taken = LossWatch(), []

    def losses() -> object:
        for value in (1.0, math.nan):
            taken.append(value)
            yield torch.tensor(value)

    passed = watch.passing(losses())

    assert taken == []
    assert len(list(passed)) == 2
    assert watch.was_bad(CPU)


@pytest.mark.parametrize("other", [None, 3, torch.tensor(3), torch.tensor(True)])
def test_what_is_no_floating_loss_is_passed_through(other: object) -> None:
    """Integers have no NaN; objects that torch will refuse are left to torch."""
    assert LossWatch().passing(other) is other
    assert not was_bad(other)


@pytest.mark.parametrize("count", [31, 32, 33, 100])
@pytest.mark.parametrize("bad_at", [0, 30, -1])
def test_many_micro_batches_are_folded(count: int, bad_at: int) -> None:
    """However many losses one step has, few tensors are held, and no bad one is forgotten."""
    losses = [torch.tensor(1.0) for _ in range(count)]
    losses[bad_at] = torch.tensor(math.inf)
    watch = LossWatch()
    for loss in losses:
        watch.passing(loss)

    assert len(watch._held) <= 32
    assert watch.was_bad(CPU)


def test_clearing_forgets() -> None:
    """The next step starts without the last one's losses."""
    watch = LossWatch()
    watch.passing(torch.tensor(math.nan))

    watch.clear()
    assert not watch.was_bad(CPU)


def test_holding_a_loss_does_not_hold_its_graph() -> None:
    """Only the number is kept: the activations behind it are freed with the loss."""
    weight, watch = torch.ones(3, requires_grad=True), LossWatch()

    def forward() -> weakref.ref[Tensor]:
        activation = weight * 2
        watch.passing((activation * activation).sum())
        return weakref.ref(activation)

    assert forward()() is None


def test_several_ranks_do_not_decide_by_their_own_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bad loss on one rank would set its scale apart from the others', so it is not used."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)

    assert not was_bad(torch.tensor(math.nan))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(), (1,), (5,), (0,)])
@pytest.mark.parametrize("value", [1.0, math.inf, -math.inf, math.nan])
def test_a_loss_that_is_noted_counts_as_one_that_is_held(
    dtype: torch.dtype, shape: tuple[int], value: float
) -> None:
    """One number on a CPU is read at once; whatever comes after, the answer is the same."""
    loss, good = torch.full(shape, value, dtype=dtype), torch.tensor(2.0)
    noted, held = LossWatch(), LossWatch()
    for each in (good, loss, good):
        noted.note(each)
        held.hold(each)

    assert torch.equal(noted.was_bad(CPU), held.was_bad(CPU))
    noted.clear()
    assert not noted.was_bad(CPU)
