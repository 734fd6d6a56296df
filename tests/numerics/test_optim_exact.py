"""What the optimizers promise exactly: torch's results on fp32, the same bits in whatever order."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from narrowcast.optim.adamw import AdamW
from narrowcast.optim.lion import Lion
from narrowcast.optim.sgd import SGD
from optim_cases import FEW, RULES, held, parameters, same_bits, train

CASES: list[tuple[Any, Any, dict[str, Any]]] = [
    (AdamW, torch.optim.AdamW, {"lr": 1e-2, "weight_decay": 0.1}),
    (AdamW, torch.optim.AdamW, {"lr": 3e-3, "weight_decay": 0.0, "betas": (0.8, 0.95)}),
    (AdamW, torch.optim.AdamW, {"maximize": True, "eps": 1e-4}),
    (SGD, torch.optim.SGD, {"lr": 1e-2}),
    (SGD, torch.optim.SGD, {"lr": 1e-2, "momentum": 0.9, "weight_decay": 0.1}),
    (SGD, torch.optim.SGD, {"lr": 1e-2, "momentum": 0.9, "dampening": 0.5, "maximize": True}),
    (SGD, torch.optim.SGD, {"lr": 1e-2, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
]
case_ids = [f"{c[0].__name__}-{i}" for i, c in enumerate(CASES)]


def masters(optimizer: Any, owned: list[nn.Parameter]) -> list[torch.Tensor]:
    return [optimizer.master(p).clone() for p in owned]


@pytest.mark.parametrize("weights", ["fp32", "split16"])
@pytest.mark.parametrize(("ours", "torchs", "options"), CASES, ids=case_ids)
def test_the_master_follows_torch_bit_for_bit(
    ours: Any, torchs: Any, options: dict[str, Any], weights: str
) -> None:
    """fp32 and split16 weights with fp32 states, 20 steps, every awkward size."""
    owned, reference = parameters(), parameters()
    optimizer = ours(owned, **options, weights=weights)
    expected = torchs(reference, **options, foreach=False, fused=False)
    train(optimizer, owned, range(20))
    train(expected, reference, range(20))

    assert same_bits(masters(optimizer, owned), [p.detach() for p in reference])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("decay", [0.0, 0.01])
@pytest.mark.parametrize("weights", ["fp32", "split16"])
@pytest.mark.parametrize(("ours", "torchs"), [(AdamW, torch.optim.AdamW), (SGD, torch.optim.SGD)])
def test_a_learning_rate_that_is_a_tensor_rounds_as_in_torch(
    ours: Any, torchs: Any, weights: str, decay: float, dtype: torch.dtype
) -> None:
    """What torch computes of an fp32 learning rate is fp32 too."""
    shapes = [(97, 63), (7,)]
    owned, reference = parameters(shapes), parameters(shapes)
    rates = [torch.tensor(0.01, dtype=dtype) for _ in range(2)]
    optimizer = ours(owned, lr=rates[0], weight_decay=decay, weights=weights)
    expected = torchs(reference, lr=rates[1], weight_decay=decay, foreach=False)
    for step in range(20):
        train(optimizer, owned, range(step, step + 1))
        train(expected, reference, range(step, step + 1))
        for rate in rates:
            rate.mul_(0.9)

    assert same_bits(masters(optimizer, owned), [p.detach() for p in reference])


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("weights", ["fp32", "split16"])
@pytest.mark.parametrize(("ours", "torchs"), [(AdamW, torch.optim.AdamW), (SGD, torch.optim.SGD)])
def test_the_master_follows_torch_for_a_thousand_steps(
    ours: Any, torchs: Any, weights: str, threads: int
) -> None:
    """With a learning rate that changes, as a schedule would have it."""
    shapes = [(97, 63), (5000,), (7,), (1,)]
    options = RULES[ours.__name__][1]
    owned, reference = parameters(shapes), parameters(shapes)
    optimizer = ours(owned, **options, weights=weights)
    expected = torchs(reference, **options, foreach=False, fused=False)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for step in range(1000):
            for each in (optimizer, expected):
                each.param_groups[0]["lr"] = 1e-2 * (1 - step / 1000)
            train(optimizer, owned, range(step, step + 1))
            train(expected, reference, range(step, step + 1))
    finally:
        torch.set_num_threads(before)

    assert same_bits(masters(optimizer, owned), [p.detach() for p in reference])


@pytest.mark.parametrize("maximize", [False, True])
def test_lion_is_its_definition(maximize: bool) -> None:
    """Against the three lines of the paper in the same order of operations."""
    owned, reference = parameters([(70, 70), (5,)]), parameters([(70, 70), (5,)])
    optimizer = Lion(owned, lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1, maximize=maximize)
    moments = [torch.zeros_like(p) for p in reference]
    for step in range(10):
        train(optimizer, owned, range(step, step + 1))
        for p, r, m in zip(owned, reference, moments, strict=True):
            gradient = -p.grad if maximize else p.grad
            with torch.no_grad():
                direction = torch.lerp(m, gradient, 1 - 0.9).sign()
                r.mul_(1 - 1e-3 * 0.1).add_(direction, alpha=-1e-3)
                m.lerp_(gradient, 1 - 0.99)

    assert same_bits([p.detach() for p in owned], [r.detach() for r in reference])


@pytest.mark.parametrize("weights", ["fp32", "split16", "split8", "stochastic"])
@pytest.mark.parametrize("states", ["fp32", "bf16", "int8", "int4"])
@pytest.mark.parametrize("rule", RULES)
def test_a_step_does_not_depend_on_what_steps_with_it(rule: str, weights: str, states: str) -> None:
    """All parameters together, or one by one in another order: the same bits, noise included."""
    make, options = RULES[rule]
    torch.manual_seed(3)
    owned = parameters(FEW)
    together = make(owned, **options, weights=weights, states=states)
    apart = copy.deepcopy(together)
    others = apart.param_groups[0]["params"]
    for step in range(3):
        train(together, owned, range(step, step + 1))
        for mine, other in zip(owned, others, strict=True):
            other.grad = mine.grad.clone()
        for parameter in reversed(others):
            apart.step_parameters([parameter])

    assert same_bits(held(together), held(apart))


@pytest.mark.parametrize("weights", ["fp32", "split16", "split8", "stochastic"])
@pytest.mark.parametrize("states", ["fp32", "bf16", "int8", "int4"])
@pytest.mark.parametrize("rule", RULES)
def test_going_on_from_a_state_dict_is_exact(rule: str, weights: str, states: str) -> None:
    """Six steps are three, a saved state, and three: weights, states, noise, all bits."""
    make, options = RULES[rule]
    owned = parameters(FEW)
    optimizer = make(owned, **options, weights=weights, states=states)
    train(optimizer, owned, range(3))
    saved = copy.deepcopy(optimizer.state_dict())
    weights_saved = [p.detach().clone() for p in owned]
    train(optimizer, owned, range(3, 6))

    fresh = parameters(FEW, seed=9)
    torch.manual_seed(99)  # another seed, which the saved one must replace
    resumed = make(fresh, **options, weights=weights, states=states)
    with torch.no_grad():
        for parameter, weight in zip(fresh, weights_saved, strict=True):
            parameter.copy_(weight)
    resumed.load_state_dict(saved)
    train(resumed, fresh, range(3, 6))

    assert same_bits(held(optimizer), held(resumed))


def test_the_seed_comes_from_the_generator_or_from_torchs_seed() -> None:
    """The same generator gives the same bits, another one others; nothing is drawn from torch's."""

    def run(**more: Any) -> list[torch.Tensor]:
        owned = parameters([(5000,)])
        optimizer = AdamW(owned, weights="stochastic", states="int4", **more)
        train(optimizer, owned, range(2))
        return held(optimizer)

    torch.manual_seed(4)
    state = torch.get_rng_state()
    first = run()

    assert torch.equal(torch.get_rng_state(), state)
    assert same_bits(first, run())
    assert not same_bits(first, run(generator=torch.Generator().manual_seed(1)))
    assert same_bits(
        run(generator=torch.Generator().manual_seed(1)),
        run(generator=torch.Generator().manual_seed(1)),
    )


