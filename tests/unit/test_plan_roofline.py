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
def roofline(target: str = "a100-80gb") -> Roofline:
    data, batch = first_batch(RECIPE, RECIPE.batch_size, 0)
    return Roofline(RECIPE, target, batch, data=data, say=lambda _: None)


ELEMENTS = sum(p.numel() for p in RECIPE.build_model().parameters())


def bound(plan: Plan, target: str = "a100-80gb", **changes: int) -> float:
    return roofline(target).of(plan, **{"elements": ELEMENTS, "held_bytes": 0} | changes)


def works(policy: str = "fp32") -> list[tuple[str, int, int]]:
    bounds = roofline()
    bounds.of(PLANS[policy], elements=ELEMENTS, held_bytes=0)
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
    assert 1e10 < rates.link_bytes_per_s < rates.bytes_per_s
    assert rates.flops_in("fp16") >= rates.flops_in("fp32")
    assert ("bf16" in rates.flops) == ("tf32" in rates.flops) == (GPUS[name].sm >= 80)
    assert rates.flops_in("fp64") == rates.flops["fp32"]


def test_there_are_no_rates_without_a_gpu() -> None:
    """Nor does a row outlive its GPU."""
    assert set(RATES) == set(GPUS)


def test_more_parts_take_no_less_time() -> None:
    """Every part launches every kernel."""
    seconds = [bound(replace(PLANS["fp32"], micro_batches=m)) for m in (1, 2, 8, 32)]

    assert seconds == sorted(seconds)
    assert seconds[-1] > seconds[0]


def test_an_update_takes_the_time_of_its_bytes() -> None:
    """Weights and states are read and written, gradients read."""
    difference = bound(PLANS["fp32"], held_bytes=10**9) - bound(PLANS["fp32"])

    assert difference == pytest.approx(2e9 / RATES["a100-80gb"].bytes_per_s)


def test_a_rank_updates_its_rows_and_sends_at_the_rate_of_the_link() -> None:
    """Whichever takes longer, computing or sending, is the bound: both may go on at once."""
    plan, rates = PLANS["fp32"], RATES["a100-80gb"]

    cut = bound(plan, elements=ELEMENTS // 2)

    saved = 3 * 4 * (ELEMENTS - ELEMENTS // 2) / rates.bytes_per_s
    assert bound(plan) - cut == pytest.approx(saved)
    assert bound(plan, sent_bytes=1) == bound(plan)
    assert bound(plan, sent_bytes=10**12) == 10**12 / rates.link_bytes_per_s


def test_a_faster_gpu_has_a_lower_bound() -> None:
    """The table orders GPUs as their data sheets do."""
    big = Plan(name="p", policy=POLICIES["fp32"])

    assert bound(big, "h200") <= bound(big, "a100-80gb") <= bound(big, "l4")


def test_counting_leaves_random_states_alone() -> None:
    """A plan for another machine draws nothing."""
    before = torch.get_rng_state()
    torch.manual_seed(0)

    bound(PLANS["fp32"], "rtx4090")

    assert torch.equal(torch.get_rng_state(), before)
