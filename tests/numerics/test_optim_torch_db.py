"""torch's own table of optimizer inputs, run on ours against torch's (fp32 stores, CPU)."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn

from narrowcast.errors import UsageError
from narrowcast.optim.adamw import AdamW
from narrowcast.optim.sgd import SGD

common = pytest.importorskip("torch.testing._internal.common_optimizers")
# Importing torch's test tables freezes the switches of torch.backends for the whole process, and so
# for every other test in it; this is what `torch.backends.disable_global_flags` sets.
torch.backends.flags_frozen.__globals__["__allow_nonbracketed_mutation_flag"] = True

OURS = {"AdamW": AdamW, "SGD": SGD}
INFOS = [info for info in common.optim_db if info.name in OURS]
INPUTS = [
    pytest.param(info, entry, id=f"{info.name}-{entry.desc}")
    for info in INFOS
    for entry in info.optim_inputs_func(device="cpu", dtype=torch.float32)
]
REFUSED = ("amsgrad", "capturable", "differentiable")
"""Asked for by an entry, these are refused on purpose (`refuse` gives the reasons)."""

ERRORS = [
    pytest.param(info, entry, id=f"{info.name}-{entry.optimizer_error_input.desc}")
    for info in INFOS
    for entry in info.optim_error_inputs_func(device="cpu", dtype=torch.float32)
]


def refused(entry: Any) -> list[str]:
    return [name for name in REFUSED if entry.kwargs.get(name)]


def model(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(1)
    layers = nn.Sequential(nn.Linear(2, 3), nn.Sigmoid(), nn.Linear(3, 1), nn.Sigmoid())
    return layers.to(dtype), torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]], dtype=dtype).t()


def test_the_table_has_both_optimizers() -> None:
    """An entry that is renamed would go untested in silence."""
    assert {info.name for info in INFOS} == set(OURS)
    assert len(INPUTS) >= 14


@pytest.mark.parametrize(("info", "entry"), INPUTS)
def test_every_input_gives_torchs_bits(info: Any, entry: Any) -> None:
    """Ten steps of a small network, and the state that is kept."""
    if reasons := refused(entry):
        pytest.skip(f"refused on purpose: {', '.join(reasons)}")
    (mine, x), (theirs, _) = model(), model()
    ours = OURS[info.name](mine.parameters(), **entry.kwargs)
    torchs = info.optim_cls(theirs.parameters(), **entry.kwargs, foreach=False)
    for _ in range(10):
        for network, optimizer in ((mine, ours), (theirs, torchs)):
            optimizer.zero_grad()
            network(x).sum().backward()
            optimizer.step()

    for a, b in zip(mine.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)
        for key, value in torchs.state[b].items():
            if value is not None and key != "step":
                assert torch.equal(ours.state[a][key], value), key


@pytest.mark.parametrize(("info", "entry"), INPUTS)
def test_every_refused_input_is_refused_with_a_reason(info: Any, entry: Any) -> None:
    """And every other one is accepted."""
    make = OURS[info.name]
    if refused(entry):
        with pytest.raises(UsageError, match="leave it out"):
            make(model()[0].parameters(), **entry.kwargs)
    else:
        make(model()[0].parameters(), **entry.kwargs)


@pytest.mark.parametrize(("info", "entry"), INPUTS)
@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("schedule", range(2))
def test_every_input_goes_in_the_right_direction(
    info: Any, entry: Any, contiguous: bool, schedule: int
) -> None:
    """torch's test of that name: slices as parameters, closures, schedulers; the loss falls."""
    if reasons := refused(entry):
        pytest.skip(f"refused on purpose: {', '.join(reasons)}")
    torch.manual_seed(0)
    if contiguous:
        weight, bias = nn.Parameter(torch.randn(10, 5)), nn.Parameter(torch.randn(10))
    else:
        weight = nn.Parameter(torch.randn(10, 5, 2)[..., 0])
        bias = nn.Parameter(torch.randn(10, 2)[..., 0])
    x = torch.randn(5)
    optimizer = OURS[info.name]([weight, bias], **entry.kwargs)
    makers = info.scheduler_inputs[schedule % len(info.scheduler_inputs)]
    schedulers = [make(optimizer) for make in makers]

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (weight.mv(x) + bias).pow(2).sum()
        loss.backward()
        return loss

    first = closure().item()
    for _ in range(20):
        loss = optimizer.step(closure)
        for scheduler in schedulers:
            if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
                scheduler.step(loss.item())
            else:
                scheduler.step()
    last = closure().item()

    assert (last > first) if optimizer.param_groups[0]["maximize"] else (last < first)


@pytest.mark.parametrize(("info", "entry"), INPUTS)
def test_every_input_survives_its_state_dict(info: Any, entry: Any) -> None:
    """torch's state loads into ours, and ours goes on as torch's does."""
    if reasons := refused(entry):
        pytest.skip(f"refused on purpose: {', '.join(reasons)}")
    (mine, x), (theirs, _) = model(), model()
    torchs = info.optim_cls(theirs.parameters(), **entry.kwargs, foreach=False)

    def advance(network: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        network(x).sum().backward()
        optimizer.step()

    for _ in range(3):
        advance(theirs, torchs)
    mine.load_state_dict(theirs.state_dict())
    ours = OURS[info.name](mine.parameters(), **entry.kwargs)
    ours.load_state_dict(torchs.state_dict())
    for _ in range(3):
        advance(mine, ours)
        advance(theirs, torchs)

    assert all(
        torch.equal(a, b) for a, b in zip(mine.parameters(), theirs.parameters(), strict=True)
    )


@pytest.mark.parametrize(("info", "entry"), ERRORS)
def test_every_error_input_is_an_error(info: Any, entry: Any) -> None:
    """torch's own complaints come from torch; the others are ours, with a hint."""
    asked = entry.optimizer_error_input
    params = model()[0].parameters() if asked.params is None else asked.params
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises((UsageError, ValueError, TypeError, UserWarning)):
            OURS[info.name](params, **asked.kwargs)
