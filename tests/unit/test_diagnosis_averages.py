"""Averages that stand still in 16 bits, however they are written, and those that have arrived."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from narrowcast.diagnosis.diagnose import diagnose_training
from narrowcast.records.diagnosis import DiagnosisRecord

pytestmark = pytest.mark.slow

BATCHES = [
    (
        torch.randn(16, 8, generator=torch.Generator().manual_seed(i)),
        torch.randint(0, 4, (16,), generator=torch.Generator().manual_seed(i)),
    )
    for i in range(4)
]


def _moved(form: str, mean: Tensor, new: Tensor, w: float) -> Tensor | None:
    """Move a mean towards a new value; return what is to stand in its place, if not in place."""
    match form:
        case "lerp_":
            mean.lerp_(new, w)
        case "add_":
            mean.mul_(1 - w).add_(new, alpha=w)
        case "add_ of the distance":
            mean.add_(new - mean, alpha=w)
        case "copy_":
            mean.copy_(mean * (1 - w) + w * new)
        case "copy_ of fp32":
            mean.copy_(mean.float() * (1 - w) + w * new.float())
        case "a new tensor":
            return mean * (1 - w) + w * new
        case "a new tensor, the other way round":
            return w * new + (1 - w) * mean
        case "lerp":
            return torch.lerp(mean, new, w)
        case "sub":
            return mean - w * (mean - new)
    return None


IN_PLACE = ("lerp_", "add_", "add_ of the distance", "copy_", "copy_ of fp32")
FORMS = (*IN_PLACE, "a new tensor", "a new tensor, the other way round", "lerp", "sub")


class Centred(nn.Module):
    """Takes a running mean off; `spread` is how much the values vary round 1."""

    def __init__(self, form: str, w: float, spread: float) -> None:
        super().__init__()
        self.form, self.w, self.spread = form, w, spread
        self.stem, self.head = nn.Linear(8, 16), nn.Linear(16, 4)
        self.register_buffer("mean", torch.full((16,), 1.5 if spread > 0.1 else 1.0))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.stem(x) * self.spread) + 1
        with torch.no_grad():
            moved = _moved(self.form, self.mean, x.mean(0).to(self.mean.dtype), self.w)
            if moved is not None:
                self.mean = moved
        return self.head(x - self.mean.to(x.dtype))  # type: ignore[no-any-return]


def diagnosed(
    form: str, w: float, spread: float = 1.0, precision: str = "bf16-true"
) -> DiagnosisRecord:
    torch.manual_seed(0)
    return diagnose_training(
        Centred(form, w, spread),
        lambda m: torch.optim.SGD(m.parameters(), lr=0.3),
        lambda m, b: F.cross_entropy(m(b[0]).float(), b[1]),
        BATCHES,
        precision,
        steps=8,
    )


@pytest.mark.parametrize("form", FORMS)
def test_a_slow_average_in_bf16_is_accused_however_it_is_written(form: str) -> None:
    """A thousandth of what comes in is less than half of bf16's spacing."""
    record = diagnosed(form, 0.001)

    assert record.verdict == "low-precision accumulation"
    assert "'mean'" in record.finding.explanation
    assert "mean" in record.finding.code


@pytest.mark.parametrize("form", FORMS)
def test_a_fast_average_is_not(form: str) -> None:
    """A tenth of what comes in arrives."""
    assert diagnosed(form, 0.1).verdict == "fine"


@pytest.mark.parametrize("form", FORMS)
def test_an_average_that_stands_still_where_it_was_to_go_is_not(form: str) -> None:
    """The way left is less than bf16 tells apart; weights that stand still are another matter."""
    record = diagnosed(form, 0.1, spread=0.01)

    assert "low-precision accumulation" not in {
        record.verdict,
        *(finding.kind for finding in record.others),
    }


@pytest.mark.parametrize("form", ["sub", "lerp_", "lerp"])
def test_a_slow_average_four_percent_from_its_goal_has_not_arrived(form: str) -> None:
    """A fiftieth of that is less than half of bf16's spacing: it never gets nearer."""
    torch.manual_seed(0)
    model = Centred(form, 0.02, 0.01)
    model.mean.fill_(1 / 1.04)

    record = diagnose_training(
        model,
        lambda m: torch.optim.SGD(m.parameters(), lr=0.3),
        lambda m, b: F.cross_entropy(m(b[0]).float(), b[1]),
        BATCHES,
        "bf16-true",
        steps=8,
    )

    assert record.verdict == "low-precision accumulation"


