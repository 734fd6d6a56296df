"""The optimizers as torch.optim.Optimizers: groups, schedulers, hooks, copies, and bad input."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from narrowcast.errors import NarrowcastError, UnknownName, UsageError
from narrowcast.optim.adamw import AdamW
from narrowcast.optim.lion import Lion
from narrowcast.optim.release import GradientRelease
from narrowcast.optim.sgd import SGD
from narrowcast.optim.sizes import bytes_for
from optim_cases import RULES, give_gradients, held, parameters, same_bits, train

SHAPES = [(70, 70), (5,)]


@pytest.mark.parametrize("weights", ["split16", "split8"])
def test_an_fp32_parameter_becomes_bf16_and_its_master_is_what_it_was(weights: str) -> None:
    """In place: the module's parameter is the same object. split8 keeps 24 of 32 bits."""
    (parameter,) = owned = parameters([(70, 70)])
    before = parameter.detach().clone()
    optimizer = AdamW(owned, weights=weights)
    master = optimizer.master(parameter)

    assert parameter.dtype is torch.bfloat16
    assert (master.dtype, master.shape) == (torch.float32, before.shape)
    # Rounded to 24 bits first, a weight may fall on the other side of the middle: half an ulp more.
    torch.testing.assert_close(parameter.detach().float(), before, rtol=2.0**-8 * 1.01, atol=0.0)
    if weights == "split16":
        assert torch.equal(master, before)
    else:
        torch.testing.assert_close(master, before, rtol=2.0**-16, atol=0.0)


@pytest.mark.parametrize("weights", ["split16", "split8", "stochastic"])
def test_bf16_parameters_are_taken_as_they_are(weights: str) -> None:
    """Nothing is lost that was not lost before."""
    parameter = nn.Parameter(torch.randn(70, 70, dtype=torch.bfloat16))
    before = parameter.detach().clone()
    optimizer = AdamW([parameter], weights=weights)

    assert torch.equal(parameter.detach(), before)
    assert torch.equal(optimizer.master(parameter), before.float())


@pytest.mark.parametrize("shape", [(0,), (), (70, 70), (70001,)])
def test_a_master_can_be_set(shape: tuple[int, ...]) -> None:
    """Weights are loaded into the store as well, not into bf16 alone."""
    for weights in ("fp32", "split16"):
        (parameter,) = owned = parameters([shape])
        optimizer = AdamW(owned, weights=weights)
        value = torch.randn(shape)
        optimizer.set_master(parameter, value)

        assert torch.equal(optimizer.master(parameter), value)


def test_a_master_must_fit() -> None:
    """Another dtype or shape, or a stranger's parameter, is refused."""
    (parameter,) = owned = parameters([(3,)])
    optimizer = AdamW(owned, weights="split16")

    with pytest.raises(UsageError, match="fp32 tensor of the parameter's shape"):
        optimizer.set_master(parameter, torch.zeros(4))
    with pytest.raises(UsageError, match="bfloat16"):
        optimizer.set_master(parameter, torch.zeros(3, dtype=torch.bfloat16))
    with pytest.raises(UsageError, match="none of the optimizer's"):
        optimizer.master(torch.zeros(3))


def test_each_group_may_have_its_own_stores() -> None:
    """Norms in fp32 beside split weights, in one optimizer."""
    first, second = parameters([(70, 70), (70, 70)])
    optimizer = AdamW(
        [{"params": [first]}, {"params": [second], "weights": "fp32", "states": "fp32", "lr": 0.5}],
        weights="split8",
        states="int4",
    )
    give_gradients([first, second], 0)
    optimizer.step()

    assert (first.dtype, second.dtype) == (torch.bfloat16, torch.float32)
    assert [(h.weights, h.states) for h in optimizer.describe()] == [
        ("split8", "int4"),
        ("fp32", "fp32"),
    ]


def test_a_group_added_later_is_put_into_its_store() -> None:
    """``add_param_group`` converts as the constructor does."""
    first, second = parameters(SHAPES)
    optimizer = AdamW([first], weights="split16")
    optimizer.add_param_group({"params": [second], "lr": 0.5})
    give_gradients([first, second], 0)
    optimizer.step()

    assert second.dtype is torch.bfloat16
    assert len(optimizer.param_groups) == 2


def test_a_refused_group_leaves_no_trace() -> None:
    """Neither a group nor a converted parameter."""
    good, bad = parameters(SHAPES)
    bad.data = bad.data.half()
    optimizer = AdamW(parameters([(2,)]), weights="split16")
    with pytest.raises(UsageError, match="fp16"):
        optimizer.add_param_group({"params": [good, bad]})

    assert len(optimizer.param_groups) == 1
    assert good.dtype is torch.float32


