"""Lightning Fabric with our plugin: one's own loop, skips told, stores, saving and going on."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import narrowcast
from integrations.lightning_case import Fabric, X, Y
from narrowcast.engine.stores import planned_optimizer
from narrowcast.errors import UnsupportedPrecision, UsageError
from narrowcast.integrations.lightning import fabric_precision
from narrowcast.plan import plan_named
from small_training import is_equal, small_model

pytestmark = [
    pytest.mark.slow,  # for what Lightning's import takes
    pytest.mark.filterwarnings("ignore", "error:policy .*"),  # of Lightning's own making
]
BATCHES = list(zip(X.split(8), Y.split(8), strict=True))


class Run:
    """A model under Fabric, and its loop."""

    def __init__(self, precision: str, **options: Any) -> None:
        self.plugin = fabric_precision(precision, device="cpu", **options)
        self.fabric = Fabric(accelerator="cpu", devices=1, plugins=[self.plugin])
        self.plain = small_model()
        optimizer = torch.optim.AdamW(self.plain.parameters(), lr=1e-2)
        adopted = self.plugin.adopt(optimizer, self.plain)
        self.model, self.optimizer = self.fabric.setup(self.plain, adopted)
        self.state = {"model": self.model, "optimizer": self.optimizer, "precision": self.plugin}
        self.outcomes: list[bool] = []

    def train(self, batches: Any, *, clip: float | None = None, break_at: int = -1) -> Run:
        for i, (inputs, targets) in enumerate(batches):
            self.optimizer.zero_grad()
            loss = F.cross_entropy(self.model(inputs), targets)
            self.fabric.backward(loss)
            if i == break_at:
                self.plain[0].weight.grad[0, 0] = math.inf
            if clip is not None:
                self.fabric.clip_gradients(
                    self.model, self.optimizer, max_norm=clip, error_if_nonfinite=False
                )
            self.outcomes.append(bool(self.optimizer.step()))
        return self


def by_engine(precision: str) -> nn.Module:
    model: nn.Module = small_model()
    plan = plan_named(precision)
    optimizer = planned_optimizer(torch.optim.AdamW(model.parameters(), lr=1e-2), model, plan)
    engine = narrowcast.Engine(model, optimizer, plan, device="cpu")
    for inputs, targets in BATCHES:
        with engine.forward():
            logits = model(inputs).float()
        loss = F.cross_entropy(logits, targets)  # outside, as Fabric's loops have it
        engine.backward(loss)
        engine.step()
    return model


@pytest.mark.parametrize("precision", ["fp32", "16-mixed", "bf16", "bf16-true", "bf16-split"])
def test_fabric_trains_what_the_engine_trains(precision: str) -> None:
    """The same weights bit for bit, and the label is what executed."""
    run = Run(precision).train(BATCHES)

    assert is_equal(run.plain, by_engine(precision))
    wanted = run.plugin.host_plan.policy.compute
    assert set(run.plugin.host_plan.first_pass.executed["matmul"]) == {wanted}


@pytest.mark.parametrize("precision", ["16-mixed", "bf16"])
def test_a_skipped_step_is_the_answer_of_step(precision: str) -> None:
    """optimizer.step() says whether it stepped; clipping before it changes nothing of that."""
    run = Run(precision).train(BATCHES, clip=0.1, break_at=3)

    assert run.outcomes == [i != 3 for i in range(len(BATCHES))]
    assert run.plugin.skips[0].parameters == ("0.weight",)


@pytest.mark.parametrize("precision", ["16-mixed", "bf16-split"])
def test_what_fabric_saves_goes_on_exactly(precision: str, tmp_path: Path) -> None:
    """Model, optimizer with its stores, scale and ledger: half a training and the other half."""
    whole = Run(precision).train(BATCHES, break_at=1)

    first = Run(precision).train(BATCHES[:3], break_at=1)
    first.fabric.save(tmp_path / "half.ckpt", first.state)
    second = Run(precision)
    second.fabric.load(tmp_path / "half.ckpt", second.state)
    second.train(BATCHES[3:])

    assert is_equal(whole.plain, second.plain)
    assert whole.plugin.state_dict()["scaler"] == second.plugin.state_dict()["scaler"]
    a, b = (run.optimizer.optimizer.state_dict()["state"] for run in (whole, second))
    assert str(a) == str(b)


def test_an_optimizer_without_the_plans_stores_is_refused() -> None:
    """A plan is not carried out by half: the optimizer is asked for before its first step."""
    plugin = fabric_precision("bf16-split", device="cpu")
    fabric = Fabric(accelerator="cpu", devices=1, plugins=[plugin])
    plain = small_model()
    model, optimizer = fabric.setup(plain, torch.optim.AdamW(plain.parameters()))
    fabric.backward(F.cross_entropy(model(X[:8]), Y[:8]))

    with pytest.raises(UsageError, match="AdamW has no such stores"):
        optimizer.step()


def test_a_model_that_computes_in_fp32_all_the_same_is_refused() -> None:
    """The first call is watched: nothing of it in fp16 is an error, not a label."""

    class Stubborn(nn.Sequential):
        def forward(self, inputs: Any) -> Any:
            with torch.autocast("cpu", enabled=False):
                return super().forward(inputs)

    plugin = fabric_precision("fp16", device="cpu")
    fabric = Fabric(accelerator="cpu", devices=1, plugins=[plugin])
    model = fabric.setup(Stubborn(*small_model()))

    with pytest.raises(UnsupportedPrecision, match="nothing of the first pass did"):
        model(X[:8])


def test_what_only_an_engine_does_is_refused() -> None:
    """Gradients used up during backward, batches split by the plan."""
    lean = plan_named("lean")
    for change, said in (({"gradients": "release"}, "releases"), ({"micro_batches": 2}, "splits")):
        with pytest.raises(UsageError, match=said):
            fabric_precision(narrowcast.Plan(**{**vars(lean), **change}))