def odd_parameters() -> list[nn.Parameter]:
    """Channels last, transposed, and a slice with holes, of more than one range each."""
    generator = torch.Generator().manual_seed(0)
    channels_last = torch.randn(64, 32, 7, 7, generator=generator)
    return [
        nn.Parameter(channels_last.to(memory_format=torch.channels_last)),
        nn.Parameter(torch.randn(300, 257, generator=generator).t()),
        nn.Parameter(torch.randn(10, 5, 2, generator=generator)[..., 0]),
        nn.Parameter(torch.randn(1, 70, 5, 1, generator=generator).transpose(1, 2)),
    ]


@pytest.mark.parametrize("gradients", ["alike", "row-major"])
@pytest.mark.parametrize("weights", ["fp32", "split16"])
def test_strides_do_not_matter(weights: str, gradients: str) -> None:
    """Parameters of any layout follow torch, with gradients laid out alike or not."""
    owned, reference = odd_parameters(), odd_parameters()
    optimizer = AdamW(owned, lr=1e-2, weights=weights)
    expected = torch.optim.AdamW(reference, lr=1e-2, foreach=False)
    strides = [p.stride() for p in owned]
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        for mine, other in zip(owned, reference, strict=True):
            gradient = torch.randn(mine.shape, generator=generator).to(torch.bfloat16)
            other.grad = gradient.float()
            mine.grad = gradient.to(mine.dtype)
            if gradients == "alike":
                mine.grad = torch.empty_like(mine).copy_(gradient)
        optimizer.step()
        expected.step()

    assert all(torch.equal(optimizer.master(m), o) for m, o in zip(owned, reference, strict=True))
    assert [p.stride() for p in owned] == strides


@pytest.mark.parametrize("states", ["int8", "int4"])
def test_blocks_run_in_the_order_of_storage(states: str) -> None:
    """A channels-last parameter steps as the row-major one that has its storage."""
    image = torch.randn(64, 32, 3, 3).to(memory_format=torch.channels_last)
    flat = image.permute(0, 2, 3, 1).contiguous()
    ours, theirs = nn.Parameter(image.clone()), nn.Parameter(flat.clone())
    left, right = (AdamW([p], lr=1e-2, states=states) for p in (ours, theirs))
    for _ in range(3):
        gradient = torch.randn_like(image)
        ours.grad, theirs.grad = gradient, gradient.permute(0, 2, 3, 1).contiguous()
        left.step()
        right.step()

    assert torch.equal(ours.permute(0, 2, 3, 1), theirs)