def test_schedulers_set_the_learning_rate() -> None:
    """The same schedule, the same bits as torch's optimizer."""
    owned, reference = parameters(SHAPES), parameters(SHAPES)
    mine = AdamW(owned, lr=0.1, weights="split16")
    other = torch.optim.AdamW(reference, lr=0.1, foreach=False)
    schedules = [torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=10) for o in (mine, other)]
    for step in range(10):
        train(mine, owned, range(step, step + 1))
        train(other, reference, range(step, step + 1))
        for schedule in schedules:
            schedule.step()

    assert all(torch.equal(mine.master(p), r) for p, r in zip(owned, reference, strict=True))


def test_a_one_cycle_schedule_may_move_the_betas() -> None:
    """Hyperparameters are read at every step."""
    owned = parameters(SHAPES)
    optimizer = AdamW(owned, weights="split16")
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=5)
    for step in range(4):
        train(optimizer, owned, range(step, step + 1))
        schedule.step()

    assert optimizer.param_groups[0]["betas"][0] != 0.9


def test_closures_and_hooks_are_called() -> None:
    """A closure runs with gradients on; pre and post hooks run once a step."""
    (weight,) = owned = parameters([(3,)])
    optimizer = SGD(owned, lr=0.1)
    called: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: called.append("pre"))
    optimizer.register_step_post_hook(lambda *_: called.append("post"))

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (weight**2).sum()
        loss.backward()
        return loss

    before = weight.detach().clone()
    loss = optimizer.step(closure)

    assert loss.item() == pytest.approx((before**2).sum().item())
    assert called == ["pre", "post"]
    assert torch.equal(weight.detach(), before - 0.1 * (2 * before))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_go_on_alike(rule: str, how: str) -> None:
    """A deep copy and a pickle are optimizers over their own parameters, with the same states."""
    make, options = RULES[rule]
    owned = parameters(SHAPES)
    optimizer = make(owned, **options, weights="split8", states="int4")
    train(optimizer, owned, range(2))
    if how == "deepcopy":
        twin = copy.deepcopy(optimizer)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(optimizer))
    else:
        buffer = io.BytesIO()
        torch.save(optimizer, buffer)
        buffer.seek(0)
        twin = torch.load(buffer, weights_only=False)
    train(optimizer, owned, range(2, 4))
    train(twin, twin.param_groups[0]["params"], range(2, 4))

    assert same_bits(held(optimizer), held(twin))


def test_parameters_without_gradient_are_left_alone() -> None:
    """Neither weight nor state nor count changes."""
    first, second = parameters(SHAPES)
    optimizer = AdamW([first, second], weights="split16")
    give_gradients([first], 0)
    before = optimizer.master(second).clone()
    optimizer.step()

    assert torch.equal(optimizer.master(second), before)
    assert "step" not in optimizer.state[second]


def test_a_learning_rate_may_be_a_tensor() -> None:
    """Of one element; it is read at every step."""
    owned, reference = parameters(SHAPES), parameters(SHAPES)
    rate = torch.tensor(0.01)
    mine = AdamW(owned, lr=rate)
    other = torch.optim.AdamW(reference, lr=rate.clone(), foreach=False)
    train(mine, owned, range(1))
    train(other, reference, range(1))

    assert same_bits([p.detach() for p in owned], [r.detach() for r in reference])


def test_a_memory_format_that_changes_is_followed_or_refused() -> None:
    """fp32 states are laid out anew; block-wise codes cannot be without rounding again."""
    for states in ("fp32", "int8"):
        weight = nn.Parameter(torch.randn(32, 16, 3, 3))
        optimizer = AdamW([weight], states=states, weights="split16")
        train(optimizer, [weight], range(1))
        weight.data = weight.data.to(memory_format=torch.channels_last)
        weight.grad = None
        if states == "int8":
            with pytest.raises(UsageError, match="memory format"):
                train(optimizer, [weight], range(1, 2))
        else:
            train(optimizer, [weight], range(1, 2))
            assert optimizer.state[weight]["exp_avg"].stride() == weight.stride()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"lr": -1.0}, "lr is -1.0"),
        ({"lr": float("nan")}, "lr is nan"),
        ({"lr": torch.tensor([0.1, 0.2])}, r"shape \(2,\)"),
        ({"eps": -1e-8}, "eps"),
        ({"betas": (0.9, 1.0)}, r"betas\[1\] is 1.0"),
        ({"betas": 0.9}, "a pair"),
        ({"betas": (torch.tensor(0.9), 0.9)}, "tensor"),
        ({"weight_decay": -1}, "weight_decay"),
        ({"weights": "split17"}, "did you mean 'split16'"),
        ({"states": "int16"}, "valid: bf16, fp32, int4, int8"),
        ({"weights": None}, "unknown weight store"),
        ({"amsgrad": True}, "amsgrad"),
        ({"foreach": True}, "temporaries"),
        ({"fused": True}, "leave it out"),
        ({"capturable": True}, "host"),
        ({"differentiable": True}, "in place"),
    ],
)
def test_bad_arguments_get_one_clear_error(options: dict[str, Any], match: str) -> None:
    """With the value, and what to do."""
    with pytest.raises(NarrowcastError, match=match):
        AdamW(parameters(SHAPES), **options)


