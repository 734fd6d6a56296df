"""Our GradScaler does what torch's does: the same loops, bit for bit, in both.

The scenarios follow the documented uses of `torch.amp.GradScaler` (docs.pytorch.org, "Automatic
Mixed Precision examples"). PyTorch's own tests run with ours in the place of torch's through
`tests/conformance/run_torch_grad_scaler_tests.py`; docs/loss-scaling.md has the record.
"""

from __future__ import annotations

import math
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import narrowcast

ROOT = Path(__file__).resolve().parents[2]
SCALERS = [torch.amp.GradScaler, narrowcast.GradScaler]
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "sgd-foreach": lambda p: torch.optim.SGD(p, lr=0.1, foreach=True),
    "sgd-fused": lambda p: torch.optim.SGD(p, lr=0.1, fused=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
}
STEPS, OVERFLOWS = 6, (0, 3)


class Run:
    """A small classifier, its data and a scaler of either kind; all random numbers fixed."""

    def __init__(self, scaler_class: type, optimizer: str, **options: Any) -> None:
        generator = torch.Generator().manual_seed(0)
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
        self.optimizer = OPTIMIZERS[optimizer](self.model.parameters())
        self.scaler = scaler_class("cpu", **{"init_scale": 128.0, "growth_interval": 2, **options})
        self.inputs = torch.randn(STEPS * 2, 4, 6, generator=generator)
        self.targets = torch.randint(0, 3, (STEPS * 2, 4), generator=generator)

    def loss(self, i: int, *, dtype: torch.dtype | None = None) -> Tensor:
        with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
            logits = self.model(self.inputs[i])
        return nn.functional.cross_entropy(logits.float(), self.targets[i])

    def spoil(self, i: int) -> None:
        """Put an infinity where a too large scale would have put one."""
        if i in OVERFLOWS and self.scaler.is_enabled():
            gradient = self.model[2].weight.grad
            assert gradient is not None
            gradient[1, 2] = math.inf

    def finish(self) -> list[Any]:
        """All that the training left behind."""
        state = {k: v for k, v in self.scaler.state_dict().items() if k != "narrowcast"}
        moments = [
            value
            for parameter in self.model.parameters()
            for value in self.optimizer.state[parameter].values()
        ]
        return [*self.model.parameters(), *moments, *state.items()]


def plain(run: Run) -> None:
    for i in range(STEPS):
        run.optimizer.zero_grad()
        run.scaler.scale(run.loss(i)).backward()
        run.spoil(i)
        run.scaler.step(run.optimizer)
        run.scaler.update()


def under_autocast(run: Run) -> None:
    for i in range(STEPS):
        run.optimizer.zero_grad()
        run.scaler.scale(run.loss(i, dtype=torch.float16)).backward()
        run.spoil(i)
        run.scaler.step(run.optimizer)
        run.scaler.update()


def pickled_between_steps(run: Run) -> None:
    for i in range(STEPS):
        run.optimizer.zero_grad()
        run.scaler.scale(run.loss(i)).backward()
        run.spoil(i)
        run.scaler.step(run.optimizer)
        run.scaler.update()
        run.scaler = pickle.loads(pickle.dumps(run.scaler))


def clipped_while_scaled(run: Run) -> None:
    for i in range(STEPS):
        run.optimizer.zero_grad()
        run.scaler.scale(run.loss(i)).backward()
        nn.utils.clip_grad_norm_(run.model.parameters(), 0.2 * run.scaler.get_scale())
        run.spoil(i)
        run.scaler.step(run.optimizer)
        run.scaler.update()


def clipped_after_unscaling(run: Run) -> None:
    for i in range(STEPS):
        run.optimizer.zero_grad()
        run.scaler.scale(run.loss(i)).backward()
        run.spoil(i)
        run.scaler.unscale_(run.optimizer)
        nn.utils.clip_grad_norm_(run.model.parameters(), 0.2)
        run.scaler.step(run.optimizer)
        run.scaler.update()


def accumulated(run: Run) -> None:
    for i in range(STEPS):
        for micro in (2 * i, 2 * i + 1):
            run.scaler.scale(run.loss(micro) / 2).backward()
        run.spoil(i)
        run.scaler.step(run.optimizer)
        run.scaler.update()
        run.optimizer.zero_grad()


