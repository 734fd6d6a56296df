"""Facts about compression: what is packed, what is kept, and what stays exact."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from narrowcast.activations.packing import PACKINGS, packed_bytes
from narrowcast.activations.rules import apply_rules, rounding_state
from narrowcast.memory.measure import MemoryLedger
from narrowcast.plan import ActivationRule
from narrowcast.policy import POLICIES, Policy
from narrowcast.precision.cast import backward_context, forward_context, prepare_model

INT8 = (ActivationRule(modules="body", lever="int8"),)
E4M3 = (ActivationRule(modules="body", lever="e4m3"),)
FP32 = POLICIES["fp32"]
REHEARSED = Policy(name="bf16", compute="bf16", autocast_rules="cuda")
ROWS, WIDTH = 64, 128


class Net(nn.Module):
    """A first layer, so that the body's input has a gradient, and a body under the lever."""

    def __init__(self, body: nn.Module | Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.body = body if isinstance(body, nn.Module) else Function(body)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self.first(x))  # type: ignore[no-any-return]


class Function(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def gradients(model: nn.Module, x: Tensor, policy: Policy = FP32) -> dict[str, Tensor]:
    """Return the gradients of a weighted sum of the model's output, and the loss."""
    model.zero_grad()
    with forward_context(policy, "cpu"):
        y = model(x)
        loss = (y * torch.linspace(-1, 1, y.shape[-1])).float().sum()
    with backward_context(policy, "cpu"):
        loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return found | {"loss": loss.detach()}


def held(model: nn.Module, x: Tensor) -> int:
    """Return the bytes of activations when backward begins, as the ledger counts them."""
    with MemoryLedger(model) as ledger:
        ledger.inputs(x)
        gradients(model, x)
    return ledger.first_lines("backward")["activations"]


def both(body: Any, rules: tuple[ActivationRule, ...] = INT8) -> tuple[Net, Net]:
    """Return a model without and one with a lever, alike in everything else."""
    torch.manual_seed(0)
    plain = Net(body)
    levered = copy.deepcopy(plain)
    apply_rules(levered, rules, FP32)
    return plain, levered


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(WIDTH, 256), nn.GELU(), nn.Linear(256, WIDTH))


@pytest.mark.parametrize("name", ["int8", "e4m3"])
def test_a_body_holds_what_the_formats_say_to_the_byte(name: str) -> None:
    """Both inputs of products and GELU's input, packed; the ledger calls them activations.

    The first layer's input is the batch. The loss keeps a row of weights, which the ledger takes
    for one as well: 4 bytes a column.
    """
    plain, levered = both(mlp(), (ActivationRule(modules="body", lever=name),))  # type: ignore[arg-type]
    x = torch.randn(ROWS, WIDTH)
    sizes = (ROWS * WIDTH, ROWS * 256, ROWS * 256)

    assert held(plain, x) == sum(4 * size for size in sizes) + 4 * WIDTH
    assert held(levered, x) == sum(map(PACKINGS[name].nbytes, sizes)) + 4 * WIDTH


def test_a_relu_costs_a_bit_an_element_and_its_gradient_is_exact() -> None:
    """Gradients that pass weights and ReLUs alone have the very bits that they had."""
    body = nn.Sequential(nn.Linear(WIDTH, 256), nn.ReLU(), nn.Linear(256, WIDTH))
    plain, levered = both(body)
    x = torch.randn(ROWS, WIDTH)
    expected, got = gradients(plain, x), gradients(levered, x)
    exact = [name for name in got if torch.equal(expected[name], got[name])]
    packed = PACKINGS["int8"].nbytes(ROWS * WIDTH) + PACKINGS["int8"].nbytes(ROWS * 256)

    # Only weights of the body meet rounded numbers: x of the first is the batch, biases are sums.
    assert sorted(set(got) - set(exact)) == ["body.0.weight", "body.2.weight"]
    assert held(levered, x) == packed + packed_bytes(ROWS * 256) + 4 * WIDTH


