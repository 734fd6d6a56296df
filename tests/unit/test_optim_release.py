"""Gradient release: the bits of the ordinary step, without gradients that live together."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from narrowcast.dropin.grad_scaler import GradScaler
from narrowcast.errors import UsageError
from narrowcast.optim.adamw import AdamW
from narrowcast.optim.release import GradientRelease, require_compatible
from optim_cases import RULES, held, same_bits


class Tied(nn.Module):
    """A language model in small: the embedding is also the last layer's weight."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embedding = nn.Embedding(80, 60)
        self.middle = nn.Linear(60, 60)
        for p in self.parameters():
            nn.init.normal_(p, std=0.1, generator=generator)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = torch.tanh(self.middle(self.embedding(tokens)))
        return F.linear(hidden, self.embedding.weight)


def loss_of(model: nn.Module, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, 80, (12,), generator=generator)
    return F.cross_entropy(model(tokens).float(), tokens.roll(1))


@pytest.mark.parametrize("weights", ["fp32", "split16", "split8", "stochastic"])
@pytest.mark.parametrize("states", ["fp32", "int4"])
@pytest.mark.parametrize("rule", RULES)
def test_release_gives_the_bits_of_the_ordinary_step(rule: str, weights: str, states: str) -> None:
    """With a shared parameter, a schedule and every store; no gradient is left."""
    make, options = RULES[rule]
    kept, released = Tied(), Tied()
    optimizers = [
        make(m.parameters(), **options, weights=weights, states=states) for m in (kept, released)
    ]
    schedules = [torch.optim.lr_scheduler.LinearLR(o, total_iters=3) for o in optimizers]
    release = GradientRelease(optimizers[1])
    for step in range(4):
        for model, optimizer, schedule in zip((kept, released), optimizers, schedules, strict=True):
            loss_of(model, step).backward()
            if model is released:
                assert all(p.grad is None for p in model.parameters())
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()

    assert release.skipped == ()
    assert same_bits(held(optimizers[0]), held(optimizers[1]))


def test_gradients_do_not_live_together() -> None:
    """While one parameter steps, no other parameter has a gradient."""
    model = nn.Sequential(*(nn.Linear(20, 20) for _ in range(5)))
    optimizer = AdamW(model.parameters(), weights="split16")
    release = GradientRelease(optimizer)
    together = []
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(
            lambda _: together.append(sum(q.grad is not None for q in model.parameters()))
        )
    model(torch.randn(3, 20, dtype=torch.bfloat16)).sum().backward()

    assert together == [0] * 10
    release.detach()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_never_reaches_a_weight(bad: float) -> None:
    """Its parameter is not stepped, counted or decayed; the others are; it is listed afterwards."""
    first, second = nn.Parameter(torch.ones(50)), nn.Parameter(torch.ones(50))
    optimizer = AdamW([first, second], weights="split16")
    release = GradientRelease(optimizer)
    before = held(optimizer)
    (first.float().sum() * bad + second.float().sum()).backward()
    optimizer.step()

    assert release.skipped == (first,)
    assert first.grad is None
    assert torch.equal(first.detach(), before[0])
    assert "step" not in optimizer.state[first]
    assert optimizer.state[second]["step"] == 1

    (first.float().sum() + second.float().sum()).backward()
    optimizer.step()

    assert release.skipped == ()
    assert [optimizer.state[p]["step"] for p in (first, second)] == [1, 2]


def test_a_second_gradient_before_the_step_is_refused() -> None:
    """Accumulation needs both gradients at once."""
    model = nn.Linear(3, 3)
    optimizer = AdamW(model.parameters())
    GradientRelease(optimizer)
    model(torch.randn(1, 3)).sum().backward()
    with pytest.raises(UsageError, match="used up"):
        model(torch.randn(1, 3)).sum().backward()


def test_what_is_not_released_steps_with_the_optimizer() -> None:
    """Parameters that were frozen, and groups that came later."""
    model, late = nn.Linear(3, 3), nn.Parameter(torch.ones(3))
    model.bias.requires_grad_(False)
    optimizer = AdamW(model.parameters())
    GradientRelease(optimizer)
    model.bias.requires_grad_(True)
    optimizer.add_param_group({"params": [late]})
    bias = model.bias.detach().clone()
    (model(torch.randn(1, 3)).sum() + late.sum()).backward()

    assert model.weight.grad is None
    assert model.bias.grad is not None
    optimizer.step()
    assert not torch.equal(model.bias, bias)
    assert not torch.equal(late, torch.ones(3))


def test_what_is_thawed_or_added_later_is_released_from_then_on() -> None:
    """Its first gradient is stepped at the end and dropped, so that none is added to the next."""
    kept, released = (nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)) for _ in range(2))
    released.load_state_dict(kept.state_dict())
    optimizers = []
    for model in (kept, released):
        model[0].requires_grad_(False)
        optimizers.append(AdamW(model.parameters(), lr=0.1, weight_decay=0.0))
    release = GradientRelease(optimizers[1])
    late = [nn.Parameter(torch.ones(3)) for _ in range(2)]
    for model, optimizer, added in zip((kept, released), optimizers, late, strict=True):
        model[0].requires_grad_(True)
        optimizer.add_param_group({"params": [added]})
    for step in range(4):
        x = torch.randn(5, 3, generator=torch.Generator().manual_seed(step))
        for model, optimizer, added in zip((kept, released), optimizers, late, strict=True):
            model(x * added).sum().backward()
            if model is released:
                assert len(release.arrived) == (5 if step else 2)
                assert (added.grad is None) is (step > 0)
            optimizer.step()
            if model is kept:
                optimizer.zero_grad()

    assert all(p.grad is None for p in (*released.parameters(), late[1]))
    assert same_bits(held(optimizers[0]), held(optimizers[1]))