def with_a_gradient_penalty(run: Run) -> None:
    for i in range(STEPS):
        run.optimizer.zero_grad()
        loss = run.loss(i)
        scaled = torch.autograd.grad(
            run.scaler.scale(loss), list(run.model.parameters()), create_graph=True
        )
        penalty = sum((g / run.scaler.get_scale()).square().sum() for g in scaled)
        run.scaler.scale(loss + penalty).backward()
        run.spoil(i)
        run.scaler.step(run.optimizer)
        run.scaler.update()


def with_several_losses(run: Run) -> None:
    for i in range(STEPS):
        run.optimizer.zero_grad()
        losses = run.scaler.scale([run.loss(2 * i), run.loss(2 * i + 1)])
        torch.autograd.backward(losses)
        run.spoil(i)
        run.scaler.step(run.optimizer)
        run.scaler.update()


def with_the_scale_set_by_hand(run: Run) -> None:
    for i in range(STEPS):
        run.optimizer.zero_grad()
        run.scaler.scale(run.loss(i)).backward()
        run.scaler.step(run.optimizer)
        run.scaler.update(2.0**i if i % 2 else None)


def resumed_half_way(run: Run) -> None:
    plain(run)
    state = run.scaler.state_dict()
    run.scaler = type(run.scaler)("cpu", enabled=run.scaler.is_enabled())
    run.scaler.load_state_dict(state)
    plain(run)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("enabled", [True, False], ids=["enabled", "disabled"])
@pytest.mark.parametrize(
    "loop",
    [
        plain,
        under_autocast,
        pickled_between_steps,
        clipped_while_scaled,
        clipped_after_unscaling,
        accumulated,
        with_a_gradient_penalty,
        with_several_losses,
        with_the_scale_set_by_hand,
        resumed_half_way,
    ],
    ids=lambda loop: loop.__name__,
)
def test_the_same_loop_leaves_the_same_bits(
    loop: Callable[[Run], None], enabled: bool, optimizer: str
) -> None:
    """Weights, optimizer state, scale and growth counter are equal after six steps, two skipped."""
    torchs, ours = (Run(c, optimizer, enabled=enabled) for c in SCALERS)
    initial = [parameter.clone() for parameter in ours.model.parameters()]
    loop(torchs)
    loop(ours)

    for expected, actual in zip(torchs.finish(), ours.finish(), strict=True):
        if isinstance(expected, Tensor):
            assert torch.equal(expected, actual)
        else:
            assert expected == actual
    assert not any(
        torch.equal(a, b) or b.isnan().any()
        for a, b in zip(initial, ours.model.parameters(), strict=True)
    )


@pytest.mark.parametrize("scaler_class", SCALERS)
def test_two_optimizers_of_which_one_overflows(scaler_class: type) -> None:
    """One is unscaled by hand, the other skips; the shared scale grows thrice and falls once."""
    scaler = scaler_class("cpu", init_scale=128.0, growth_interval=1)
    weights = [nn.Parameter(torch.ones(3)) for _ in range(2)]
    optimizers = [torch.optim.SGD([w], lr=0.5) for w in weights]
    for i in range(4):
        for optimizer in optimizers:
            optimizer.zero_grad()
        scaler.scale(weights[0].sum() + weights[1].sum()).backward(retain_graph=True)
        if i == 1:
            weights[1].grad[0] = math.inf
        scaler.unscale_(optimizers[0])
        scaler.step(optimizers[0])
        scaler.step(optimizers[1])
        scaler.update()

    assert scaler.get_scale() == 128.0 * 2**3 / 2
    assert weights[0].tolist() == [-1.0] * 3
    assert weights[1].tolist() == [-0.5] * 3


