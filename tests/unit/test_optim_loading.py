"""States of one store loaded into another: converted where exact, refused where not."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from narrowcast.errors import UnknownName, UsageError
from narrowcast.optim.adamw import AdamW
from narrowcast.optim.convert import rounded_state
from narrowcast.optim.sgd import SGD
from narrowcast.optim.states import STATE_STORES
from optim_cases import RULES, held, parameters, same_bits, train

SHAPES = [(70, 70), (5,)]


def trained(weights: str, states: str, rule: str = "AdamW") -> tuple[Any, list[nn.Parameter]]:
    make, options = RULES[rule]
    owned = parameters(SHAPES)
    optimizer = make(owned, **options, weights=weights, states=states)
    train(optimizer, owned, range(3))
    return optimizer, owned


def states_of(optimizer: Any, key: str = "exp_avg") -> list[torch.Tensor]:
    return [optimizer.state[p][key] for g in optimizer.param_groups for p in g["params"]]


@pytest.mark.parametrize("saved", STATE_STORES)
@pytest.mark.parametrize("wanted", STATE_STORES)
def test_states_are_converted_where_exact(saved: str, wanted: str) -> None:
    """Any store into fp32 and into itself; everything else is refused and names the way."""
    source, _ = trained("fp32", saved)
    fresh = parameters(SHAPES)
    optimizer = AdamW(fresh, weights="fp32", states=wanted)
    state = source.state_dict()
    if wanted not in ("fp32", saved):
        with pytest.raises(UsageError, match="rounded_state"):
            optimizer.load_state_dict(state)
        assert all(not s for s in optimizer.state.values())
        return
    optimizer.load_state_dict(state)
    back = copy.deepcopy(optimizer.state_dict())

    assert optimizer.param_groups[0]["states"] == wanted
    if saved == wanted:
        assert same_bits(held(optimizer)[1:3], held(source)[1:3])
    else:
        store = STATE_STORES[saved]
        moment = optimizer.rule.moments({})[0]
        parts = source.state[source.param_groups[0]["params"][0]]
        exact = store.read(store.ranges(parts, moment, 0, 4900), moment, 4900)
        assert torch.equal(back["state"][0]["exp_avg"].flatten(), exact)


@pytest.mark.parametrize("saved", STATE_STORES)
@pytest.mark.parametrize("wanted", STATE_STORES)
def test_states_can_be_rounded_on_purpose(saved: str, wanted: str) -> None:
    """The result loads, and is as near as the store can be: half a gap of the coarsest code."""
    source, _ = trained("split16", saved)
    fresh = parameters(SHAPES)
    optimizer = AdamW(fresh, weights="split8", states=wanted)
    optimizer.load_state_dict(rounded_state(optimizer, source.state_dict()))
    exact, found = (AdamW(parameters(SHAPES)) for _ in range(2))
    exact.load_state_dict(rounded_state(exact, source.state_dict()))
    found.load_state_dict(rounded_state(found, optimizer.state_dict()))
    largest = max(t.abs().max() for t in states_of(exact))

    for a, b in zip(states_of(exact), states_of(found), strict=True):
        # The widest gap of int4's first moments is (7^2 - 6^2) / 7^2 of the scale.
        torch.testing.assert_close(a, b, rtol=0.0, atol=float(largest) * 13 / 49 / 2 * 1.01)
    train(optimizer, fresh, range(3, 5))


def test_a_state_of_torchs_optimizer_goes_on_exactly() -> None:
    """Three steps of torch's, its state and weights, three of ours: torch's six, bit for bit."""
    reference = parameters(SHAPES)
    other = torch.optim.AdamW(reference, lr=1e-2, foreach=False)
    train(other, reference, range(3))
    owned = [nn.Parameter(p.detach().clone()) for p in reference]
    optimizer = AdamW(owned, lr=0.5, weights="split16")
    optimizer.load_state_dict(copy.deepcopy(other.state_dict()))
    train(optimizer, owned, range(3, 6))
    train(other, reference, range(3, 6))

    assert optimizer.param_groups[0]["lr"] == 1e-2
    assert "foreach" not in optimizer.param_groups[0]
    assert all(torch.equal(optimizer.master(p), r) for p, r in zip(owned, reference, strict=True))


def test_a_momentum_of_torchs_sgd_goes_on_exactly() -> None:
    """torch's SGD counts no steps; its buffers are not fresh all the same."""
    reference = parameters(SHAPES)
    other = torch.optim.SGD(reference, lr=1e-2, momentum=0.9, foreach=False)
    train(other, reference, range(3))
    owned = [nn.Parameter(p.detach().clone()) for p in reference]
    optimizer = SGD(owned, lr=0.5, momentum=0.1, weights="split16")
    optimizer.load_state_dict(copy.deepcopy(other.state_dict()))
    train(optimizer, owned, range(3, 6))
    train(other, reference, range(3, 6))

    assert all(torch.equal(optimizer.master(p), r) for p, r in zip(owned, reference, strict=True))


