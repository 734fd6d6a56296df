"""The scale set by hand, saved, loaded, pickled."""

from __future__ import annotations

import copy
import io
import json
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from narrowcast.dropin.grad_scaler import GradScaler
from narrowcast.errors import (
    CheckpointError,
    PrecisionError,
    UsageError,
)
from narrowcast.scaling.scales import DynamicScale
from scaler_loop import INF, NAN, Loop


@pytest.mark.parametrize("new", [64.0, 64, torch.tensor(64.0)])
def test_the_scale_can_be_set_by_hand(new: float | Tensor) -> None:
    """`update(new_scale)` as in torch; a whole number does too."""
    loop = Loop()
    loop.scaler.scale(loop.weight.sum()).backward()
    loop.scaler.step(loop.optimizer)
    loop.scaler.update(new)

    assert loop.scaler.get_scale() == 64.0
    assert loop.step().step == 2


@pytest.mark.parametrize("new", [0.0, -1.0, 0.5, INF, NAN, torch.tensor(0.0), torch.tensor(NAN)])
def test_a_scale_out_of_bounds_is_refused(new: float | Tensor) -> None:
    """The bounds hold for the user as well; moving them is one option away."""
    loop = Loop()
    loop.step()

    with pytest.raises(UsageError, match="by hand"):
        loop.scaler.update(new)
    assert loop.scaler.get_scale() == 2.0**16


def test_a_tensor_of_the_wrong_size_is_torchs_error() -> None:
    """Torch's own check comes through."""
    loop = Loop()
    loop.step()

    with pytest.raises(AssertionError, match="1-element"):
        loop.scaler.update(torch.ones(3))


def test_a_scale_written_into_torchs_tensor_counts() -> None:
    """Loops that clamp `scaler._scale` themselves keep working: the tensor is the truth."""
    loop = Loop(growth_interval=1)
    loop.step()
    loop.scaler._scale.fill_(256.0)

    assert loop.scaler.value.scale == 256.0
    loop.step()
    assert loop.scaler.get_scale() == 512.0


def test_update_without_a_step_is_torchs_error() -> None:
    """Nothing was checked since the last update."""
    loop = Loop()
    loop.step()

    with pytest.raises(AssertionError, match="No inf checks"):
        loop.scaler.update()


def trained(**options: Any) -> Loop:
    loop = Loop(growth_interval=3, max_consecutive_skips=None, **options)
    loop.step()
    loop.overflow()
    loop.step()
    return loop


def test_torchs_scaler_loads_our_state() -> None:
    """Its five entries are there under their names; it does not look at ours."""
    ours, torchs = trained().scaler, torch.amp.GradScaler("cpu")
    torchs.load_state_dict(ours.state_dict())

    assert torchs.state_dict() == {k: v for k, v in ours.state_dict().items() if k != "narrowcast"}
    assert torchs.get_scale() == 2.0**15


def test_our_scaler_loads_torchs_state() -> None:
    """A run begun with torch's scaler goes on with ours, counters of ours at their beginning."""
    torchs = torch.amp.GradScaler("cpu", 1024.0, 3.0, 0.25, 7)
    torchs._init_growth_tracker = 5
    loop = trained(hysteresis=2)
    loop.scaler.load_state_dict(torchs.state_dict())

    expected = DynamicScale(
        scale=1024.0, growth=3.0, backoff=0.25, interval=7, good_steps=5, hysteresis=2
    )
    assert loop.scaler.value == expected
    assert loop.scaler.skips == ()
    assert loop.step().step == 1


@pytest.mark.parametrize(
    "options", [{}, {"floor": 4.0, "ceiling": 2.0**20, "hysteresis": 3, "window_overflows": 1}]
)
@pytest.mark.parametrize("lazy", [True, False])
def test_our_state_comes_back_whole(options: dict[str, Any], lazy: bool) -> None:
    """Options, counters, step number, row and ledger; and it is plain JSON and safe to unpickle."""
    before, after = trained(**options), Loop()
    if not lazy:
        after.step()
    buffer = io.BytesIO()
    torch.save(before.scaler.state_dict(), buffer)
    buffer.seek(0)
    after.scaler.load_state_dict(torch.load(buffer, weights_only=True))

    assert after.scaler.state_dict() == before.scaler.state_dict()
    assert json.loads(json.dumps(before.scaler.state_dict())) == before.scaler.state_dict()
    assert after.scaler.value == before.scaler.value
    assert after.scaler.skips == before.scaler.skips
    assert after.step().step == before.step().step == 4


def test_a_row_of_skips_goes_on_after_loading() -> None:
    """Stopping and resuming does not give a hopeless run another eight steps."""
    loop = Loop()
    for _ in range(7):
        loop.step(gradient=NAN, loss=NAN)
    resumed = Loop()
    resumed.scaler.load_state_dict(loop.scaler.state_dict())

    with pytest.raises(PrecisionError):
        resumed.step(gradient=NAN, loss=NAN)


@pytest.mark.parametrize("scale", [0.0, -1.0, INF, NAN])
def test_a_dead_scale_is_not_loaded(scale: float) -> None:
    """A checkpoint of a scaler that died says so, instead of going on at 0."""
    state = torch.amp.GradScaler("cpu").state_dict() | {"scale": scale}
    scaler = GradScaler("cpu")

    with pytest.raises(CheckpointError, match="saved loss scale"):
        scaler.load_state_dict(state)
    assert scaler.get_scale() == 2.0**16


def test_a_scale_below_the_floor_is_lifted_with_a_warning() -> None:
    """Torch's scaler may have gone below 1; ours tells and goes on at the floor."""
    scaler = GradScaler("cpu")
    with pytest.warns(UserWarning, match="outside"):
        scaler.load_state_dict(torch.amp.GradScaler("cpu").state_dict() | {"scale": 2.0**-5})

    assert scaler.get_scale() == 1.0


@pytest.mark.parametrize(
    "damage",
    [{"rule": {}}, {"ledger": {}}, {"rule": {"floor": 0.0}}, {"rule": {"flor": 1.0}}],
    ids=str,
)
def test_a_damaged_entry_is_refused(damage: dict[str, Any]) -> None:
    """Nothing is half loaded."""
    state, scaler = trained().scaler.state_dict(), GradScaler("cpu")
    state["narrowcast"] |= damage
    if damage == {"rule": {}}:
        del state["narrowcast"]["ledger"]

    with pytest.raises(CheckpointError, match="narrowcast"):
        scaler.load_state_dict(state)
    assert scaler.get_scale() == 2.0**16


def test_an_empty_state_is_torchs_error() -> None:
    """A disabled scaler saves {}, and an enabled one refuses it."""
    with pytest.raises(RuntimeError, match="empty"):
        GradScaler("cpu").load_state_dict({})


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
@pytest.mark.parametrize("fused", [False, True])
def test_a_copy_goes_on_as_the_original(clone: Callable[[Any], Any], fused: bool) -> None:
    """Pickling and copying between steps keep scale, counters, ledger and last outcome."""
    loop = trained(fused=fused, hysteresis=2)
    copied = clone(loop.scaler)

    assert copied.state_dict() == loop.scaler.state_dict()
    assert copied.last_outcome
    loop.scaler = copied
    assert loop.step().step == 4
