"""The scaler for hosts is the drop-in in fewer operations: same numbers, states and refusals."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import narrowcast
from narrowcast.errors import UsageError
from narrowcast.integrations.host_scaler import HostScaler

Scaler = HostScaler | narrowcast.GradScaler | torch.amp.GradScaler
Break = Callable[[int, nn.Module], None]
STEPS = 12


def nothing(_step: int, _model: nn.Module) -> None:
    """Leave the gradients as they are."""


def broken(steps: set[int], value: float, layer: int = 0) -> Break:
    def write(step: int, model: nn.Module) -> None:
        if step in steps:
            model[layer].weight.grad.view(-1)[0] = value  # type: ignore[index,union-attr,operator]

    return write


class Ended:
    """What a training left behind."""

    def __init__(self, scaler: Scaler, model: nn.Module, outcomes: list[Any]) -> None:
        self.state = scaler.state_dict()
        self.weights = [p.detach() for p in model.parameters()]
        told = [outcome for outcome in outcomes if outcome is not None]  # torch's scaler tells none
        self.outcomes = [(o.step, o.applied, o.reason, o.parameters) for o in told]

    def is_equal(self, other: Ended) -> bool:
        same = all(map(torch.equal, self.weights, other.weights))
        return same and (self.state, self.outcomes) == (other.state, other.outcomes)


def train(
    scaler: Scaler,
    *,
    early: Break = nothing,
    late: Break = nothing,
    unscales: bool = True,
    optimizers: int = 1,
    make: Any = torch.optim.AdamW,
    dtype: torch.dtype = torch.float32,
    freeze_until: int = 0,
    **options: Any,
) -> Ended:
    """Train twelve steps, breaking gradients before or after they are unscaled."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3)).to(dtype)
    layers = [model[0], model[2]] if optimizers == 2 else [model]
    held = [make(layer.parameters(), lr=1e-2, **options) for layer in layers]
    outcomes = []
    for step in range(1, STEPS + 1):
        model[0].requires_grad_(step > freeze_until)
        for optimizer in held:
            optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            out = model(torch.randn(4, 8, dtype=dtype))
        scaler.scale(
            nn.functional.cross_entropy(out.float(), torch.tensor([0, 1, 2, 0]))
        ).backward()
        early(step, model)
        for optimizer in held if unscales else ():
            scaler.unscale_(optimizer)
        late(step, model)
        outcomes += [scaler.step(optimizer) for optimizer in held]
        scaler.update()
    return Ended(scaler, model, outcomes)


def both(
    of: Callable[[Any], Scaler] = lambda kind: kind("cpu"), **case: Any
) -> tuple[Ended, Ended]:
    return train(of(HostScaler), **case), train(of(narrowcast.GradScaler), **case)


@pytest.mark.parametrize("unscales", [True, False])
@pytest.mark.parametrize(
    "case",
    [
        {},
        {"early": broken({3, 4, 8}, math.inf)},
        {"late": broken({3, 4, 8}, math.nan)},
        {"early": broken({3}, -math.inf), "late": broken({3}, 0.0)},
        {"early": broken({1}, math.inf), "late": broken({STEPS}, math.inf)},
        {"optimizers": 2},
        {"optimizers": 2, "early": broken({4}, math.inf)},
        {"optimizers": 2, "early": broken({4}, math.inf, layer=2)},
        {"optimizers": 2, "late": broken({4}, math.inf, layer=2)},
        {"make": torch.optim.SGD, "momentum": 0.9},
        {"fused": True},
        {"fused": True, "early": broken({4}, math.inf)},
        {"fused": True, "late": broken({4}, math.inf)},
        {"dtype": torch.bfloat16, "early": broken({4}, math.inf)},
        {"dtype": torch.float64, "early": broken({4}, math.inf)},
        {"freeze_until": 5, "early": broken({8}, math.inf)},
    ],
    ids=lambda case: "-".join(case) or "plain",
)
def test_it_does_what_the_drop_in_does(case: dict[str, Any], unscales: bool) -> None:
    """Weights bit for bit, scale, tracker, ledger and each outcome, in every kind of step."""
    ours, drop_in = both(**case, unscales=unscales)

    assert ours.is_equal(drop_in)


