"""Stores of weights and states: bytes announced and held, names, small tensors."""

from __future__ import annotations

import pytest
import torch

from narrowcast.errors import UnknownName
from narrowcast.optim.adamw import AdamW
from narrowcast.optim.sizes import bytes_for
from narrowcast.optim.states import SMALL, STATE_STORES, Moment, fitted, state_store
from narrowcast.optim.weights import WEIGHT_STORES, weight_store
from narrowcast.plan import OWN, STATES, WEIGHTS
from optim_cases import FEW, RULES, SHAPES, give_gradients, parameters

LARGE = 1 << 20


def test_the_stores_are_those_that_plans_name() -> None:
    """One list of names: what a plan may say is what there is."""
    assert set(WEIGHT_STORES) == set(WEIGHTS) - {OWN}
    assert set(STATE_STORES) == set(STATES) - {OWN}


@pytest.mark.parametrize("weights", WEIGHT_STORES)
@pytest.mark.parametrize("states", STATE_STORES)
@pytest.mark.parametrize("rule", RULES)
def test_prediction_and_allocation_are_the_same_number(
    rule: str, weights: str, states: str
) -> None:
    """For every store and size: what is announced, what nbytes() says, and what tensors hold."""
    make, options = RULES[rule]
    owned = parameters(FEW)
    optimizer = make(owned, **options, weights=weights, states=states)
    give_gradients(owned, 0)
    optimizer.step()
    tensors = [t for s in optimizer.state.values() for t in s.values() if torch.is_tensor(t)]
    announced = bytes_for(
        [p.numel() for p in owned],
        rule=rule.lower(),
        weights=weights,
        states=states,
        hyperparameters=options,
    )

    assert announced.total == optimizer.nbytes() == sum(t.nbytes for t in [*owned, *tensors])
    assert announced.weights == sum(p.nbytes for p in owned)
    assert optimizer.nbytes() == sum(line.nbytes for line in optimizer.describe())


@pytest.mark.parametrize(
    ("weights", "states", "most"),
    [
        ("split16", "int8", 6.13),
        ("split8", "int8", 5.13),
        ("split8", "int4", 4.10),
        ("split16", "fp32", 12.0),
        ("fp32", "fp32", 12.0),
        ("stochastic", "int4", 3.10),
    ],
)
def test_bytes_held_by_a_parameter_under_adamw(weights: str, states: str, most: float) -> None:
    """The targets of the project, from the tensors of a real optimizer."""
    owned = parameters([(1024, 1024)])
    optimizer = AdamW(owned, weights=weights, states=states)
    give_gradients(owned, 0)
    optimizer.step()

    assert optimizer.nbytes() / LARGE <= most


@pytest.mark.parametrize("states", ["bf16", "int8", "int4"])
def test_small_tensors_keep_fp32_states_and_say_so(states: str) -> None:
    """Below SMALL elements, whatever was asked for; from it on, as asked."""
    owned = parameters([(SMALL - 1,), (SMALL,)])
    optimizer = AdamW(owned, weights="split16", states=states)
    give_gradients(owned, 0)
    optimizer.step()
    small, large = optimizer.describe()

    assert (small.states, large.states) == ("fp32", states)
    assert optimizer.state[owned[0]]["exp_avg"].dtype is torch.float32
    assert fitted(state_store(states), SMALL).name == states


def test_named_parameters_keep_their_names() -> None:
    """The ledger can say which parameter holds what."""
    model = torch.nn.Linear(3, 2)
    optimizer = AdamW(model.named_parameters(), weights="split16")

    assert [line.name for line in optimizer.describe()] == ["weight", "bias"]
    assert [line.weights for line in optimizer.describe()] == ["split16", "split16"]


@pytest.mark.parametrize("store", STATE_STORES.values(), ids=lambda s: s.name)
@pytest.mark.parametrize("is_signed", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_state_store_makes_what_it_announces(
    store: object, is_signed: bool, shape: tuple[int, ...]
) -> None:
    """Bytes and keys, for every shape."""
    moment = Moment(name="m", signed=is_signed)
    parameter = torch.zeros(shape)
    parts = store.zeros(parameter, moment)  # type: ignore[attr-defined]

    assert tuple(parts) == store.part_keys(moment)  # type: ignore[attr-defined]
    assert sum(t.nbytes for t in parts.values()) == store.nbytes(  # type: ignore[attr-defined]
        parameter.numel(), moment
    )


def test_an_unknown_store_is_named_with_the_nearest() -> None:
    """Each axis lists its own names."""
    with pytest.raises(UnknownName, match="did you mean 'split16'"):
        weight_store("split-16")
    with pytest.raises(UnknownName, match="did you mean 'int8'"):
        state_store("int-8")
    with pytest.raises(UnknownName, match="valid: adamw, lion, sgd"):
        bytes_for([1], rule="adam", weights="fp32", states="fp32")
