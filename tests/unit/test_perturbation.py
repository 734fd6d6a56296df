"""A control run starts a few units in the last place away, and provably elsewhere."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from narrowcast.errors import PrecisionError
from narrowcast.training.perturbation import perturb

Batch = tuple[Tensor, Tensor]


def loss(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def a_model() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))


def a_batch() -> Batch:
    x = torch.randn(16, 6)
    x[:, :3] = 0  # as the margin of an image
    return x, torch.randint(0, 3, (16,))


def changed(model: nn.Module, before: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: (tensor != before[name]).nonzero()
        for name, tensor in model.state_dict().items()
        if not torch.equal(tensor, before[name])
    }


@pytest.mark.parametrize("seed", range(5))
def test_the_first_loss_provably_differs(seed: int) -> None:
    """What moved is as small as does that, and the loss of the first batch is another number."""
    torch.manual_seed(seed)
    model, batch = a_model(), a_batch()
    before = loss(model, batch).item()

    what = perturb(model, loss, batch, seed=0)

    assert "moved by" in what
    assert "but not the first loss" not in what
    assert loss(model, batch).item() != before


def test_one_weight_moves_by_one_ulp_where_that_is_enough() -> None:
    """A loss that is the weight itself: its neighbour above, and no other weight."""
    model = nn.Linear(3, 1, bias=False)
    before = {n: t.clone() for n, t in model.state_dict().items()}

    what = perturb(model, lambda m, _: next(m.parameters())[0, 1] * 1.0, None, seed=0)

    assert what == "weight[0, 1] moved by one unit in the last place"
    assert changed(model, before)["weight"].tolist() == [[0, 1]]
    old = before["weight"][0, 1]
    assert model.state_dict()["weight"][0, 1] == torch.nextafter(old, torch.tensor(torch.inf))


def test_a_loss_that_never_shows_it_is_said() -> None:
    """Rounded losses with gradients that do change: the largest step, and words that say so."""
    model = nn.Linear(4, 1, bias=False)

    def rounded(model: nn.Module, batch: Tensor) -> Tensor:
        # The value is 1 whatever the weights; the gradient is that of the square.
        exact: Tensor = model(batch).square().sum()
        return exact - exact.detach() + 1

    what = perturb(model, rounded, torch.randn(1, 4), seed=0)

    assert what == (
        "every weight moved by 64 units in the last place, which changes gradients but not the "
        "first loss"
    )


def test_nothing_else_of_the_run_is_touched() -> None:
    """Running statistics, gradients and random states are as before."""
    model, batch = a_model(), a_batch()
    buffers = [b.clone() for b in model.buffers()]
    torch.manual_seed(5)
    random.seed(5)
    expected = (torch.rand(()), random.random())
    torch.manual_seed(5)
    random.seed(5)

    perturb(model, loss, batch, seed=0)

    assert (torch.rand(()), random.random()) == expected
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(buffers, model.buffers(), strict=True))


def test_a_change_that_rounds_away_is_widened() -> None:
    """Where one weight's change vanishes in a sum, all weights of the parameter move."""
    model = nn.Linear(4, 1, bias=False)
    model.weight.data.fill_(1e-6)

    def far(model: nn.Module, batch: Tensor) -> Tensor:
        # 1e-13 added to 1 rounds away four times; the gradients see only the rounded sum.
        return (1 + model(batch)).square().sum()

    batch = torch.full((1, 4), 0.25)
    model.weight.data.fill_(2.0**-24)

    what = perturb(model, far, batch, seed=0)

    assert what.startswith("every")


def test_a_loss_without_weights_is_an_error() -> None:
    """No control can be made, and the weights are given back."""
    model = nn.Linear(2, 1)
    before = {n: t.clone() for n, t in model.state_dict().items()}

    def constant(model: nn.Module, batch: Tensor) -> Tensor:
        return (model(batch) * 0).sum()

    with pytest.raises(PrecisionError, match="neither the loss nor a gradient"):
        perturb(model, constant, torch.ones(1, 2), seed=0)

    assert changed(model, before) == {}
