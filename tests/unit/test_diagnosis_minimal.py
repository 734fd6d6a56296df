"""The smallest set to keep in fp32 is the planted one, and each member is proved."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from narrowcast.diagnosis.examine import examine
from narrowcast.diagnosis.minimal import Clues, kept_in, minimal_fp32
from narrowcast.diagnosis.subject import ComputeLoss, Parts, Subject, subject_of_parts
from narrowcast.diagnosis.trials import Stage
from narrowcast.plan import plan_named
from narrowcast.records.diagnosis import MinimalFp32

STEPS = 12


class Scaled(nn.Module):
    """A layer that gives large numbers and takes them back at once, in fp32."""

    def __init__(self, gain: float) -> None:
        super().__init__()
        self.up = nn.Linear(8, 8, bias=False)
        self.gain = gain
        with torch.no_grad():
            self.up.weight.mul_(gain)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(x).float() / self.gain


class Scores(nn.Module):
    """Attention whose product of queries and keys overflows, and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(8, 8, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        q, k = 300 * self.q(x), 300 * self.k(x)
        weights = F.softmax(torch.matmul(q, k.transpose(-1, -2)) / 1e8, -1)
        return torch.matmul(weights, self.v(x))


class Net(nn.Module):
    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def subjects(
    build: Callable[[], nn.Module], loss: ComputeLoss | None = None
) -> Callable[[int], Subject]:
    """Return what makes the training of a model under a seed."""
    x = 20 * torch.randn(4, 3, 8, generator=torch.Generator().manual_seed(1))
    y = torch.randn(4, 3, 1, generator=torch.Generator().manual_seed(2))

    def compute(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.mse_loss(model(batch[0]).float() / 20, batch[1])

    def seeded(seed: int) -> Subject:
        parts = Parts(
            model=build,
            optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=1e-6),
            loss=loss or compute,
        )
        return subject_of_parts(
            parts,
            [(x, y)],
            steps=STEPS,
            planned=STEPS,
            seed=seed,
            device=torch.device("cpu"),
        )

    return seeded


def search(seeded: Callable[[int], Subject], precision: str = "fp16") -> MinimalFp32 | None:
    subject, plan = seeded(0), plan_named(precision)
    found = examine(subject, plan, STEPS, lambda words: None)
    assert found.findings[0].kind == "forward overflow"
    stage = Stage(subject, found.snapshots, found.findings[0])
    clues = Clues(findings=found.findings, ranges=())
    return minimal_fp32(stage, plan, clues, under_seed=seeded, steps=STEPS)


@pytest.mark.slow
def test_two_culprits_among_many_modules() -> None:
    """Both and only both; each one dropped alone fails; trainings with them are fine."""

    def build() -> nn.Module:
        gains = (1.0, 1e5, 1.0, 1.0, 1e5, 1.0)
        return Net(*(Scaled(gain) for gain in gains))

    minimal = search(subjects(build))

    assert minimal is not None
    assert set(minimal.modules) == {"blocks.1.up", "blocks.4.up"}
    assert set(minimal.keep_fp32) == set(minimal.modules)
    assert minimal.unique
    assert [each.failed for each in minimal.dropped] == [True, True]
    assert all("nan" in each.outcome or "inf" in each.outcome for each in minimal.dropped)
    assert [trial.works for trial in minimal.trainings] == [True, True, True]
    assert minimal.memory_bytes is not None
    assert minimal.operations == ()


@pytest.mark.slow
def test_one_function_of_a_module_is_enough() -> None:
    """Of an attention, the product of queries and keys; its layers stay in fp16."""
    minimal = search(subjects(lambda: Net(Scaled(1.0), Scores(), Scaled(1.0))))

    assert minimal is not None
    assert minimal.modules == ("blocks.1",)
    assert minimal.operations == ("blocks.1:matmul",)
    assert minimal.keep_fp32 == ("blocks.1:matmul",)
    assert minimal.dropped[0].failed


def test_a_failure_outside_of_the_modules_has_no_set() -> None:
    """What the loss does in fp16 is not cured by any module in fp32."""

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        large = 300 * (model(batch[0]).float().abs() + 1)
        return torch.matmul(large, large.transpose(-1, -2)).float().mean() / 1e6

    assert search(subjects(lambda: Net(Scaled(1.0), Scaled(1.0)), loss)) is None


@pytest.mark.parametrize("names", [("blocks.1.up",), ("blocks.1:matmul", ""), ()])
def test_the_plan_that_keeps_a_set_has_a_name_of_its_own(names: tuple[str, ...]) -> None:
    """So that a comparison can hold it against the plain precision."""
    plan = kept_in(plan_named("fp16"), names)

    assert plan.name == plan.policy.name == "fp16-minimal"
    assert plan.policy.keep_fp32 == tuple(name or "*" for name in names)