def test_an_average_in_fp32_beside_bf16_is_not() -> None:
    """Under autocast buffers stay as they are."""
    assert diagnosed("a new tensor", 0.001, precision="bf16").verdict == "fine"


class Table(nn.Module):
    """A table of constants that is written anew, the same, in every forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(8, 16), nn.Linear(16, 4)
        self.register_buffer("table", torch.zeros(16))

    def forward(self, x: Tensor) -> Tensor:
        self.table.copy_(torch.cos(torch.arange(16.0)))
        return self.head(torch.tanh(self.stem(x)) + self.table)  # type: ignore[no-any-return]


class Target(nn.Module):
    """A frozen copy of a layer that follows it by a thousandth a step."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.own, self.target, self.head = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 4)
        self.target.load_state_dict(self.own.state_dict())
        self.target.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        pairs = zip(self.target.parameters(), self.own.parameters(), strict=True)
        with torch.no_grad():
            for follows, leads in pairs:
                if self.how == "in place":
                    follows.lerp_(leads, 0.001)
                else:
                    follows.data = follows.data * 0.999 + leads.data * 0.001
            away = self.target(x)
        own = self.own(x)
        return self.head(torch.tanh(own)) + 0.1 * (own - away).abs().mean()  # type: ignore[no-any-return]


def trained(model: nn.Module) -> DiagnosisRecord:
    torch.manual_seed(0)
    return diagnose_training(
        model,
        lambda m: torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.5),
        lambda m, b: F.cross_entropy(m(b[0]).float(), b[1]),
        BATCHES,
        "bf16-true",
        steps=12,
    )


def test_a_table_that_is_written_anew_is_no_average() -> None:
    """What is written does not come from what was there."""
    assert trained(Table()).verdict == "fine"


@pytest.mark.parametrize("how", ["in place", "as a new tensor"])
def test_a_target_network_that_does_not_follow_is_accused_by_its_own_name(how: str) -> None:
    """The sum is the model's; what it is lost in is the target's weight."""
    record = trained(Target(how))

    assert (record.verdict, record.finding.module) == ("low-precision accumulation", "target")


class Noise(nn.Module):
    """Mixes noise in, as diffusion does: the share that is kept is a product of ``1 - rate``."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.register_buffer("rate", torch.full((1000,), rate))

    def forward(self, x: Tensor) -> Tensor:
        kept = torch.cumprod(1 - self.rate, 0)[torch.randint(500, 1000, (len(x), 1))]
        return x * kept.sqrt() + torch.randn_like(x) * (1 - kept).sqrt()


def test_small_rates_that_vanish_beside_1_are_accused_where_the_gradients_are_others() -> None:
    """1 - 0.001 is 1 in bf16: there is no noise, and the loss is far lower than fp32's."""
    torch.manual_seed(0)
    model = nn.Sequential(Noise(1e-3), nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 8))

    record = diagnose_training(
        model,
        lambda m: torch.optim.SGD(m.parameters(), lr=0.3),
        lambda m, b: F.mse_loss(m(b[0]).float(), b[0].float()),
        BATCHES,
        "bf16-true",
        steps=20,
    )

    assert (record.verdict, record.finding.module) == ("low-precision accumulation", "0")
    assert "1 - self.rate" in record.finding.code
    assert any("below fp32's" in note for note in record.notes)


class Gained(nn.Module):
    """``1 + gain`` of gains that begin near 0, as adaptive norms have it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.gain, self.head = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 4)
        with torch.no_grad():
            self.gain.weight.mul_(1e-4)
            self.gain.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.stem(x)) * (1 + self.gain(x)))  # type: ignore[no-any-return]


def test_a_gain_that_begins_near_0_is_healthy() -> None:
    """It vanishes beside 1 as well, and nothing hangs on it."""
    torch.manual_seed(0)
    record = diagnose_training(
        Gained(),
        lambda m: torch.optim.Adam(m.parameters(), lr=1e-3),
        lambda m, b: F.cross_entropy(m(b[0]).float(), b[1]),
        BATCHES,
        "bf16",
        steps=12,
    )

    assert record.verdict == "fine"
