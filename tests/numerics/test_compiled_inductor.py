"""A model that inductor compiled is as close to the truth as the same model uncompiled.

Inductor fuses operations, and then leaves out roundings to 16 bits between them; and it sums in an
order of its own. Both move a gradient by what rounding moves it anyway, so the bound is not a
number but eager code's own error against a reference with more bits:

    |compiled - reference|  <=  2 |eager - reference|        for each parameter, in the L2 norm

Twice, since another order of the same sum is another draw of the same error, whose norms over some
hundred elements and more differ by less than that; leaving roundings out only makes it smaller.
The reference is computed in fp64 for fp32, and in fp32 for 16 bits, whose error is 2^13 times
smaller than that of bf16 (8 bits against 24, and one more for rounding to nearest).
"""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from narrowcast.engine.engine import Engine
from narrowcast.engine.stores import planned_optimizer
from narrowcast.plan import Plan, plan_named
from narrowcast.policy import policy_named
from narrowcast.recipes.load import load_recipe
from narrowcast.training.train import TrainOptions, train

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler (g++)"),
]

BATCH = torch.randint(0, 256, (4, 65), generator=torch.Generator().manual_seed(1))
KEPT = Plan(
    name="kept", policy=policy_named("bf16").keeping_fp32("blocks.0.mlp", "blocks.1.mlp:gelu")
)
PLANS = {
    **{n: plan_named(n) for n in ("fp32", "bf16", "fp16", "bf16-true", "bf16-split", "lean")},
    "kept": KEPT,
}


def gradients(plan: Plan, *, compiled: bool, **options: Any) -> dict[str, Tensor]:
    """The unscaled gradients of one step of `austen`."""
    torch.manual_seed(0)
    recipe = load_recipe("austen", [f"{name}={value}" for name, value in options.items()])
    model = recipe.build_model()
    optimizer = planned_optimizer(recipe.build_optimizer(model), model, plan)
    engine = Engine(model, optimizer, plan, scale=1.0, compile=compiled)
    torch.manual_seed(5)
    with engine.forward():
        loss = recipe.compute_loss(model, (BATCH.to(torch.uint8),))
    engine.backward(loss)
    if engine.compiled is not None:
        record = engine.compiled.record()
        assert (record.graphs, record.recompiles, record.graph_breaks) == (1, 0, {})
    return {n: p.grad.double() for n, p in model.named_parameters() if p.grad is not None}


def reference(dtype: torch.dtype, plan: Plan) -> dict[str, Tensor]:
    """The gradients from the same stored weights, computed in `dtype`."""
    torch.manual_seed(0)
    recipe = load_recipe("austen")
    model = recipe.build_model()
    planned_optimizer(recipe.build_optimizer(model), model, plan)  # rounds what it stores
    stored = torch.bfloat16 if plan.policy.param == "bf16" else torch.float32
    model.to(stored).to(dtype)
    inputs, targets = BATCH[:, :-1], BATCH[:, 1:]
    F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten()).backward()  # type: ignore[no-untyped-call]
    return {n: p.grad.double() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", PLANS)
def test_inductor_is_as_close_to_the_truth_as_eager_code(name: str) -> None:
    """For every parameter of a small GPT, with the plan's islands, functions, norms and stores."""
    plan = PLANS[name]
    truth = reference(torch.float64 if name == "fp32" else torch.float32, plan)
    eager, compiled = gradients(plan, compiled=False), gradients(plan, compiled=True)

    assert compiled.keys() == eager.keys() == truth.keys()
    worst = max(
        (
            float((compiled[n] - true).norm() / (eager[n] - true).norm().clamp_min(1e-300)),
            n,
        )
        for n, true in truth.items()
    )
    assert worst[0] <= 2, worst


def test_no_format_is_served_the_graph_of_another() -> None:
    """fp16 has 8 times the precision of bf16, also where the other's graph is on disk already.

    With its traces kept on disk torch 2.11 takes the first one's for both.
    """
    apart: dict[str, dict[str, float]] = {}
    for name in ("fp16", "bf16", "fp16"):
        torch._dynamo.reset()
        plan = plan_named(name)
        truth, found = reference(torch.float32, plan), gradients(plan, compiled=True)
        apart[name] = {n: float((found[n] - true).norm()) for n, true in truth.items()}

    assert all(apart["bf16"][n] > 2 * apart["fp16"][n] for n in apart["fp16"]), apart


def test_dropout_drops_what_it_drops_uncompiled() -> None:
    """Drawn from torch's generator: another mask would move gradients by tens of percent."""
    plan = plan_named("fp32")
    eager = gradients(plan, compiled=False, dropout=0.1)
    compiled = gradients(plan, compiled=True, dropout=0.1)

    # Some hundred roundings to 2^-24 one after another, and sums of up to 1,024 numbers in fp32:
    # 100 x 1,024 x 2^-24 at the very worst.
    for name, expected in eager.items():
        assert (compiled[name] - expected).norm() <= 100 * 1024 * 2.0**-24 * expected.norm(), name


def test_a_compiled_step_is_the_same_twice() -> None:
    """To the bit, without which no run could be resumed."""
    first, second = (gradients(plan_named("bf16"), compiled=True) for _ in range(2))

    assert all(torch.equal(first[name], second[name]) for name in first)


class Doubled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(self.first(x))
        return out


def test_an_island_has_an_fp32_backward() -> None:
    """Inductor's own cache does not hand out a graph that was traced with autocast in backward."""
    policy = policy_named("bf16").keeping_fp32("*")
    found = {}
    for name, compiled in (("eager", False), ("compiled", True)):
        torch.manual_seed(0)
        model = Doubled()
        if name == "compiled":  # fill the cache with theirs
            theirs = Doubled()
            theirs.compile()
            with torch.autocast("cpu", torch.bfloat16):
                theirs(torch.ones(4, 8)).sum().backward()
            torch._dynamo.reset()
        engine = Engine(
            model, torch.optim.SGD(model.parameters(), lr=0.1), policy, compile=compiled
        )
        with engine.forward():
            loss = model(torch.linspace(-1, 1, 32).view(4, 8)).square().mean()
        engine.backward(loss)
        found[name] = [p.grad.clone() for p in model.parameters() if p.grad is not None]

    # bf16 would differ by 2^-9; some ten roundings and sums of 8 in fp32 do by 100 x 2^-24.
    for expected, got in zip(found["eager"], found["compiled"], strict=True):
        assert (got - expected).norm() <= 100 * 2.0**-24 * expected.norm()


def test_a_resumed_run_is_the_same_to_the_bit(tmp_path: Path) -> None:
    """With dropout and batch norm, evaluations on the way, and a last batch that is smaller."""
    recipe = load_recipe(Path(__file__).parents[1] / "small_recipe.py")
    options = TrainOptions(compile="inductor", measure=False, evaluate_every=4)
    run = partial(train, recipe, plan_named("bf16"), options, device=torch.device("cpu"))
    whole = run(directory=tmp_path / "whole")
    run(directory=tmp_path / "parts", stop_at=6)
    parts = run(directory=tmp_path / "parts", resume=True)

    ends = [(tmp_path / name / "weights.safetensors").read_bytes() for name in ("whole", "parts")]
    assert ends[0] == ends[1]
    assert parts.evaluations == whole.evaluations
