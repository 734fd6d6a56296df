"""What was changed behind an optimizer's back is refused, and what can be kept is kept."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch
from torch import nn

from narrowcast.errors import NarrowcastError, UsageError
from narrowcast.optim.adamw import AdamW
from narrowcast.optim.convert import narrowed, rounded_state
from narrowcast.optim.sgd import SGD
from narrowcast.optim.states import STATE_STORES
from narrowcast.optim.weights import WEIGHT_STORES
from optim_cases import give_gradients, held, parameters, same_bits, train

SHAPES = [(70, 70), (5,)]


@pytest.mark.parametrize("new", STATE_STORES)
@pytest.mark.parametrize("old", STATE_STORES)
def test_a_state_store_is_not_exchanged_under_a_state(old: str, new: str) -> None:
    """Codes of one width would be read as those of another; nothing is stepped or counted."""
    owned = parameters([(70, 70)])
    optimizer = AdamW(owned, weights="split16", states=old)
    train(optimizer, owned, range(2))
    before = held(optimizer)
    optimizer.param_groups[0]["states"] = new
    if new == old:
        train(optimizer, owned, range(2, 3))
        return
    with pytest.raises(UsageError, match=r"(?s)of shape \(70, 70\) holds exp_avg.*rounded_state"):
        train(optimizer, owned, range(2, 3))

    assert same_bits(held(optimizer), before)
    assert optimizer.state[owned[0]]["step"] == 2


@pytest.mark.parametrize("new", WEIGHT_STORES)
@pytest.mark.parametrize("old", WEIGHT_STORES)
def test_a_weight_store_is_not_exchanged_under_a_weight(old: str, new: str) -> None:
    """A remainder of 16 bits would be read as one of 8, or be forgotten."""
    owned = parameters(SHAPES)
    optimizer = AdamW(owned, weights=old)
    train(optimizer, owned, range(2))
    before = held(optimizer)
    optimizer.param_groups[0]["weights"] = new
    if new == old:
        train(optimizer, owned, range(2, 3))
        return
    with pytest.raises(UsageError, match=r"remainder|holds torch"):
        train(optimizer, owned, range(2, 3))
    with pytest.raises(UsageError, match=r"remainder|holds torch"):
        optimizer.master(owned[0])

    assert same_bits(held(optimizer), before)


def test_the_way_that_the_error_names_works() -> None:
    """Another optimizer with the new stores, and the rounded state of the old one."""
    owned = parameters(SHAPES)
    old = AdamW(owned, weights="split16", states="int8")
    train(old, owned, range(3))
    masters = [old.master(p) for p in owned]
    saved = old.state_dict()
    new = AdamW(owned, weights="split16", states="int4")
    new.load_state_dict(rounded_state(new, saved))

    assert all(torch.equal(new.master(p), m) for p, m in zip(owned, masters, strict=True))
    train(new, owned, range(3, 4))
    assert new.state[owned[0]]["step"] == 4


@pytest.mark.parametrize(
    ("weights", "convert"), [("fp32", "bfloat16"), ("split16", "float"), ("stochastic", "float")]
)
def test_a_model_converted_after_its_optimizer_was_built_is_refused(
    weights: str, convert: str
) -> None:
    """At the next step, by name; it would be rounded to nearest, or not fit its remainder."""
    model = nn.Linear(70, 70)
    optimizer = AdamW(model.parameters(), weights=weights)
    getattr(model, convert)()
    give_gradients(list(model.parameters()), 0)
    with pytest.raises(UsageError, match="convert the model"):
        optimizer.step()


def test_a_state_that_was_cleared_is_refused() -> None:
    """The remainder was in it."""
    owned = parameters(SHAPES)
    optimizer = AdamW(owned, weights="split16")
    optimizer.state.clear()
    with pytest.raises(UsageError, match="has no remainder"):
        train(optimizer, owned, range(1))


def test_momentum_may_begin_and_end() -> None:
    """A moment that was not kept before is made; one that is not used any more stays."""
    owned = parameters([(70, 70)])
    optimizer = SGD(owned, lr=0.1, states="int8")
    for momentum in (0.0, 0.9, 0.0):
        optimizer.param_groups[0]["momentum"] = momentum
        train(optimizer, owned, range(1))


@pytest.mark.parametrize(
    "bad",
    [
        {"params": [nn.Parameter(torch.zeros(3, dtype=torch.float64))]},
        {"params": [nn.Parameter(torch.zeros(3))], "weights": "split17"},
        {"params": [nn.Parameter(torch.zeros(3))], "lr": -1.0},
    ],
)
def test_a_refused_constructor_changes_nothing(bad: dict[str, Any]) -> None:
    """All groups are looked at before the first is put into its store."""
    owned = parameters(SHAPES)
    before = [p.detach().clone() for p in owned]
    with pytest.raises(NarrowcastError):
        AdamW([{"params": owned}, bad], weights="split16")

    assert all(torch.equal(p, b) and p.dtype is b.dtype for p, b in zip(owned, before, strict=True))
    optimizer = AdamW(owned, weights="split16")
    assert all(torch.equal(optimizer.master(p), b) for p, b in zip(owned, before, strict=True))


def test_a_refused_conversion_changes_nothing() -> None:
    """Neither parameters nor the groups of torch's optimizer."""
    owned = parameters(SHAPES)
    theirs = torch.optim.AdamW(owned, betas=(torch.tensor(0.9), torch.tensor(0.99)), foreach=False)
    before = dict(theirs.param_groups[0])
    with pytest.raises(UsageError, match="is a tensor"):
        narrowed(theirs, weights="split16", states="int8")

    assert theirs.param_groups[0] == before
    assert all(p.dtype is torch.float32 for p in owned)


