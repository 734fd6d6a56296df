"""An Accelerator with our precision: fp16 on a CPU is fp16, skips, stores, saving and going on."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import narrowcast
from narrowcast.engine.stores import planned_optimizer
from narrowcast.errors import CheckpointError, UsageError
from narrowcast.integrations.accelerate import AttachedPrecision, attach
from narrowcast.plan import plan_named
from narrowcast.plan_files import write_policy
from narrowcast.policy import POLICIES, Policy
from recipes import torchvision_on_cpu  # noqa: F401 -- before what imports torchvision
from small_training import is_equal, small_model

accelerate = pytest.importorskip("accelerate")
pytestmark = pytest.mark.filterwarnings("ignore", "error:policy .*")  # of its own making
STEPS = 6
X = torch.randn(STEPS * 8, 16, generator=torch.Generator().manual_seed(1))
Y = torch.randint(0, 4, (STEPS * 8,), generator=torch.Generator().manual_seed(2))
WORDS = {"fp16": "fp16", "bf16": "bf16"}


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    """An Accelerator keeps its state in the class."""
    yield
    accelerate.state.AcceleratorState._reset_state(True)
    accelerate.state.GradientState._reset_state()


def accelerator(precision: Any, **options: Any) -> Any:
    accelerate.state.AcceleratorState._reset_state(True)
    return accelerate.Accelerator(cpu=True, mixed_precision=WORDS.get(precision, "no"), **options)


class Run:
    """A model on an Accelerator, and its loop."""

    def __init__(self, precision: Any) -> None:
        self.accelerator = accelerator(precision)
        self.precision: AttachedPrecision = attach(self.accelerator, precision)
        self.plain = small_model()
        optimizer = torch.optim.AdamW(self.plain.parameters(), lr=1e-2)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 1 / (1 + n))
        loader = DataLoader(TensorDataset(X, Y), batch_size=8)
        self.model, self.optimizer, self.loader, self.scheduler = self.precision.prepare(
            self.plain, optimizer, loader, scheduler
        )
        self.applied: list[bool] = []

    def train(self, start: int = 0, stop: int = STEPS, *, break_at: int = -1) -> Run:
        for i, (inputs, targets) in enumerate(self.loader):
            if not start <= i < stop:
                continue
            loss = F.cross_entropy(self.model(inputs), targets)
            self.accelerator.backward(loss)
            if i == break_at:
                self.plain[0].weight.grad[0, 0] = math.inf
            self.accelerator.clip_grad_norm_(self.model.parameters(), 0.5)
            self.optimizer.step()
            self.scheduler.step()
            self.optimizer.zero_grad()
            self.applied.append(self.precision.last_outcome.applied)
        return self


def by_engine(precision: str) -> nn.Module:
    model: nn.Module = small_model()
    plan = plan_named(precision)
    optimizer = planned_optimizer(torch.optim.AdamW(model.parameters(), lr=1e-2), model, plan)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 1 / (1 + n))
    engine = narrowcast.Engine(model, optimizer, plan, scheduler=scheduler, clip_norm=0.5)
    for inputs, targets in zip(X.split(8), Y.split(8), strict=True):
        with engine.forward():
            logits = model(inputs).float()
        engine.backward(F.cross_entropy(logits, targets))  # outside, as these loops have it
        engine.step()
    return model


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_an_accelerator_trains_what_the_engine_trains(precision: str) -> None:
    """The same weights bit for bit, with clipping and a scheduler; the label is what executed."""
    run = Run(precision).train()

    assert is_equal(run.plain, by_engine(precision))
    executed = run.precision.host_plan.first_pass.executed
    assert set(executed["matmul"]) == {precision}


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-split", "lean"])
def test_16_bit_weights_with_stores_train(precision: str) -> None:
    """The optimizer gets the plan's stores, and the loop knows nothing of it.

    No bits are compared: Accelerate clips by torch's function, which sums bf16 norms in bf16.
    """
    run = Run(precision).train()

    expected = by_engine(precision)
    # A norm in bf16 is off by 2^-9 at most, and so is each update of 1e-2, of which there are 6;
    # weights are bf16 numbers below 1, so one may round to the neighbour, 2^-8 away, at each step.
    for own, engines in zip(run.plain.parameters(), expected.parameters(), strict=True):
        assert own.dtype is torch.bfloat16
        assert (own - engines).abs().max() <= STEPS * (1e-2 * 2**-8 + 2**-8)
    stores = {type(run.optimizer.optimizer).__module__.partition(".")[0]}
    assert stores == ({"torch"} if precision == "bf16-true" else {"narrowcast"})


def test_without_us_fp16_on_a_cpu_is_fp32() -> None:
    """Why this adapter checks: the same Accelerator alone computes in fp32 and says fp16."""
    plain = accelerator("fp16")
    model = plain.prepare(small_model())
    formats = []
    model[2].register_forward_hook(lambda _m, _i, output: formats.append(output.dtype))

    model(X[:8])

    assert (plain.mixed_precision, formats) == ("fp16", [torch.float32])


@pytest.mark.parametrize("precision", ["fp16", "bf16", "bf16-split"])
def test_a_skipped_step_holds_the_scheduler_and_is_told(precision: str) -> None:
    """The Accelerator knows it in every precision, and the ledger names the weight."""
    run = Run(precision).train(break_at=2)

    assert run.applied == [i != 2 for i in range(STEPS)]
    assert run.precision.skips[0].parameters == ("0.weight",)
    assert run.scheduler.get_last_lr() == [pytest.approx(1e-2 / STEPS)]
    assert all(p.isfinite().all() for p in run.plain.parameters())


@pytest.mark.parametrize("precision", ["fp16", "bf16", "bf16-split", "lean"])
def test_what_is_saved_goes_on_exactly(precision: str, tmp_path: Path) -> None:
    """accelerator.save_state and load_state hold scale, ledger, stores and the plan."""
    whole = Run(precision).train(break_at=1)
    trained = [p.detach().clone() for p in whole.plain.parameters()]

    Run(precision).train(0, 3, break_at=1).accelerator.save_state(str(tmp_path))
    second = Run(precision)
    second.accelerator.load_state(str(tmp_path))
    second.train(3)

    assert all(map(torch.equal, trained, second.plain.parameters()))
    assert second.precision.skips == whole.precision.skips
    assert second.scheduler.state_dict() == whole.scheduler.state_dict()


def test_the_state_of_another_plan_is_refused(tmp_path: Path) -> None:
    """Two plans with the same mixed_precision are told apart when a state is loaded."""
    Run("fp32").train(0, 1).accelerator.save_state(str(tmp_path))
    other = Run(Policy(name="another fp32"))

    with pytest.raises(CheckpointError, match="of another precision"):
        other.accelerator.load_state(str(tmp_path))


REHEARSED = Policy(name="bf16", compute="bf16", autocast_rules="cuda")


@pytest.mark.parametrize(
    ("words", "precision", "message"),
    [
        ("no", "fp16", "made with 'no'"),
        ("fp16", "bf16", "made with 'fp16'"),
        ("bf16", "bf16-split", "goes with mixed_precision='no'"),
        ("bf16", REHEARSED, "are rehearsed by our own autocast"),
    ],
)
def test_an_accelerator_that_was_asked_for_something_else_is_refused(
    words: str, precision: Any, message: str
) -> None:
    """Two words for one training, one of which would be wrong."""
    with pytest.raises(UsageError, match=message):
        attach(accelerator(words), precision)


def test_what_comes_too_late_or_does_not_belong_is_refused() -> None:
    """attach after prepare; an optimizer of no model; micro-batches summed in bf16."""
    late = accelerator("no")
    late.prepare(small_model())
    with pytest.raises(UsageError, match="has prepared a model"):
        attach(late, "fp32")

    with pytest.raises(UsageError, match="given a str"):
        attach("fp32", "fp32")

    with pytest.raises(UsageError, match="gradient_accumulation_steps=2 sums gradients"):
        attach(accelerator("no", gradient_accumulation_steps=2), "bf16-split")

    precision = attach(accelerator("fp16"), "fp16")
    with pytest.raises(UsageError, match="holds no parameter of a model"):
        precision.prepare(small_model(), torch.optim.SGD(small_model().parameters(), lr=0.1))


def test_detach_gives_the_accelerator_its_settings_back() -> None:
    """Afterwards it is the Accelerator that it was, and saves nothing of ours."""
    plain = accelerator("fp16")
    before = (plain.native_amp, plain.scaler)

    attach(plain, POLICIES["fp16"]).detach()

    assert (plain.native_amp, plain.scaler) == before
    assert plain._custom_objects == []


def test_a_precision_may_stand_in_a_file(tmp_path: Path) -> None:
    """A policy file by its path or its name; a file that holds none is one error."""
    policy = POLICIES["fp16"].keeping_fp32("2")
    plan = narrowcast.Plan(name="fp16", policy=policy)
    path = tmp_path / "policy.json"
    write_policy(path, plan, why="a test", command="pytest")

    for given in (path, str(path)):
        assert attach(accelerator("fp16"), given).host_plan.plan == plan
    empty = tmp_path / "empty.json"
    empty.write_text("{}")
    with pytest.raises(UsageError, match="holds no plan"):
        attach(accelerator("fp16"), empty)