@pytest.mark.parametrize("function", [F.relu, F.leaky_relu, F.relu_, nn.ReLU(inplace=True)])
def test_every_spelling_of_a_relu_is_exact(function: Callable[[Tensor], Tensor]) -> None:
    """In place or not, and with a slope."""
    plain, levered = both(lambda x: function(x * 1.0))
    x = torch.randn(ROWS, WIDTH)

    assert torch.equal(gradients(plain, x)["first.bias"], gradients(levered, x)["first.bias"])
    assert held(levered, x) == packed_bytes(ROWS * WIDTH) + 4 * WIDTH


@pytest.mark.parametrize(
    "function", [torch.square, lambda x: x.pow(2), lambda x: x**2.0, lambda x: x * x]
)
def test_every_spelling_of_a_square_is_packed(function: Callable[[Tensor], Tensor]) -> None:
    """Its slope is linear in what is saved, unlike that of other powers."""
    _, levered = both(function)

    assert (
        held(levered, torch.randn(ROWS, WIDTH)) == PACKINGS["int8"].nbytes(ROWS * WIDTH) + 4 * WIDTH
    )


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.exp(),
        lambda x: x.abs().pow(1.5),
        lambda x: torch.pow(input=x.abs() + 0.1, exponent=0.5),
        F.relu6,
        lambda x: (x.abs() + 0.01).log(),
        lambda x: x / (x.abs() + 0.01),
        lambda x: x.log_softmax(-1),
        lambda x: F.dropout(x, 0.5),
        lambda x: x.cumsum(0).clamp(-1, 1),
        lambda x: F.max_pool1d(x, 2),
        lambda x: (x.abs() + 0.1).sqrt().pow(-2),
        lambda x: x.logsumexp(-1, keepdim=True) + x,
        lambda x: F.normalize(x, dim=-1),
    ],
    ids=[
        "exp",
        "power",
        "root",
        "relu6",
        "log",
        "div",
        "logsoftmax",
        "dropout",
        "clamp",
        "pool",
        "pow",
        "lse",
        "normalize",
    ],
)
def test_operations_that_need_their_numbers_keep_them(function: Any) -> None:
    """Not on a list of what may be rounded: the gradient has the bits that it had."""
    plain, levered = both(function)
    x = torch.randn(ROWS, WIDTH)
    torch.manual_seed(1)
    expected = gradients(plain, x)
    torch.manual_seed(1)
    got = gradients(levered, x)

    assert all(torch.equal(expected[name], got[name]) for name in expected)