@pytest.mark.parametrize(
    "settings",
    [
        {"growth_interval": 2},
        {"growth_interval": 1, "ceiling": 2.0**18},
        {"init_scale": 2.0**-3, "growth_interval": 3},
        {"init_scale": 2.0, "floor": 0.5},
        {"hysteresis": 2},
        {"calibration_interval": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("early", [nothing, broken({2, 3, 7}, math.inf)])
def test_the_scale_moves_as_the_drop_ins(settings: dict[str, Any], early: Break) -> None:
    """Growing, backing off, bounded: the reciprocal of the step before is never a stale one."""
    ours, drop_in = both(lambda kind: kind("cpu", **settings), early=early)

    assert ours.is_equal(drop_in)


def test_it_trains_what_torchs_scaler_trains() -> None:
    """With gradients that are finite once the scale has come down."""
    ours = train(HostScaler("cpu", growth_interval=4), early=broken({3, 9}, math.inf))
    theirs = torch.amp.GradScaler("cpu", growth_interval=4)
    by_torch = train(theirs, early=broken({3, 9}, math.inf))

    assert all(map(torch.equal, ours.weights, by_torch.weights))
    assert {key: ours.state[key] for key in by_torch.state} == by_torch.state


def test_a_scale_set_by_hand_is_used_and_bounded() -> None:
    """``update(new_scale)``: the next reciprocal is its own, and its bounds hold."""
    scaler = HostScaler("cpu")
    weight = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=1.0)

    for asked in (8.0, 2.0**10):
        scaler.scale(weight.sum()).backward()
        scaler.update(asked)
        weight.grad = None
        scaler.scale(weight.sum()).backward()
        assert torch.equal(weight.grad, torch.full((2,), asked))  # type: ignore[arg-type]
        scaler.unscale_(optimizer)
        assert torch.equal(weight.grad, torch.ones(2))  # type: ignore[arg-type]
        scaler.step(optimizer)
        scaler.update()
        weight.grad = None
    with pytest.raises(UsageError, match="outside"):
        scaler.update(2.0**200)


@pytest.mark.parametrize("carry", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
def test_a_copy_goes_on_and_shares_no_flag(carry: Callable[[HostScaler], HostScaler]) -> None:
    """After a copy, a skip of one is none of the other's."""
    scaler = HostScaler("cpu")
    train(scaler)
    copied = carry(scaler)

    train(copied, early=broken({2}, math.inf))
    train(scaler)

    assert len(copied.skips) == 1
    assert scaler.skips == ()


def test_torchs_errors_are_torchs() -> None:
    """Unscaling twice, stepping twice, 16-bit gradients, nothing to check."""
    scaler = HostScaler("cpu")
    weight = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    with pytest.raises(AssertionError, match="scale is None"):
        scaler.unscale_(optimizer)
    scaler.scale(weight.sum()).backward()
    scaler.unscale_(optimizer)
    with pytest.raises(RuntimeError, match="already been called"):
        scaler.unscale_(optimizer)
    scaler.step(optimizer)
    with pytest.raises(RuntimeError, match="already been called"):
        scaler.step(optimizer)
    scaler.update()
    weight.grad = None
    with pytest.raises(AssertionError, match="No inf checks"):
        scaler.step(optimizer)
    half = nn.Parameter(torch.ones(2, dtype=torch.float16))
    half.grad = torch.ones(2, dtype=torch.float16)
    with pytest.raises(ValueError, match="FP16 gradients"):
        scaler.unscale_(torch.optim.SGD([half], lr=1.0))


def test_gradients_with_a_graph_are_unscaled_as_torch_does() -> None:
    """create_graph=True: gradients that require gradients themselves."""
    ends: list[Tensor] = []
    for scaler in (HostScaler("cpu"), torch.amp.GradScaler("cpu")):
        weight = nn.Parameter(torch.ones(3))
        optimizer = torch.optim.SGD([weight], lr=0.1)
        for _ in range(2):
            weight.grad = None
            loss = scaler.scale(weight.square().sum())
            (weight.grad,) = torch.autograd.grad(loss, [weight], create_graph=True)
            scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
        ends.append(weight.detach())

    assert torch.equal(*ends)


def test_a_row_of_skips_ends_it() -> None:
    """The flags go down after each skip, and the row is counted."""
    limited = HostScaler("cpu", max_consecutive_skips=3)

    with pytest.raises(narrowcast.errors.PrecisionError, match="3 optimizer steps in a row"):
        train(limited, early=broken(set(range(1, 9)), math.inf))

    assert [skip.step for skip in limited.skips] == [1, 2, 3]
