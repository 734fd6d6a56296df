"""Updates lost to rounding: computed rates, a slow oracle, and live optimizers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from narrowcast.engine.engine import Engine
from narrowcast.errors import UsageError
from narrowcast.optim.adamw import AdamW
from narrowcast.optim.lion import Lion
from narrowcast.optim.sgd import SGD
from narrowcast.policy import Policy
from narrowcast.precision.cast import torch_dtype
from narrowcast.ranges.meter import UpdateMeter, WeightUpdates
from narrowcast.ranges.updates import averaging, lost_updates, with_decay

# Shares of sign updates of size lr that weights of N(0, 0.02) lose; from the integral of the normal
# density over |w| with lr < half a step, computed in /work/shared/research/numerics.md, 0.8.
RATES = [
    ("bf16", 1e-4, 0.118),
    ("bf16", 1e-5, 0.844),
    ("bf16", 1e-6, 0.981),
    ("fp16", 1e-5, 0.118),
    ("fp16", 1e-6, 0.844),
]


def normal_weights(numel: int = 1 << 19) -> Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(7)) * 0.02


def sign_update(lr: float, like: Tensor) -> Tensor:
    return lr * torch.randn(like.shape, generator=torch.Generator().manual_seed(8)).sign()


def oracle(before: Tensor, update: Tensor, into: str) -> tuple[int, int]:
    """Count updated and lost elements, one Python number at a time."""
    dtype = torch_dtype(into)
    updated = lost = 0
    for w, u in zip(before.flatten(), update.flatten(), strict=True):
        stored = w.to(dtype).float()
        wanted = stored + u.float()
        if wanted == stored:
            continue
        updated += 1
        lost += int((wanted.to(dtype).float() == stored).item())
    return updated, lost


@pytest.mark.parametrize(("into", "lr", "rate"), RATES)
def test_the_share_of_lost_updates_is_the_computed_one(into: str, lr: float, rate: float) -> None:
    """Within one point of the rates computed beforehand (half a million elements: 0.07 points)."""
    weights = normal_weights()

    found = lost_updates(weights, sign_update(lr, weights), into)
    assert found.share == pytest.approx(rate, abs=0.01)
    assert found.elements == found.updated == weights.numel()
    assert found.ratio == pytest.approx(lr / 0.02, rel=0.01)


@pytest.mark.parametrize("into", ["bf16", "fp16", "e4m3", "e5m2", "fp32"])
@pytest.mark.parametrize("shape", [(), (0,), (1,), (7, 9), (300,)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_counts_equal_those_of_one_element_at_a_time(
    into: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    """Any format, any shape, some updates 0."""
    before = torch.randn(shape).to(dtype)
    update = torch.randn(shape) * torch.randint(0, 2, shape) * 2.0 ** -dtype_bits(into)

    found = lost_updates(before, update.to(dtype), into)
    assert (found.updated, found.lost) == oracle(before, update.to(dtype), into)
    assert found.elements == before.numel()


def dtype_bits(into: str) -> int:
    return round(-math.log2(torch.finfo(torch_dtype(into)).eps)) + 1


def test_layout_in_memory_and_length_make_no_difference() -> None:
    """A transposed tensor of more than one chunk is counted as its copy is."""
    before, update = torch.randn(1030, 1030).t(), torch.randn(1030, 1030) * 1e-3

    found = lost_updates(before, update, "bf16")
    assert found == lost_updates(before.contiguous(), update, "bf16")


def test_rounding_at_the_half_goes_to_the_even_number() -> None:
    """A tie from an even number stays where it is, and from an odd one moves."""
    half = 2.0**-9
    before = torch.tensor([1.0, 1.0 + 2.0**-7, 1.0, 1.0, 0.0])
    update = torch.tensor([half * 2, half * 2, half * 2.01, 0.0, 1e-30])

    found = lost_updates(before, update, "bf16")
    assert (found.updated, found.lost) == (4, 1)


def test_weight_decay_and_averages_are_updates_too() -> None:
    """lr * wd of 1e-5 and an average with decay 0.999 both lose nearly everything in bf16."""
    weights = normal_weights(1 << 16)
    decay = with_decay(torch.zeros_like(weights), weights, lr=1e-4, weight_decay=0.1)
    nearby = weights * 1.01
    average = averaging(weights, nearby, decay=0.999)

    # 1e-5 of a number is less than half of a bf16 step of any number, 2^-9.
    assert lost_updates(weights, decay, "bf16").share == 1.0
    # (1 - 0.999) * 1 % of a number is 1e-5 of it as well.
    assert lost_updates(weights, average, "bf16").share == 1.0
    assert lost_updates(weights, decay, "fp32").share < 0.01
    assert torch.allclose(decay, -1e-5 * weights)


def test_what_arrives_of_an_update_is_measured() -> None:
    """All of it in fp32, none where all is lost, None where there is none."""
    weights = normal_weights(1 << 12)
    update = sign_update(1e-4, weights)

    assert lost_updates(weights, update, "fp32").carried == pytest.approx(1, abs=1e-5)
    assert lost_updates(torch.ones(9), torch.full((9,), 1e-4), "bf16").carried == 0
    assert lost_updates(weights, torch.zeros_like(weights), "bf16").carried is None
    assert lost_updates(weights, torch.zeros_like(weights), "bf16").share == 0
    assert lost_updates(torch.zeros(2), torch.ones(2), "bf16").ratio == math.inf


def test_what_does_not_fit_together_is_refused() -> None:
    """Shapes that differ, and a format that nothing is stored in."""
    with pytest.raises(UsageError, match=r"\(3,\)"):
        lost_updates(torch.ones(2), torch.ones(3), "bf16")
    with pytest.raises(UsageError, match="tf32"):
        lost_updates(torch.ones(2), torch.ones(2), "tf32")
    with pytest.raises(UsageError, match="sample of 0"):
        UpdateMeter(torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0), sample=0)


class Weights(nn.Module):
    """Parameters of N(0, 0.02), whose gradients have random signs."""

    def __init__(self, numel: int = 1 << 17, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.weight = nn.Parameter(normal_weights(numel).to(dtype))

    def loss(self) -> Tensor:
        signs = sign_update(1.0, self.weight.detach().float())
        return (self.weight.float() * signs).sum()


def updates_of(model: Weights, optimizer: Optimizer, steps: int = 1) -> WeightUpdates:
    """Take steps under the meter, and return what the last one did to the weight."""
    with UpdateMeter(optimizer, model) as meter:
        for _ in range(steps):
            optimizer.zero_grad()
            model.loss().backward()
            optimizer.step()
    (found,) = meter.updates
    return found


@pytest.mark.parametrize(("lr", "rate"), [(1e-4, 0.118), (1e-5, 0.844), (1e-6, 0.981)])
@pytest.mark.parametrize("make", [torch.optim.Adam, torch.optim.SGD], ids=["Adam", "SGD"])
def test_a_live_optimizer_on_bf16_weights_loses_what_was_computed(
    make: Callable[..., Optimizer], lr: float, rate: float
) -> None:
    """Adam's first step moves every weight by lr: within one point of the computed rates."""
    model = Weights(dtype=torch.bfloat16)

    found = updates_of(model, make(model.parameters(), lr=lr))
    assert (found.name, found.stored, found.rule_known) == ("weight", "bf16", True)
    # 65,536 sampled elements: four standard errors are 0.8 points at most.
    assert found.weight.share == pytest.approx(rate, abs=0.01)
    assert found.weight.elements == 1 << 16