def test_split8_goes_into_split16_and_not_back() -> None:
    """24 bits fit into 32; the other way is refused, or rounded on purpose."""
    source, owned = trained("split8", "fp32")
    masters = [source.master(p).clone() for p in owned]
    fresh = [nn.Parameter(p.detach().clone()) for p in owned]
    wide = AdamW(fresh, weights="split16")
    wide.load_state_dict(source.state_dict())

    assert all(torch.equal(wide.master(p), m) for p, m in zip(fresh, masters, strict=True))

    narrow = AdamW([nn.Parameter(p.detach().clone()) for p in owned], weights="split8")
    with pytest.raises(UsageError, match="int16 remainder"):
        narrow.load_state_dict(wide.state_dict())
    narrow.load_state_dict(rounded_state(narrow, wide.state_dict()))
    back = [narrow.master(p) for p in narrow.param_groups[0]["params"]]

    assert same_bits(back, masters)  # they had 24 bits


def test_split_weights_become_fp32_weights_exactly() -> None:
    """bf16 weights in an fp32 model and remainders from the state: the masters. Twice is once."""
    source, owned = trained("split16", "fp32")
    masters = [source.master(p).clone() for p in owned]
    fresh = [nn.Parameter(p.detach().float()) for p in owned]
    optimizer = AdamW(fresh)
    for _ in range(2):
        optimizer.load_state_dict(source.state_dict())
        assert same_bits([p.detach() for p in fresh], masters)

    with torch.no_grad():
        fresh[0].add_(1e-3)
    with pytest.raises(UsageError, match="not those bf16 weights"):
        optimizer.load_state_dict(source.state_dict())


def test_the_way_back_to_torch_leads_through_fp32_stores() -> None:
    """Narrow states into ours in fp32, whose state dict torch's optimizer goes on from exactly."""
    narrow, source = trained("split16", "int8")
    owned = [nn.Parameter(p.detach().float()) for p in source]
    back = AdamW(owned, lr=1e-2, weight_decay=0.1)
    back.load_state_dict(narrow.state_dict())
    twins = [nn.Parameter(p.detach().clone()) for p in owned]
    theirs = torch.optim.AdamW(twins, lr=1e-2, weight_decay=0.1, foreach=False)
    theirs.load_state_dict(copy.deepcopy(back.state_dict()))

    assert all(torch.equal(p, narrow.master(q)) for p, q in zip(owned, source, strict=True))
    train(back, owned, range(3, 6))
    train(theirs, twins, range(3, 6))
    assert all(torch.equal(p, q) for p, q in zip(owned, twins, strict=True))


def test_remainders_stay_where_the_state_has_none() -> None:
    """fp32 weights come with the model: narrowing keeps their low bits, and loading does too."""
    source, owned = trained("fp32", "fp32")
    fresh = [nn.Parameter(p.detach().clone()) for p in owned]
    optimizer = AdamW(fresh, weights="split16")
    optimizer.load_state_dict(source.state_dict())

    assert all(torch.equal(optimizer.master(p), o) for p, o in zip(fresh, owned, strict=True))


def test_a_stochastic_state_leaves_no_stale_remainder() -> None:
    """Its weights are bf16 and nothing else."""
    source, owned = trained("stochastic", "fp32")
    fresh = parameters(SHAPES, seed=5)
    optimizer = AdamW(fresh, weights="split16")
    with torch.no_grad():
        for p, o in zip(fresh, owned, strict=True):
            p.copy_(o)
    optimizer.load_state_dict(source.state_dict())

    assert all(
        torch.equal(optimizer.master(p), o.float()) for p, o in zip(fresh, owned, strict=True)
    )


def test_loading_keeps_the_group_dictionaries() -> None:
    """A scheduler that holds one goes on to set the learning rate that is used."""
    source, _ = trained("split16", "int8")
    optimizer = AdamW(parameters(SHAPES), weights="split16", states="int8")
    group = optimizer.param_groups[0]
    optimizer.load_state_dict(source.state_dict())

    assert optimizer.param_groups[0] is group
    assert group["lr"] == source.param_groups[0]["lr"]


