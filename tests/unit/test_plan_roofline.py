"""Bounds on the speed of a step on a GPU that is not there."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch

from narrowcast.data import batch_len
from narrowcast.plan import PLANS, Plan
from narrowcast.planning.rates import RATES
from narrowcast.planning.roofline import Roofline
from narrowcast.policy import POLICIES
from narrowcast.prediction.gpus import GPUS
from narrowcast.profiling import first_batch
from narrowcast.recipes.load import load_recipe

RECIPE = load_recipe(Path(__file__).parents[1] / "recipes" / "regression.py", ["width=512"])


@cache
def roofline(target: str = "a100-80gb", held: int = 0) -> Roofline:
    data, batch = first_batch(RECIPE, RECIPE.batch_size, 0)
    return Roofline(RECIPE, target, batch, data=data, held=lambda _: held, say=lambda _: None)


def works(policy: str = "fp32") -> list[tuple[str, int, int]]:
    bounds = roofline()
    bounds.of(PLANS[policy])
    return [
        (w.format, w.flops, w.bytes) for p, ws in bounds._works.items() for w in ws
        if p.policy.compute == POLICIES[policy].compute and p.policy.param == POLICIES[policy].param
    ]  # fmt: skip


def test_products_are_counted_to_the_operation() -> None:
    """Two layers, 3 -> 512 -> 1, on 32 samples: forward, and gradients of both and of one input."""
    _, batch = first_batch(RECIPE, RECIPE.batch_size, 0)
    samples = batch_len(batch)

    flops = sum(flops for _, flops, _ in works())

    first, second = 2 * samples * 3 * 512, 2 * samples * 512 * 1
    assert flops == 2 * first + 3 * second


def test_under_autocast_products_have_the_policys_format() -> None:
    """Which rate counts is decided by what the kernel reads."""
    products = {fmt for fmt, flops, _ in works("bf16") if flops}

    assert products == {"bf16"}
    assert {fmt for fmt, flops, _ in works() if flops} == {"fp32"}


@pytest.mark.parametrize("name", GPUS)
def test_every_gpu_that_can_be_predicted_has_rates(name: str) -> None:
    """One table more, and no GPU forgotten; 16 bits are never slower than fp32."""
    rates = RATES[name]

    assert rates.bytes_per_s > 1e11
    assert rates.flops_in("fp16") >= rates.flops_in("fp32")
    assert ("bf16" in rates.flops) == ("tf32" in rates.flops) == (GPUS[name].sm >= 80)
    assert rates.flops_in("fp64") == rates.flops["fp32"]


def test_there_are_no_rates_without_a_gpu() -> None:
    """Nor does a row outlive its GPU."""
    assert set(RATES) == set(GPUS)


def test_more_parts_take_no_less_time() -> None:
    """Every part launches every kernel."""
    seconds = [roofline().of(replace(PLANS["fp32"], micro_batches=m)) for m in (1, 2, 8, 32)]

    assert seconds == sorted(seconds)
    assert seconds[-1] > seconds[0]


def test_an_update_takes_the_time_of_its_bytes() -> None:
    """Weights and states are read and written, gradients read."""
    elements = sum(p.numel() for p in RECIPE.build_model().parameters())
    plain, heavy = roofline(), roofline(held=10**9)

    difference = heavy.of(PLANS["fp32"]) - plain.of(PLANS["fp32"])

    assert difference == pytest.approx(2e9 / RATES["a100-80gb"].bytes_per_s)
    assert plain._elements == elements


def test_a_faster_gpu_has_a_lower_bound() -> None:
    """The table orders GPUs as their data sheets do."""
    big = Plan(name="p", policy=POLICIES["fp32"])

    assert roofline("h200").of(big) <= roofline("a100-80gb").of(big) <= roofline("l4").of(big)


def test_counting_leaves_random_states_alone() -> None:
    """A plan for another machine draws nothing."""
    before = torch.get_rng_state()
    torch.manual_seed(0)

    roofline("rtx4090").of(PLANS["fp32"])

    assert torch.equal(torch.get_rng_state(), before)