@pytest.mark.parametrize(("lr", "rate"), [(1e-5, 0.118), (1e-6, 0.844)])
def test_fp16_weights_lose_what_was_computed(lr: float, rate: float) -> None:
    """fp16 has three more bits, and so the rates of an eighth of the learning rate."""
    model = Weights(dtype=torch.float16)

    found = updates_of(model, torch.optim.SGD(model.parameters(), lr=lr))
    assert found.weight.share == pytest.approx(rate, abs=0.01)


@pytest.mark.parametrize("foreach", [False, True])
def test_decoupled_weight_decay_is_part_of_the_update_that_is_missed(foreach: bool) -> None:
    """AdamW with no gradient but 0 decays by lr * wd = 1e-4 of a number: all of it is lost."""
    model = Weights(dtype=torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1, foreach=foreach)
    model.weight.grad = torch.zeros_like(model.weight)

    with UpdateMeter(optimizer, model) as meter:
        optimizer.step()
    (found,) = meter.updates
    assert found.weight.share == 1.0
    assert found.weight.updated > 0.99 * found.weight.elements
    assert found.weight.ratio == pytest.approx(1e-4, rel=1e-3)
    assert found.weight.carried == 0


def test_bf16_moments_are_metered_as_averages() -> None:
    """exp_avg_sq moves by a thousandth of itself towards equal squares: bf16 does not take it."""
    model = Weights(4096, torch.bfloat16)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)

    found = updates_of(model, optimizer, steps=12)
    assert set(found.states) == {"exp_avg", "exp_avg_sq"}
    # After n steps the average stands at 1 - 0.999^n of its goal and moves by 1/n of itself, at
    # step 12 still by more than a bf16 step: every element moves.
    assert found.states["exp_avg_sq"].share == 0.0
    settled = torch.full_like(model.weight, 1.1)
    optimizer.state[model.weight]["exp_avg_sq"] = settled
    found = updates_of(model, optimizer)
    assert found.states["exp_avg_sq"].share == 1.0
    assert found.states["exp_avg_sq"].carried == 0


@pytest.mark.parametrize("rule", [AdamW, Lion, SGD], ids=lambda rule: rule.__name__)
@pytest.mark.parametrize("states", ["fp32", "bf16", "int8"])
def test_a_split_master_loses_nothing(rule: Any, states: str) -> None:
    """bf16 weights with 16 bits of remainder take every update that fp32 takes."""
    model = Weights(5000)
    optimizer = rule(model.parameters(), lr=1e-6, weights="split16", states=states)

    found = updates_of(model, optimizer, steps=2)
    assert (found.stored, found.rule_known) == ("bf16 (split16)", True)
    assert found.weight.lost == 0
    assert found.weight.updated > 0
    assert found.weight.carried == pytest.approx(1, abs=1e-6)


