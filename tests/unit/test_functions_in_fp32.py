"""Single functions of a module in fp32: only they, only there, forward, backward and recomputed."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from narrowcast.engine.engine import Engine
from narrowcast.errors import UsageError
from narrowcast.plan import ActivationRule, Plan, plan_named
from narrowcast.policy import Policy, policy_named
from narrowcast.precision.cast import forward_context, full_precision, prepare_model
from narrowcast.precision.functions import unused_functions


class Attention(nn.Module):
    """Records the dtypes that its functions gave."""

    def __init__(self) -> None:
        super().__init__()
        self.qk = nn.Linear(8, 16)
        self.seen: dict[str, torch.dtype] = {}

    def forward(self, x: Tensor) -> Tensor:
        q, k = self.qk(x).chunk(2, -1)
        scores = q @ k.transpose(-1, -2)
        weights = F.softmax(scores, -1)
        out = torch.matmul(weights, x)
        self.seen = {"scores": scores.dtype, "softmax": weights.dtype, "out": out.dtype}
        return out


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Attention(), Attention()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


def prepared(policy: Policy, *entries: str) -> Net:
    torch.manual_seed(0)
    net = Net()
    prepare_model(net, policy.keeping_fp32(*entries), "cpu")
    return net


def run(net: Net, policy: Policy) -> Tensor:
    with forward_context(policy, "cpu"):
        out: Tensor = net(torch.randn(2, 4, 8))
    return out


def test_only_the_named_function_of_the_named_module_is_in_fp32() -> None:
    """The product before it and the same function elsewhere stay in bf16."""
    policy = policy_named("bf16")
    net = prepared(policy, "second:softmax")

    run(net, policy)

    assert net.second.seen["scores"] == torch.bfloat16
    assert net.second.seen["softmax"] == torch.float32
    assert net.second.seen["out"] == torch.bfloat16
    assert net.first.seen["softmax"] == torch.bfloat16
    assert unused_functions(net) == {}


def test_an_operator_has_the_name_of_its_function() -> None:
    """``q @ k`` is matmul."""
    policy = policy_named("bf16")
    net = prepared(policy, "*:matmul")

    run(net, policy)

    assert set(net.first.seen.values()) == {torch.float32}


def test_with_16_bit_weights_the_result_is_narrow_again() -> None:
    """There is no autocast that would narrow it for the next product."""
    policy = policy_named("bf16-true")
    net = prepared(policy, "second:softmax")
    exact = prepared(policy)

    run(net, policy)
    x = torch.randn(2, 4, 8, dtype=torch.bfloat16)
    got, plain = net.second(x), exact.second(x)

    assert net.second.seen["softmax"] == torch.bfloat16
    assert got.dtype == plain.dtype


def test_overflow_in_fp16_is_cured_by_the_one_function() -> None:
    """300 x 300 fits into no fp16; the gradient flows through the cast."""
    policy = policy_named("fp16")
    x = torch.full((1, 4, 8), 300.0)
    broken, cured = prepared(policy), prepared(policy, "first:matmul", "second:matmul")
    for net in (broken, cured):
        for layer in (net.first, net.second):
            nn.init.constant_(layer.qk.weight, 0.3)

    with forward_context(policy, "cpu"):
        assert not broken(x).isfinite().all()
        loss = cured(x).sum()
    loss.backward()

    assert loss.isfinite()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in cured.parameters())


@pytest.mark.parametrize("modules", ["first", "*"])
def test_a_recomputed_forward_pass_computes_the_same(modules: str) -> None:
    """Checkpointing runs the function again in backward, in fp32 again: equal gradients."""
    policy = policy_named("bf16").keeping_fp32("*:softmax", "*:matmul")
    plain = Plan(name="plain", policy=policy)
    rules = (ActivationRule(modules="first", lever="checkpoint"),)
    gradients = []
    torch.manual_seed(0)
    net, x = Net(), torch.randn(2, 4, 8)
    for plan in (plain, Plan(name="recomputed", policy=policy, activations=rules)):
        model = copy.deepcopy(net)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        engine = Engine(model, optimizer, plan)
        with engine.forward():
            loss = model(x).square().sum()
        engine.backward(loss)
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])

    assert len(gradients[0]) == 4
    assert all(map(torch.equal, *gradients))


def test_an_exception_inside_leaves_no_mode_behind() -> None:
    """The next forward pass outside the module is as it was."""
    policy = policy_named("bf16")
    net = prepared(policy, "first:softmax")

    with pytest.raises(RuntimeError), forward_context(policy, "cpu"):
        net(torch.randn(2, 4, 7))
    with forward_context(policy, "cpu"):
        assert F.softmax(torch.ones(3, dtype=torch.bfloat16), -1).dtype == torch.bfloat16


def test_an_evaluation_in_fp32_is_in_fp32() -> None:
    """No cast back to 16 bits inside it."""
    net = prepared(policy_named("bf16-true"), "second:softmax")

    with full_precision(net):
        net(torch.randn(2, 4, 8))

    assert net.second.seen["softmax"] == torch.float32


def test_preparing_again_takes_the_functions_off() -> None:
    """The second policy is the one in force."""
    policy = policy_named("bf16")
    net = prepared(policy, "second:softmax")

    prepare_model(net, policy, "cpu")
    run(net, policy)

    assert net.second.seen["softmax"] == torch.bfloat16


def test_a_function_that_is_never_called_is_told() -> None:
    """Kept in vain."""
    policy = policy_named("bf16")
    net = prepared(policy, "second:cumsum", "second:softmax")

    run(net, policy)

    assert unused_functions(net) == {"second:cumsum": "second:cumsum"}


@pytest.mark.parametrize("entry", ["second:", "second:soft max", "second:add_"])
def test_what_is_no_function_is_refused(entry: str) -> None:
    """Nothing is kept in fp32 by an entry that cannot work."""
    with pytest.raises(UsageError):
        policy_named("bf16").keeping_fp32(entry)


def test_a_function_of_no_module_is_refused() -> None:
    """As every entry that matches nothing."""
    with pytest.raises(UsageError, match="matches no module"):
        prepared(policy_named("bf16"), "third:softmax")


def test_a_plan_with_functions_trains_in_every_precision() -> None:
    """One applied step."""
    for name in ("bf16", "bf16-true", "bf16-split"):
        torch.manual_seed(0)
        net = Net()
        plan = plan_named(name)
        plan = plan.with_policy(plan.policy.keeping_fp32("*:softmax"))
        if name == "bf16-split":
            plan = Plan(name="x", policy=plan.policy)
        engine = Engine(net, torch.optim.SGD(net.parameters(), lr=0.1), plan)
        with engine.forward():
            loss = net(torch.randn(2, 4, 8)).square().sum()
        engine.backward(loss)

        assert engine.step().applied