def test_hooks_of_loading_see_a_plain_state() -> None:
    """The user's pre hook gets tensors, and the post hook finds the loaded state."""
    source, _ = trained("split16", "int8")
    optimizer = AdamW(parameters(SHAPES), weights="split16", states="int8")
    seen: list[Any] = []
    optimizer.register_load_state_dict_pre_hook(
        lambda _, state: seen.append(state["state"][0]["exp_avg_codes"].dtype)
    )
    optimizer.register_load_state_dict_post_hook(
        lambda o: seen.append(o.state[o.param_groups[0]["params"][0]]["exp_avg_codes"].dtype)
    )
    optimizer.load_state_dict(source.state_dict())

    assert seen == [torch.uint8, torch.uint8]


def test_a_loaded_state_is_a_copy() -> None:
    """Two optimizers never share a state tensor."""
    source, _ = trained("split16", "int8")
    saved = source.state_dict()
    optimizer = AdamW(parameters(SHAPES), weights="split16", states="int8")
    optimizer.load_state_dict(saved)
    left = {t.data_ptr() for s in source.state.values() for t in s.values() if torch.is_tensor(t)}
    right = {
        t.data_ptr() for s in optimizer.state.values() for t in s.values() if torch.is_tensor(t)
    }

    assert not left & right


def test_states_that_do_not_fit_are_refused() -> None:
    """Another shape, another memory format, amsgrad, an unknown store."""
    source, _ = trained("split16", "int8")
    other = AdamW(parameters([(70, 71), (5,)]), weights="split16", states="int8")
    with pytest.raises(UsageError, match=r"has shape \(70, 70\), its parameter \(70, 71\)"):
        other.load_state_dict(source.state_dict())

    ams = torch.optim.AdamW(parameters(SHAPES), amsgrad=True)
    train(ams, ams.param_groups[0]["params"], range(1))
    optimizer = AdamW(parameters(SHAPES))
    with pytest.raises(UsageError, match="amsgrad"):
        optimizer.load_state_dict(ams.state_dict())

    saved = source.state_dict()
    saved["param_groups"][0]["states"] = "int2"
    with pytest.raises(UnknownName, match="int2"):
        optimizer.load_state_dict(saved)

    weight = nn.Parameter(torch.randn(32, 16, 3, 3))
    rows = AdamW([weight], states="int8")
    train(rows, [weight], range(1))
    image = nn.Parameter(torch.randn(32, 16, 3, 3).to(memory_format=torch.channels_last))
    with pytest.raises(UsageError, match="memory format"):
        AdamW([image], states="int8").load_state_dict(rows.state_dict())


@pytest.mark.parametrize("weights", ["split16", "split8"])
@pytest.mark.parametrize("first", [True, False])
def test_saved_masters_come_back_exactly_by_the_ways_that_are_documented(
    weights: str, first: bool
) -> None:
    """Before the optimizer is built, or by set_master; halfway between two bf16 numbers too."""
    ties = torch.arange(0x3F808000, 0x3F888000, 0x10000, dtype=torch.int32).view(torch.float32)
    source_owned = [nn.Parameter(torch.cat([ties, -ties, torch.ones(8)]))]
    source = AdamW(source_owned, weights=weights)
    saved = source.master(source_owned[0])
    fresh = [nn.Parameter(saved.clone() if first else torch.zeros(24))]
    optimizer = AdamW(fresh, weights=weights)
    if not first:
        optimizer.set_master(fresh[0], saved)
    optimizer.load_state_dict(source.state_dict())

    assert torch.equal(saved, torch.cat([ties, -ties, torch.ones(8)]))
    assert torch.equal(optimizer.master(fresh[0]), saved)


def test_no_remainder_of_16_bits_can_round_ties_to_even() -> None:
    """An even bf16 number is nearest to 2^16 + 1 patterns then, both ties with it: one too many."""
    patterns = torch.arange(0x3F7F0000, 0x3F820000, dtype=torch.int32)
    rounded = patterns.view(torch.float32).to(torch.bfloat16).view(torch.int16)

    assert (rounded == 0x3F80).sum() == 2**16 + 1
    assert (rounded == 0x3F81).sum() == 2**16 - 1


def test_a_refused_state_has_changed_no_weight() -> None:
    """All parameters are looked at before the first remainder is added."""
    source, owned = trained("split16", "fp32")
    fresh = [nn.Parameter(p.detach().float()) for p in owned]
    with torch.no_grad():
        fresh[-1].add_(1.0)
    optimizer = AdamW(fresh)
    with pytest.raises(UsageError, match="not those bf16 weights"):
        optimizer.load_state_dict(source.state_dict())

    assert torch.equal(fresh[0], owned[0].detach().float())