@pytest.mark.parametrize(
    "policy", [POLICIES["bf16"], POLICIES["fp16"], POLICIES["bf16-true"], REHEARSED]
)
def test_weights_and_their_casts_are_exact(policy: Policy) -> None:
    """What flows back through products depends on weights alone, and has the bits that it had.

    Also through a weight that was cast before the body was entered, and a view of one.
    """

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(WIDTH, WIDTH, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            y = F.linear(self.inner(x), self.inner.weight.t())
            return y.matmul(self.inner.weight[:, : WIDTH // 2])  # type: ignore[no-any-return]

    class Outer(Net):
        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            return self.body(F.linear(x, self.body.inner.weight))  # type: ignore[union-attr]

    torch.manual_seed(0)
    plain = Outer(Tied())
    prepare_model(plain, policy, "cpu")
    levered = copy.deepcopy(plain)
    apply_rules(levered, INT8, policy)
    x = torch.randn(ROWS, WIDTH)
    expected, got = gradients(plain, x, policy), gradients(levered, x, policy)

    assert rounding_state(levered)["drawn"] == 3
    assert torch.equal(expected["first.weight"], got["first.weight"])
    assert not torch.equal(expected["body.inner.weight"], got["body.inner.weight"])


def test_a_tensor_that_several_operations_save_is_packed_once() -> None:
    """Three projections of one input, one of them through another shape of it."""

    class Projections(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleList(nn.Linear(WIDTH, 4) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            y = self.parts[0](x) + self.parts[1](x)
            return y + self.parts[2](x.view(8, -1, WIDTH)).view(-1, 4)  # type: ignore[no-any-return]

    _, levered = both(Projections())
    x = torch.randn(ROWS, WIDTH)

    assert held(levered, x) == PACKINGS["int8"].nbytes(ROWS * WIDTH) + 4 * 4
    assert rounding_state(levered)["drawn"] == 1


def test_a_tensor_that_is_written_to_between_two_saves_is_packed_twice() -> None:
    """Each operation gets back what it had seen."""

    class Doubling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Parameter(torch.ones(WIDTH))
            self.two = nn.Parameter(torch.ones(WIDTH))

        def forward(self, x: Tensor) -> Tensor:
            y = x.clone()
            once = y * self.one
            y.mul_(2.0)
            return once + y * self.two

    _, levered = both(Doubling())
    got = gradients(levered, torch.randn(ROWS, WIDTH))
    one, two = got["body.one"], got["body.two"]

    assert rounding_state(levered)["drawn"] == 2
    assert ((two - 2 * one).norm() / two.norm()).item() < 0.02


def test_memory_that_was_freed_is_not_mistaken_for_what_it_held_before() -> None:
    """A tensor at the address of a dead one is another tensor."""

    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weights = nn.ParameterList(torch.ones(WIDTH) for _ in range(6))

        def forward(self, x: Tensor) -> Tensor:
            for factor, weight in enumerate(self.weights):
                x = (x * weight) + factor * 10.0
            return x

    plain, levered = both(Chain())
    x = torch.randn(ROWS, WIDTH)
    expected, got = gradients(plain, x), gradients(levered, x)

    for name in ("body.weights.0", "body.weights.5"):
        assert torch.allclose(expected[name], got[name], rtol=0.02, atol=0.5)


def test_a_kept_tensor_that_was_written_to_is_an_error_as_without_the_lever() -> None:
    """Hooks switch autograd's own check off; the lever makes it."""

    def function(x: Tensor) -> Tensor:
        y = x.exp()
        y.add_(1.0)
        return y

    for model in both(function):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            gradients(model, torch.randn(ROWS, WIDTH))


def test_the_batch_masks_and_small_tensors_are_kept() -> None:
    """Nothing is drawn for a batch without gradient, a mask, statistics, or 4,095 numbers."""

    class Body(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(WIDTH, WIDTH)
            self.norm = nn.GroupNorm(64, 64, affine=False)
            self.small = nn.Linear(1, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.linear(x.detach())
            y = y * (torch.randn(y.shape) > 0)
            return y[: 4095 // WIDTH] * self.small(x.mean().view(1))

    _, levered = both(Body())
    gradients(levered, torch.randn(ROWS, WIDTH))

    assert rounding_state(levered)["drawn"] == 0


def test_nothing_is_packed_without_gradients_or_in_evaluation() -> None:
    """A lever on saved tensors is a matter of training."""
    _, levered = both(mlp())
    with torch.no_grad():
        levered(torch.randn(ROWS, WIDTH))
    levered.eval()
    gradients(levered, torch.randn(ROWS, WIDTH))

    assert rounding_state(levered)["drawn"] == 0


def test_the_global_random_state_and_the_loss_are_what_they_were() -> None:
    """Dropout draws the masks that it would have drawn; the forward pass is untouched."""
    body = nn.Sequential(mlp(), nn.Dropout(0.5), mlp())
    plain, levered = both(body)
    x = torch.randn(ROWS, WIDTH)
    torch.manual_seed(1)
    expected = gradients(plain, x)["loss"]
    state = torch.get_rng_state()
    torch.manual_seed(1)

    assert torch.equal(expected, gradients(levered, x)["loss"])
    assert torch.equal(state, torch.get_rng_state())


def test_a_graph_that_is_kept_gives_the_same_gradient_again() -> None:
    """Rounding happened in forward, once."""
    _, levered = both(mlp())
    loss = levered(torch.randn(ROWS, WIDTH)).square().sum()
    loss.backward(retain_graph=True)
    once = {name: p.grad.clone() for name, p in levered.named_parameters() if p.grad is not None}
    loss.backward()

    pairs = [(once[name], p.grad) for name, p in levered.named_parameters()]
    assert all(torch.equal(2 * a, b) for a, b in pairs if b is not None)


@pytest.mark.parametrize("body", ["inside", "outside"])
def test_a_users_own_checkpoint_and_the_lever_get_along(body: str) -> None:
    """Inside, its inputs are kept exactly; around, it recomputes what the lever would have held."""

    class Checkpointed(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.inner, x, use_reentrant=False)  # type: ignore[no-any-return]

    torch.manual_seed(0)
    model: nn.Module = Net(Checkpointed(mlp())) if body == "inside" else Checkpointed(Net(mlp()))
    plain = copy.deepcopy(model)
    name = "body" if body == "inside" else "inner.body"
    apply_rules(model, [ActivationRule(modules=name, lever="int8")], FP32)
    x = torch.randn(ROWS, WIDTH)
    expected, got = gradients(plain, x), gradients(model, x)

    worst = max(
        ((expected[n] - got[n]).norm() / expected[n].norm()).item() for n in got if n != "loss"
    )
    assert worst == 0 if body == "inside" else worst < 0.05


def test_the_innermost_of_two_compressions_packs() -> None:
    """A rule on a part of a module that another rule covers is the one that counts there."""
    _, levered = both(mlp(), (*INT8, ActivationRule(modules="body.2", lever="e4m3")))
    x = torch.randn(ROWS, WIDTH)

    assert rounding_state(levered)["drawn"] == 0
    gradients(levered, x)
    assert rounding_state(levered)["drawn"] == 3


def test_fake_tensors_hold_the_bytes_that_real_ones_do() -> None:
    """So the lever can be predicted."""
    body = nn.Sequential(mlp(), nn.LayerNorm(WIDTH), nn.ReLU(), mlp())
    _, levered = both(body)
    real = held(levered, torch.randn(ROWS, WIDTH))
    with FakeTensorMode(allow_non_fake_inputs=True):
        torch.manual_seed(0)
        fake = Net(nn.Sequential(mlp(), nn.LayerNorm(WIDTH), nn.ReLU(), mlp()))
        apply_rules(fake, INT8, FP32)
        assert held(fake, torch.randn(ROWS, WIDTH)) == real


def test_attention_holds_a_byte_an_element_and_its_log_sum_exp() -> None:
    """q, k, v are parts of one projection, packed each; what attention returns is packed too."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
            self.out = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            parts = self.qkv(x.view(4, 16, WIDTH)).chunk(3, dim=-1)
            q, k, v = (part.unflatten(-1, (4, -1)).transpose(1, 2) for part in parts)
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            return self.out(y.transpose(1, 2).flatten(2)).view(-1, WIDTH)  # type: ignore[no-any-return]

    plain, levered = both(Attention())
    x = torch.randn(ROWS, WIDTH)
    log_sum_exp = 4 * 4 * 16 * 4
    expected, got = gradients(plain, x), gradients(levered, x)
    worst = max(
        ((expected[n] - got[n]).norm() / expected[n].norm()).item() for n in got if n != "loss"
    )

    # The input of qkv, then q, k, v and the result, which the last projection saves as well.
    assert held(levered, x) == 5 * PACKINGS["int8"].nbytes(ROWS * WIDTH) + log_sum_exp + 4 * WIDTH
    assert worst < 0.02