def test_a_broken_gradient_that_was_not_released_is_not_stepped_either() -> None:
    """Nor kept: the next gradient would be added to it."""
    model = nn.Linear(3, 3)
    model.bias.requires_grad_(False)
    optimizer = AdamW(model.parameters())
    release = GradientRelease(optimizer)
    model.bias.requires_grad_(True)
    before = model.bias.detach().clone()
    (model.weight.sum() + float("nan") * model.bias.sum()).backward()
    optimizer.step()

    assert release.skipped == (model.bias,)
    assert torch.equal(model.bias, before)
    assert model.bias.grad is None


def test_an_iteration_that_is_given_up_leaves_no_gradient() -> None:
    """Not of parameters that were not released either."""
    model = nn.Linear(3, 3)
    model.bias.requires_grad_(False)
    optimizer = AdamW(model.parameters())
    release = GradientRelease(optimizer)
    model.bias.requires_grad_(True)
    model(torch.randn(1, 3)).sum().backward()
    release.end()

    assert release.arrived == ()
    assert model.bias.grad is None


def test_step_hooks_are_called_once_an_iteration() -> None:
    """Not once a parameter."""
    model = nn.Linear(3, 3)
    optimizer = AdamW(model.parameters())
    GradientRelease(optimizer)
    called = []
    optimizer.register_step_post_hook(lambda *_: called.append(1))
    for _ in range(2):
        model(torch.randn(1, 3)).sum().backward()
        optimizer.step()

    assert called == [1, 1]


def test_detaching_ends_it_and_it_may_begin_again() -> None:
    """Gradients are kept again; a second release while one is attached is refused."""
    model = nn.Linear(3, 3)
    optimizer = AdamW(model.parameters())
    release = GradientRelease(optimizer)
    with pytest.raises(UsageError, match="already"):
        GradientRelease(optimizer)
    release.detach()
    model(torch.randn(1, 3)).sum().backward()

    assert model.weight.grad is not None
    with pytest.raises(UsageError, match="zero_grad"):
        GradientRelease(optimizer)
    optimizer.zero_grad()
    GradientRelease(optimizer)


def test_hooks_do_not_keep_the_optimizer_alive() -> None:
    """A dropped optimizer steps nothing any more."""
    model = nn.Linear(3, 3)
    optimizer = AdamW(model.parameters())
    GradientRelease(optimizer)
    gone = weakref.ref(optimizer)
    del optimizer
    gc.collect()

    assert gone() is None
    model(torch.randn(1, 3)).sum().backward()
    assert model.weight.grad is not None


def test_a_deep_copy_is_not_released() -> None:
    """Hooks stay with the parameters that they were given to."""
    optimizer = AdamW(nn.Linear(3, 3).parameters())
    GradientRelease(optimizer)
    twin = copy.deepcopy(optimizer)
    (weight, _) = twin.param_groups[0]["params"]
    weight.sum().backward()

    assert weight.grad is not None


@pytest.mark.parametrize(
    ("asked", "match"),
    [
        ({"accumulate": 2}, "accumulate=2"),
        ({"clip_norm": 1.0}, "norm over all"),
        ({"is_loss_scaled": True}, "loss scaling"),
    ],
)
def test_conflicts_name_both_sides_and_the_reason(asked: dict[str, Any], match: str) -> None:
    """What needs all gradients at once."""
    require_compatible()
    with pytest.raises(UsageError, match=match):
        require_compatible(**asked)


def test_torchs_optimizers_cannot_release() -> None:
    """They have no step for one parameter."""
    with pytest.raises(UsageError, match="narrowed"):
        GradientRelease(torch.optim.AdamW(nn.Linear(3, 3).parameters()))


def test_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients would be used before they are averaged."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(UsageError, match="2 processes"):
        GradientRelease(AdamW(nn.Linear(3, 3).parameters()))


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: [x], lambda x: (x, x)])
def test_our_scaler_refuses_released_gradients_before_anything_moves(wrap: Any) -> None:
    """Backward from a scaled loss would step every parameter with its scaled gradient."""
    model = Tied()
    optimizer = AdamW(model.parameters(), lr=0.1, weights="split16")
    before = held(optimizer)
    release = GradientRelease(optimizer)
    scaler = GradScaler("cpu")
    loss = loss_of(model, 0)

    with pytest.raises(UsageError, match="GradScaler and GradientRelease on the same AdamW"):
        scaler.scale(wrap(loss))
    with pytest.raises(UsageError, match="GradScaler and GradientRelease"):
        scaler.unscale_(optimizer)
    with pytest.raises(UsageError, match="GradScaler and GradientRelease"):
        scaler.step(optimizer)
    assert same_bits(held(optimizer), before)
    assert GradScaler("cpu", enabled=False).scale(loss) is loss

    release.detach()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()


def test_our_scaler_serves_an_optimizer_beside_a_released_one() -> None:
    """As in a training with two models, of which one is scaled."""
    released, scaled = Tied(), Tied()
    release = GradientRelease(AdamW(released.parameters(), weights="split16"))
    optimizer = torch.optim.SGD(scaled.parameters(), 0.1)
    scaler = GradScaler("cpu", init_scale=2.0)
    before = scaled.state_dict()["embedding.weight"].clone()

    scaler.scale(loss_of(scaled, 0)).backward()
    scaler.step(optimizer)
    scaler.update()
    assert not torch.equal(scaled.state_dict()["embedding.weight"], before)
    release.detach()
