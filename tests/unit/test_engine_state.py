"""An engine's state: all of it, loaded into another engine, goes on bit for bit."""

from __future__ import annotations

import copy
import math
from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor

from narrowcast.engine.engine import Engine
from narrowcast.engine.lanes import Progress
from narrowcast.errors import CheckpointError, UsageError
from narrowcast.policy import POLICIES
from narrowcast.scaling.scales import DynamicScale
from narrowcast.training.state_tree import pack, unpack
from small_training import (
    OVERFLOW,
    adam,
    is_equal,
    require_average_in_fp32,
    sgd,
    small_model,
    train_step,
)


def full_engine(policy: str, **options: Any) -> Engine:
    """Build an engine with a scheduler, an EMA and accumulation."""
    model = small_model()
    optimizer = adam(model)
    return Engine(
        model,
        optimizer,
        policy,
        scheduler=torch.optim.lr_scheduler.StepLR(optimizer, step_size=3, gamma=0.5),
        accumulate=2,
        clip_norm=0.7,
        ema=torch.optim.swa_utils.AveragedModel(model),
        **options,
    )


def go_on(engine: Engine, start: int, stop: int) -> None:
    for i in range(start, stop):
        train_step(engine, i, {5: OVERFLOW, 9: math.nan, 16: OVERFLOW}.get(i, 1.0))


def same(a: Any, b: Any) -> bool:
    """Whether two states hold equal values, tensors bit for bit."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and torch.equal(a, b) and a.dtype == b.dtype
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


@pytest.mark.parametrize("policy", ["fp32", "bf16", "fp16", "bf16-true"])
def test_a_resumed_engine_goes_on_bit_for_bit(policy: str) -> None:
    """Weights, averages, rates, scales, counts and skips equal those of a run without a break."""
    require_average_in_fp32(policy)
    scale = DynamicScale(interval=3, calibration_interval=2) if policy == "fp16" else None
    whole = full_engine(policy, scale=scale)
    go_on(whole, 0, 12)
    tree, tensors = pack({"engine": whole.state_dict(), "model": whole.model.state_dict()})
    saved = copy.deepcopy(unpack(tree, tensors))
    go_on(whole, 12, 24)

    resumed = full_engine(policy, scale=scale)
    resumed.model.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["engine"])
    go_on(resumed, 12, 24)

    assert is_equal(resumed.model, whole.model)
    assert same(resumed.state_dict(), whole.state_dict())
    assert resumed.skips == whole.skips
    assert len(whole.skips) == (3 if policy == "fp16" else 1)
    assert resumed.loss_scales() == whole.loss_scales()


def test_every_field_of_the_progress_and_the_scale_is_saved() -> None:
    """Values that differ from all defaults come back, also in fields that are added later."""
    engine = full_engine("fp16")
    train_step(engine, 0, OVERFLOW)
    train_step(engine, 1)
    lane = engine._lanes["optimizer"]
    for number, field in enumerate(fields(Progress), start=11):
        if field.name != "row":
            setattr(lane.progress, field.name, number)
    lane.scales["loss"] = DynamicScale(
        scale=48.0,
        growth=3.0,
        backoff=0.25,
        interval=7,
        floor=2.0,
        ceiling=4096.0,
        hysteresis=2,
        window_overflows=1,
        calibration_interval=5,
        good_steps=4,
        overflows_in_row=1,
        overflows_in_window=1,
        calibrated=True,
    )

    other = full_engine("fp16")
    other.load_state_dict(engine.state_dict())

    default = DynamicScale()
    mine = other._lanes["optimizer"]
    assert mine.progress == lane.progress
    assert mine.progress.row.skipped == 1
    assert mine.scales == lane.scales
    assert [
        f
        for f in fields(default)
        if getattr(default, f.name) == getattr(mine.scales["loss"], f.name)
    ] == []


def test_pending_gradients_are_not_saved_silently() -> None:
    """Inside an accumulation saving and loading are errors that say how to get to a boundary."""
    engine = full_engine("fp32")
    state = engine.state_dict()
    train_step(engine, 0)

    with pytest.raises(UsageError, match="1 of 2 micro-batches"):
        engine.state_dict()
    with pytest.raises(UsageError, match="middle of a step"):
        engine.load_state_dict(state)
    engine.zero_grad()
    engine.load_state_dict(engine.state_dict())


def test_the_state_of_another_policy_is_refused() -> None:
    """The error names what differs, be it one entry of keep_fp32."""
    model = small_model()
    engine = Engine(model, sgd(model), POLICIES["bf16"].keeping_fp32("2"))
    saved = engine.state_dict()

    other = small_model()
    plain = Engine(other, sgd(other), "bf16")

    with pytest.raises(CheckpointError, match=r"keep_fp32: \['2'\] -> \[\]"):
        plain.load_state_dict(saved)


def test_the_state_of_an_engine_with_other_parts_is_refused() -> None:
    """A scheduler that was saved must be there to be loaded, and an optimizer found by its name."""
    saved = full_engine("fp32").state_dict()
    model = small_model()
    single = Engine(model, sgd(model), "fp32")
    model = small_model()
    named = Engine(model, {"g": sgd(model)}, "fp32")

    with pytest.raises(CheckpointError, match="scheduler"):
        single.load_state_dict(saved)
    with pytest.raises(CheckpointError, match="'g'"):
        named.load_state_dict(saved)
    with pytest.raises(CheckpointError, match="plan"):
        single.load_state_dict({})