@pytest.mark.parametrize("scaler_class", SCALERS)
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("where", range(5))
def test_one_bad_element_in_any_gradient_is_found(
    scaler_class: type, bad: float, where: int
) -> None:
    """Contiguous or not, fp32, fp64, bf16 or sparse: any keeps the optimizer from stepping."""
    shapes = [((4, 4), torch.float32), ((4, 4), torch.float64), ((4, 4), torch.bfloat16)]
    weights = [nn.Parameter(torch.ones(s, dtype=d)) for s, d in shapes]
    weights += [nn.Parameter(torch.ones(4, 3)), nn.Parameter(torch.ones(4, 2))]
    optimizer, scaler = torch.optim.SGD(weights, lr=0.5), scaler_class("cpu", init_scale=4.0)
    scaler.scale(torch.zeros(()))
    for weight in weights[:3]:
        weight.grad = torch.full_like(weight, 4.0)
    weights[3].grad = torch.full((3, 4), 4.0).t()
    values = torch.full((2, 2), 4.0)
    weights[4].grad = torch.sparse_coo_tensor(
        torch.tensor([[0, 2]]), values, (4, 2), check_invariants=False
    )
    (weights[where].grad if where < 4 else weights[4].grad._values())[1, 1] = bad
    scaler.step(optimizer)
    scaler.update()

    assert all((weight == 1).all() for weight in weights)
    assert scaler.get_scale() == 2.0


@pytest.mark.parametrize("scaler_class", SCALERS)
def test_gradients_are_unscaled_in_every_layout(scaler_class: type) -> None:
    """A scale of 4 is divided out of dense, transposed and sparse gradients alike."""
    weights = [nn.Parameter(torch.ones(4, 3)), nn.Parameter(torch.ones(4, 2))]
    optimizer, scaler = torch.optim.SGD(weights, lr=0.5), scaler_class("cpu", init_scale=4.0)
    scaler.scale(torch.zeros(()))
    weights[0].grad = torch.full((3, 4), 4.0).t()
    weights[1].grad = torch.sparse_coo_tensor(
        torch.tensor([[0, 2]]), torch.full((2, 2), 8.0), (4, 2), check_invariants=False
    )
    scaler.unscale_(optimizer)

    assert weights[0].grad.eq(1).all()
    assert weights[1].grad.to_dense().tolist() == [[2, 2], [0, 0], [2, 2], [0, 0]]


@pytest.mark.parametrize("scaler_class", SCALERS)
def test_fp16_gradients_are_refused(scaler_class: type) -> None:
    """fp16 weights have fp16 gradients, which cannot be unscaled without losing them."""
    weight = nn.Parameter(torch.ones(2, dtype=torch.float16))
    optimizer, scaler = torch.optim.SGD([weight]), scaler_class("cpu", init_scale=4.0)
    scaler.scale(weight.sum()).backward()

    with pytest.raises(ValueError, match="FP16"):
        scaler.step(optimizer)


@pytest.mark.parametrize("scaler_class", SCALERS)
def test_the_order_of_calls_is_enforced(scaler_class: type) -> None:
    """No second `unscale_` or `step`, no `unscale_` after `step`, nothing before `scale`."""
    weight = nn.Parameter(torch.ones(2))
    optimizer, scaler = torch.optim.SGD([weight]), scaler_class("cpu")
    for call in (scaler.unscale_, scaler.step, lambda _: scaler.update()):
        with pytest.raises(AssertionError, match="_scale is None"):
            call(optimizer)
    scaler.scale(weight.sum()).backward()
    scaler.unscale_(optimizer)
    with pytest.raises(RuntimeError, match="already been called"):
        scaler.unscale_(optimizer)
    scaler.step(optimizer)
    with pytest.raises(RuntimeError, match="already been called"):
        scaler.step(optimizer)
    with pytest.raises(RuntimeError, match="after step"):
        scaler.unscale_(optimizer)

    scaler.update()
    scaler.scale(weight.sum()).backward()
    scaler.step(optimizer)


@pytest.mark.parametrize("scaler_class", SCALERS)
def test_containers_of_outputs_are_scaled(scaler_class: type) -> None:
    """Lists, tuples and generators keep their kind; the scale tensor is made on first use."""
    scaler = scaler_class("cpu", init_scale=2.0)
    one = torch.ones(1)
    outputs = scaler.scale([one, (one, [one]), one])

    assert isinstance(outputs, list)
    assert isinstance(outputs[1], tuple)
    assert (outputs[0], outputs[1][0], outputs[1][1][0]) == (2.0, 2.0, 2.0)
    assert [value.item() for value in scaler.scale(one * i for i in range(3))] == [0, 2, 4]
    with pytest.raises(ValueError, match="iterable"):
        scaler.scale(3)