def test_arguments_that_nobody_knows_are_a_type_error() -> None:
    """As for any function."""
    with pytest.raises(TypeError, match="unexpected keyword argument 'wd'"):
        AdamW(parameters(SHAPES), wd=0.1)


def test_what_torch_leaves_out_may_be_left_out() -> None:
    """None and False for arguments that are refused when they ask for something."""
    AdamW(parameters(SHAPES), foreach=None, fused=False, amsgrad=False)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.complex64])
@pytest.mark.parametrize("weights", ["fp32", "split16"])
def test_other_dtypes_are_refused_with_the_reason(dtype: torch.dtype, weights: str) -> None:
    """fp16 weights lost their gradients already; fp64 and complex ones have no rule."""
    weight = nn.Parameter(torch.zeros(3, dtype=dtype))
    with pytest.raises(UsageError, match=r"fp16|computed in fp32"):
        AdamW([weight], weights=weights)

    assert weight.dtype is dtype


def test_bf16_weights_need_a_store_for_them() -> None:
    """weights='fp32' cannot hold them."""
    with pytest.raises(UsageError, match="split16"):
        AdamW([nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))])


def test_a_parameter_with_a_gradient_is_not_converted() -> None:
    """Its gradient would be of another dtype."""
    owned = parameters(SHAPES)
    give_gradients(owned, 0)
    with pytest.raises(UsageError, match="before the first backward"):
        AdamW(owned, weights="split16")


def test_an_error_in_a_step_counts_no_step() -> None:
    """A sparse gradient of the second parameter leaves the first one's count alone."""
    first, embedding = parameters([(3,)])[0], nn.Embedding(10, 3, sparse=True)
    optimizer = SGD([first, embedding.weight], lr=0.1)
    (embedding(torch.tensor([1])).sum() + first.sum()).backward()
    with pytest.raises(UsageError, match="sparse=False"):
        optimizer.step()

    assert "step" not in optimizer.state[first]


@pytest.mark.parametrize("weights", ["fp32", "split8", "stochastic"])
@pytest.mark.parametrize("states", ["fp32", "int4"])
def test_steps_can_be_traced_on_fake_tensors(weights: str, states: str) -> None:
    """Predictions step without memory; real steps before and after are not disturbed."""
    owned = parameters([(70, 70)])
    real = AdamW(owned, weights=weights, states=states)
    train(real, owned, range(1))
    with FakeTensorMode():
        fakes = [nn.Parameter(torch.empty(70, 70)), nn.Parameter(torch.empty(5))]
        optimizer = AdamW(fakes, weights=weights, states=states)
        GradientRelease(optimizer)
        for _ in range(2):
            sum(p.float().sum() for p in fakes).backward()
            optimizer.step()
    train(real, owned, range(1, 2))

    assert (
        optimizer.nbytes()
        == bytes_for([4900, 5], rule="adamw", weights=weights, states=states).total
    )


def test_sparse_gradients_are_refused() -> None:
    """With the layer option that makes them dense."""
    embedding = nn.Embedding(10, 3, sparse=True)
    optimizer = SGD(embedding.parameters(), lr=0.1)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(UsageError, match="sparse=False"):
        optimizer.step()


def test_an_expanded_parameter_is_refused() -> None:
    """Its elements share memory."""
    with pytest.raises(UsageError, match="share memory"):
        AdamW([nn.Parameter(torch.zeros(1).expand(5))])


@pytest.mark.parametrize(
    "options", [{"nesterov": True}, {"momentum": -1}, {"momentum": "much"}, {"dampening": None}]
)
def test_sgd_refuses_what_makes_no_sense(options: dict[str, Any]) -> None:
    """Nesterov without momentum, and numbers that are none."""
    with pytest.raises(UsageError):
        SGD(parameters(SHAPES), **options)


def test_lion_refuses_what_makes_no_sense() -> None:
    """Betas outside [0, 1)."""
    with pytest.raises(UsageError, match=r"betas\[0\]"):
        Lion(parameters(SHAPES), betas=(1.5, 0.9))


def test_an_unknown_store_in_a_group_is_refused_before_anything_changes() -> None:
    """The optimizer never came to be, and the parameters are as they were."""
    (weight,) = parameters([(3,)])
    with pytest.raises(UnknownName):
        AdamW([{"params": [weight], "weights": "split4"}], weights="split16")

    assert weight.dtype is torch.float32