def test_a_group_with_a_parameter_twice_is_refused() -> None:
    """It would step twice on one state, where torch warns."""
    (owned,) = parameters([(5,)])
    with pytest.warns(UserWarning, match="duplicate"), pytest.raises(UsageError, match="twice"):
        AdamW([owned, owned], weights="split16")
    assert owned.dtype is torch.float32


@pytest.mark.parametrize("later", ["split16", "split8", "stochastic"])
@pytest.mark.parametrize("copied", [False, True])
def test_a_second_optimizer_takes_the_masters_over(later: str, copied: bool) -> None:
    """A second phase, or a cell run twice: no master loses bits, and the first steps no more."""
    owned = parameters(SHAPES)
    first = AdamW(owned, weights="split16", states="int8")
    train(first, owned, range(2))
    if copied:
        first = copy.deepcopy(first)
        owned = first.param_groups[0]["params"]
    masters = [first.master(p).clone() for p in owned]
    second = AdamW(owned, weights=later)

    for p, master in zip(owned, masters, strict=True):
        if later == "split16":
            assert torch.equal(second.master(p), master)
        else:  # rounded to nearest: to 24 bits, or to the 8 of bf16
            bits = 16 if later == "split8" else 8
            torch.testing.assert_close(second.master(p), master, rtol=2.0**-bits * 1.01, atol=0)
    with pytest.raises(UsageError, match="later optimizer"):
        train(first, owned, range(2, 3))
    with pytest.raises(UsageError, match="later optimizer"):
        first.master(owned[0])
    train(second, owned, range(2, 3))


def test_a_remainder_of_weights_that_were_changed_since_is_not_taken_over() -> None:
    """Weights that were loaded in between are what they are."""
    owned = parameters(SHAPES)
    first = AdamW(owned, weights="split16")
    train(first, owned, range(2))
    with torch.no_grad():
        for p in owned:
            p.copy_(torch.ones_like(p))
    second = AdamW(owned, weights="split16")

    assert all(torch.equal(second.master(p), torch.ones(p.shape)) for p in owned)
    assert isinstance(first, AdamW)  # it is alive until here


def test_an_optimizer_that_is_gone_leaves_bf16_weights() -> None:
    """Its remainders went with it: what is known of a weight then is its bf16 number."""
    owned = parameters(SHAPES)
    AdamW(owned, weights="split16")
    gc.collect()
    second = AdamW(owned, weights="split16")

    assert all(torch.equal(second.master(p), p.detach().float()) for p in owned)


def test_a_remainder_of_a_weight_in_other_memory_is_not_taken_over() -> None:
    """``parameter.data = ...`` moves no version; that the memory is another is seen."""
    owned = parameters(SHAPES)
    first = AdamW(owned, weights="split16")
    train(first, owned, range(2))
    for p in owned:
        p.data = torch.ones_like(p)
    second = AdamW(owned, weights="split16")

    assert all(torch.equal(second.master(p), torch.ones(p.shape)) for p in owned)
    assert isinstance(first, AdamW)  # it is alive until here


@pytest.mark.parametrize(
    ("shape", "strides", "is_refused"),
    [
        ((4, 4), (1, 1), True),
        ((4, 4), (4, 1), False),
        ((3, 2), (2, 1), False),
        ((2, 3), (0, 1), True),
        ((2, 1), (1, 0), False),
        ((2, 3), (3, 2), False),  # 0, 2, 4 and 3, 5, 7: woven, and no two in one place
        ((2, 3), (4, 2), True),
        ((3, 3), (5, 1), False),  # with holes
        ((0, 3), (1, 1), False),
    ],
)
def test_elements_that_share_memory_are_refused(
    shape: tuple[int, ...], strides: tuple[int, ...], is_refused: bool
) -> None:
    """Two elements in one place would step twice."""
    owned = nn.Parameter(torch.randn(16).as_strided(shape, strides))
    if is_refused:
        with pytest.raises(UsageError, match="share memory"):
            AdamW([owned])
    else:
        assert AdamW([owned]).master(owned) is not None