@pytest.mark.parametrize("scaler_class", SCALERS)
@pytest.mark.parametrize("lazy", [True, False])
def test_the_state_dict_carries_scale_factors_and_counter(scaler_class: type, lazy: bool) -> None:
    """Loading overwrites what the constructor set, before and after the scale tensor exists."""
    source = scaler_class(
        "cpu", init_scale=3.0, growth_factor=4.0, backoff_factor=0.5, growth_interval=2
    )
    target = scaler_class(
        "cpu", init_scale=6.0, growth_factor=7.0, backoff_factor=0.8, growth_interval=1
    )
    target._init_growth_tracker = 7
    if not lazy:
        target.scale(torch.ones(()))
    target.load_state_dict(source.state_dict())

    assert target.get_scale() == 3.0
    assert target.get_growth_factor() == 4.0
    assert target.get_backoff_factor() == 0.5
    assert target.get_growth_interval() == 2
    assert target._get_growth_tracker() == 0


@pytest.mark.parametrize("scaler_class", SCALERS)
def test_factors_and_interval_can_be_set_while_training(scaler_class: type) -> None:
    """The setters take effect with the next update."""
    weight = nn.Parameter(torch.ones(2))
    optimizer, scaler = torch.optim.SGD([weight]), scaler_class("cpu", init_scale=16.0)
    scaler.set_growth_factor(8.0)
    scaler.set_backoff_factor(0.25)
    scaler.set_growth_interval(1)
    seen = []
    for bad in (1.0, math.inf):
        scaler.scale(weight.sum()).backward()
        weight.grad[0] = bad
        scaler.step(optimizer)
        scaler.update()
        seen.append(scaler.get_scale())

    assert seen == [128.0, 32.0]


@pytest.mark.parametrize("scaler_class", SCALERS)
def test_the_scale_does_not_overflow(scaler_class: type) -> None:
    """Growth that is not finite in fp32 is left out."""
    weight = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=0.0)
    scaler = scaler_class("cpu", init_scale=1e38, growth_factor=16.0, growth_interval=1)
    scaler.scale(weight.sum() * 0).backward()
    scaler.step(optimizer)
    scaler.update()

    assert scaler.get_scale() == torch.tensor(1e38).item()


@pytest.mark.parametrize("scaler_class", SCALERS)
def test_pickling_is_for_the_time_between_steps(scaler_class: type) -> None:
    """In the middle of a step it is refused, as gradients in flight are not part of it."""
    weight = nn.Parameter(torch.ones(2))
    optimizer, scaler = torch.optim.SGD([weight]), scaler_class("cpu", init_scale=3.0)
    scaler.scale(weight.sum()).backward()
    scaler.unscale_(optimizer)

    with pytest.raises(AssertionError, match="pickled"):
        pickle.dumps(scaler)


def test_a_scaler_that_torch_lets_die_lives_with_ours() -> None:
    """The reason for all this: 166 bad steps, then a good one, with torch's and with ours."""
    weights = {}
    for scaler_class, options in zip(SCALERS, ({}, {"max_consecutive_skips": None}), strict=True):
        weight = nn.Parameter(torch.ones(2))
        optimizer, scaler = torch.optim.SGD([weight], lr=0.5), scaler_class("cpu", **options)
        for _ in range(166):
            optimizer.zero_grad()
            scaler.scale(weight.sum()).backward()
            weight.grad.fill_(math.nan)
            scaler.step(optimizer)
            scaler.update()
        optimizer.zero_grad()
        scaler.scale(weight.sum()).backward()
        scaler.step(optimizer)
        weights[scaler_class] = (scaler.get_scale(), weight.tolist())

    assert weights[narrowcast.GradScaler] == (1.0, [0.5, 0.5])
    dead_scale, dead_weight = weights[torch.amp.GradScaler]
    assert dead_scale == 0.0
    assert all(math.isnan(value) for value in dead_weight)


@pytest.mark.slow
@pytest.mark.skipif("TORCH_TEST_FILE" not in os.environ, reason="TORCH_TEST_FILE names no file")
def test_torchs_own_tests_pass() -> None:
    """PyTorch's test_torch.py, the GradScaler group, with ours in the place of torch's."""
    runner = ROOT / "tests" / "conformance" / "run_torch_grad_scaler_tests.py"

    done = subprocess.run([sys.executable, runner], capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stdout + done.stderr
    assert "unexpected: 0" in done.stdout