def test_stochastic_rounding_loses_single_updates_and_carries_their_sum() -> None:
    """An element stays with the probability of its missing part, and the update arrives all the
    same."""
    model, lr = Weights(), 1e-5
    optimizer = SGD(model.parameters(), lr=lr, weights="stochastic")
    before = model.weight.detach().float()

    found = updates_of(model, optimizer)
    step = 2.0 ** (before.abs().frexp().exponent - 8)
    # 65,536 draws: four standard deviations are 0.8 points for a share, and for the other, whose
    # single draws have a variance below step / lr, 16 on average, four are 0.064.
    stays = (1 - lr / step).clamp(0).mean().item()
    assert found.weight.share == pytest.approx(stays, abs=0.008)
    assert found.weight.carried == pytest.approx(1, abs=0.064)


def test_fp32_weights_and_those_without_a_gradient_are_left_out() -> None:
    """Only 16-bit weights lose anything that is worth a look."""
    wide, idle = Weights(100), Weights(100, torch.bfloat16)
    optimizer = torch.optim.SGD([*wide.parameters(), *idle.parameters()], lr=1.0)
    wide.loss().backward()

    with UpdateMeter(optimizer) as meter:
        optimizer.step()
    assert meter.updates == ()


class Whimsical(torch.optim.Optimizer):
    """An optimizer that needs something which is in none of its groups."""

    def __init__(self, params: Any, secret: float) -> None:
        super().__init__(params, {})
        self.secret = secret

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(self.secret * p.grad)


def test_an_optimizer_that_cannot_be_copied_is_metered_by_its_gradients() -> None:
    """What had a gradient and did not move is lost; the record says that the rule is not known."""
    model = Weights(dtype=torch.bfloat16)

    found = updates_of(model, Whimsical(model.parameters(), 1e-5))
    assert not found.rule_known
    assert found.weight.share == pytest.approx(0.844, abs=0.01)
    assert found.weight.carried is None


def trained(optimizer_of: Callable[[nn.Module], Optimizer], metered: bool) -> tuple[Any, ...]:
    """Train three steps, and return weights, states and the random state afterwards."""
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 2)).bfloat16()
    optimizer = optimizer_of(model)
    meter = UpdateMeter(optimizer, model, sample=10)
    if metered:
        meter.__enter__()
    for _ in range(3):
        optimizer.zero_grad()
        F.mse_loss(model(torch.randn(4, 8).bfloat16()).float(), torch.randn(4, 2)).backward()
        optimizer.step()
    if metered:
        meter.__exit__(None, None, None)
        assert len(meter.updates) == 4
    states = [v for s in optimizer.state.values() for v in s.values()]
    return [p.detach().clone() for p in model.parameters()], states, torch.get_rng_state()


@pytest.mark.parametrize(
    "optimizer_of",
    [
        lambda m: torch.optim.AdamW(m.parameters(), lr=1e-3),
        lambda m: torch.optim.AdamW(m.parameters(), lr=1e-3, fused=True),
        lambda m: torch.optim.SGD(m.parameters(), lr=1e-2, momentum=0.9, nesterov=True),
        lambda m: torch.optim.Adafactor(m.parameters(), lr=1e-2),
        lambda m: AdamW(m.parameters(), lr=1e-3, weights="stochastic", states="int8"),
    ],
    ids=["AdamW", "fused", "SGD", "Adafactor", "narrow"],
)
def test_a_metered_training_is_the_same_bit_for_bit(
    optimizer_of: Callable[[nn.Module], Optimizer],
) -> None:
    """Weights, states and random numbers are what they are without the meter."""
    plain, metered = trained(optimizer_of, False), trained(optimizer_of, True)

    for a, b in zip(plain[0] + [plain[2]], metered[0] + [metered[2]], strict=True):
        assert torch.equal(a, b)
    for a, b in zip(plain[1], metered[1], strict=True):
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b


def test_a_step_of_the_engine_is_metered_after_unscaling_and_a_skipped_one_not() -> None:
    """The update is that of the true gradient; a skip leaves what was there before."""
    model = Weights(1000)
    policy = Policy(name="x", param="bf16", compute="bf16", reduce="fp32", scaling="none")
    engine = Engine(model, torch.optim.SGD(model.parameters(), lr=1e-5), policy)
    with UpdateMeter(engine._lane(None).optimizer, model) as meter:
        for factor in (1.0, math.nan):
            with engine.forward():
                loss = model.loss() * factor
            engine.backward(loss)
            engine.step()

    (found,) = meter.updates
    assert found.weight.ratio == pytest.approx(5e-4, rel=0.1)


def test_the_meter_takes_its_hooks_away() -> None:
    """After the block the optimizer steps as before, and the last result stays."""
    model = Weights(100, torch.bfloat16)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    first = updates_of(model, optimizer)

    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    assert first.weight.elements == 100
