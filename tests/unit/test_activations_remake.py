"""Facts about remaking: the same bits as without, and nothing held that can be had again."""

from __future__ import annotations

import contextlib
import copy
import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from narrowcast.activations.calls import is_cheap
from narrowcast.activations.compression import LEAST_NUMEL
from narrowcast.activations.rules import apply_rules
from narrowcast.memory.measure import MemoryLedger
from narrowcast.plan import ActivationRule
from narrowcast.policy import POLICIES, Policy
from narrowcast.precision.cast import (
    backward_context,
    forward_context,
    numeric_settings,
    prepare_model,
)

REMAKE = (ActivationRule(modules="*", lever="remake"),)
CHECKPOINT = ActivationRule(modules="blocks.*", lever="checkpoint")
NORMS = ActivationRule(modules="*", lever="narrow_norm")
FP32, BF16 = POLICIES["fp32"], POLICIES["bf16"]
REHEARSED = Policy(name="bf16", compute="bf16", autocast_rules="cuda")
CHANNELS, SIDE, BATCH = 8, 8, 16
ONE = BATCH * CHANNELS * SIDE * SIDE
"""Numbers of an activation of `images`; more than LEAST_NUMEL."""


class Residual(nn.Module):
    """Convolutions, batch norms, ReLUs in place and not, dropout, and a skip connection."""

    def __init__(self, channels_in: int = CHANNELS, *, inplace: bool = False) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels_in, CHANNELS, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(CHANNELS)
        self.depthwise = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, groups=CHANNELS)
        self.second = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, bias=False)
        self.last = nn.BatchNorm2d(CHANNELS)
        self.relu = nn.ReLU(inplace=inplace)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.depthwise(self.relu(self.norm(self.first(x))))
        y = self.last(self.second(self.dropout(F.silu(y))))
        return self.relu(y + x if x.shape[1] == CHANNELS else y)  # type: ignore[no-any-return]


class Gated(nn.Module):
    """A norm, a gated MLP on halves of one product, a cast, and one norm used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(CHANNELS)
        self.into = nn.Linear(CHANNELS, 8 * CHANNELS)
        self.out = nn.Linear(4 * CHANNELS, CHANNELS)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.into(self.norm(x)).chunk(2, dim=-1)
        x = x + self.out(F.silu(gate) * up)
        again = self.norm(x.float().to(self.norm.weight.dtype))
        return x + again.to(x.dtype)  # type: ignore[no-any-return]


class Net(nn.Module):
    """A stem on images, residual blocks, and then blocks of a transformer on the pixels."""

    def __init__(self, *, inplace: bool = False) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, CHANNELS, 3, padding=1)
        self.norm = nn.BatchNorm2d(CHANNELS)
        blocks = [Residual(inplace=inplace), Residual(inplace=inplace), Gated(), Gated()]
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        for block in self.blocks[:2]:
            x = block(x)
        x = x.flatten(2).transpose(1, 2)
        for block in self.blocks[2:]:
            x = block(x)
        return x


def images() -> Tensor:
    return torch.randn(BATCH, 1, SIDE, SIDE)


def run(
    policy: Policy,
    rules: tuple[ActivationRule, ...],
    net: Callable[[], nn.Module] = Net,
    x: Tensor | None = None,
) -> dict[str, Tensor]:
    """Return losses, gradients, buffers and the random state after two steps on one batch."""
    torch.manual_seed(0)
    model = net()
    x = images() if x is None else x
    prepare_model(model, policy, "cpu")
    apply_rules(model, rules, policy)
    seen = {}
    for step in range(2):
        with numeric_settings(policy), forward_context(policy, "cpu"):
            loss = model(x).float().square().mean()
        with numeric_settings(policy), backward_context(policy, "cpu"):
            loss.backward()
        seen[f"loss {step}"] = loss.detach()
    seen |= {f"gradient of {n}": p.grad for n, p in model.named_parameters() if p.grad is not None}
    seen |= {f"buffer {n}": b.clone() for n, b in model.named_buffers()}
    return seen | {"random state": torch.get_rng_state()}


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def differing(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    assert one.keys() == other.keys()
    return [
        name
        for name, tensor in one.items()
        if tensor.dtype != other[name].dtype or not torch.equal(bits(tensor), bits(other[name]))
    ]


POLICIES_HERE = {
    "fp32": FP32,
    "bf16": BF16,
    "fp16": POLICIES["fp16"],
    "true": POLICIES["bf16-true"],
    "rehearsed": REHEARSED,
    "islands": BF16.keeping_fp32("blocks.*.norm"),
    "functions": BF16.keeping_fp32("blocks.*:silu", "*:relu"),
    "true functions": POLICIES["bf16-true"].keeping_fp32("blocks.*:silu", "*:relu"),
    "true islands": POLICIES["bf16-true"].keeping_fp32("blocks.2.norm", "blocks.0"),
}


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("policy", POLICIES_HERE.values(), ids=POLICIES_HERE)
def test_gradients_buffers_and_random_state_have_the_same_bits_as_without(
    policy: Policy, inplace: bool
) -> None:
    """Alone and within checkpoints, with ReLUs in place, dropout, islands and a norm used twice."""

    def net() -> nn.Module:
        return Net(inplace=inplace)

    plain = run(policy, (), net)

    assert differing(plain, run(policy, REMAKE, net)) == []
    assert differing(plain, run(policy, (*REMAKE, CHECKPOINT), net)) == []


@pytest.mark.parametrize("policy", [BF16, POLICIES["bf16-true"]], ids=["bf16", "true"])
def test_narrow_norms_are_remade_too(policy: Policy) -> None:
    """The lever that computes has the bits that it has without the one that remakes."""
    narrow = run(policy, (NORMS,))

    assert differing(narrow, run(policy, (NORMS, *REMAKE))) == []
    assert differing(narrow, run(policy, (NORMS, *REMAKE, CHECKPOINT))) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "norm",
    [
        lambda: nn.BatchNorm2d(CHANNELS),
        lambda: nn.BatchNorm2d(CHANNELS, momentum=None),
        lambda: nn.BatchNorm2d(CHANNELS, affine=False),
        lambda: nn.BatchNorm2d(CHANNELS, track_running_stats=False),
        lambda: nn.BatchNorm2d(CHANNELS).eval(),
        lambda: nn.GroupNorm(2, CHANNELS),
        lambda: nn.InstanceNorm2d(CHANNELS, track_running_stats=True),
    ],
    ids=["momentum", "cumulative", "plain", "untracked", "frozen", "group", "instance"],
)
def test_running_statistics_are_written_once(norm: Callable[[], nn.Module]) -> None:
    """A norm that runs again in backward leaves mean, variance and count as they are."""

    def net() -> nn.Module:
        model = Net()
        model.blocks[0].norm = norm()  # type: ignore[union-attr]
        return model

    plain = run(FP32, (), net)

    assert differing(plain, run(FP32, REMAKE, net)) == []
    assert differing(plain, run(FP32, (*REMAKE, CHECKPOINT), net)) == []


def held(body: nn.Module, x: Tensor, policy: Policy = FP32) -> int:
    """Return the bytes of activations when backward begins, under the lever."""
    prepare_model(body, policy, "cpu")
    apply_rules(body, REMAKE, policy)
    with MemoryLedger(body) as ledger:
        ledger.inputs(x)
        with forward_context(policy, "cpu"):
            total = body(x).sum()
        total.backward()
    return ledger.first_lines("backward")["activations"]


def layer(channels_in: int = CHANNELS) -> nn.Conv2d:
    return nn.Conv2d(channels_in, CHANNELS, 5, padding=2, bias=False)  # 25 products and more


STATISTICS = 2 * CHANNELS * 4  # of a batch norm: mean and 1/deviation


@pytest.mark.parametrize("inplace", [False, True])
def test_between_two_convolutions_one_tensor_is_held(inplace: bool) -> None:
    """Not the norm's result, nor ReLU's: the first convolution's, which the norm keeps."""
    body = nn.Sequential(
        layer(CHANNELS), nn.BatchNorm2d(CHANNELS), nn.ReLU(inplace=inplace), layer()
    )

    assert held(body, torch.randn(BATCH, CHANNELS, SIDE, SIDE)) == 4 * ONE + STATISTICS


def test_a_stem_on_images_is_made_again_from_the_batch() -> None:
    """Its convolution takes 9 products a number: nothing of it is held."""
    stem = nn.Conv2d(1, CHANNELS, 3, padding=1, bias=False)
    body = nn.Sequential(stem, nn.BatchNorm2d(CHANNELS), nn.ReLU(), layer())

    assert held(body, images()) == STATISTICS


def test_the_copy_of_a_batch_in_16_bits_is_not_held() -> None:
    """The model's entry casts the batch, whose fp32 numbers the caller has."""
    images_wide = torch.randn(BATCH, CHANNELS, SIDE, SIDE)
    body = nn.Sequential(layer(), nn.BatchNorm2d(CHANNELS))

    assert held(body, images_wide, POLICIES["bf16-true"]) == 2 * ONE + STATISTICS


def test_what_another_hook_makes_of_the_batch_is_held() -> None:
    """A hook behind the cast may change the numbers, so that a cast alone is not what they are."""

    def doubled(module: nn.Module, args: Any) -> Any:
        return (args[0] * 2,)

    def net() -> nn.Module:
        model = Net()
        model.register_forward_pre_hook(doubled)
        return model

    policy = POLICIES["bf16-true"]

    assert differing(run(policy, (), net), run(policy, REMAKE, net)) == []


def test_a_hook_that_writes_into_the_batch_is_seen() -> None:
    """In place on the very result of the cast: the result is held."""

    def net() -> nn.Module:
        model = Net()
        model.register_forward_pre_hook(lambda module, args: (args[0].mul_(2),))
        return model

    policy = POLICIES["bf16-true"]

    assert differing(run(policy, (), net), run(policy, REMAKE, net)) == []


def test_a_gated_mlp_holds_its_halves_and_not_their_product() -> None:
    """silu(gate) up is made again from what silu and the product keep anyway."""
    body = nn.Sequential(nn.Linear(CHANNELS, CHANNELS), Gated())
    x = torch.randn(ONE // CHANNELS, CHANNELS)
    # Inputs of the two calls of the norm, and the product that is cut in halves.
    tensors = (2 + 8) * ONE * 4
    statistics = 2 * 2 * ONE // CHANNELS * 4

    assert held(body, x) == tensors + statistics


def test_the_result_of_an_unsaved_input_is_held() -> None:
    """Holding a sum in the place of its ReLU would free nothing."""

    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = layer(), layer()

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.one(x) + self.other(x))

    assert held(Sum(), torch.randn(BATCH, CHANNELS, SIDE, SIDE)) == 4 * ONE


@pytest.mark.parametrize("numel", [LEAST_NUMEL - 1, LEAST_NUMEL, LEAST_NUMEL + 1])
def test_small_results_are_held(numel: int) -> None:
    """Below 4,096 numbers a call costs more than it saves."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(numel))

        def forward(self, x: Tensor) -> Tensor:
            return F.gelu(F.gelu(x * self.weight))

    # The inputs of both calls, or nothing: the product is one of the batch and a weight.
    expected = 2 * 4 * numel if numel < LEAST_NUMEL else 0

    assert held(Twice(), torch.randn(numel)) == expected


def test_chains_of_calls_end() -> None:
    """Of twenty activations in a row every ninth is held, lest each use repeat all before it."""

    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(ONE))

        def forward(self, x: Tensor) -> Tensor:
            x = x * self.weight
            for _ in range(20):
                x = F.gelu(x)
            return x

    # Eight calls, the first of which is the product; one held; eight calls; one held; the rest.
    assert held(Chain(), torch.randn(ONE)) == 2 * 4 * ONE


@pytest.mark.parametrize(
    ("function", "cheap"),
    [
        (lambda x: F.dropout(x, 0.5), False),
        (lambda x: F.rrelu(x, training=True), False),
        (lambda x: F.softmax(x, -1), False),
        (lambda x: F.linear(x, torch.ones(4, 4)), False),
        (F.relu, True),
        (torch.relu_, True),
        (lambda x: x.relu(), True),
        (lambda x: x * x, True),
        (lambda x: x.bfloat16(), True),
        (lambda x: F.layer_norm(x, (4,)), True),
        (lambda x: F.conv1d(x, torch.ones(2, 4, 8)), True),
        (lambda x: F.conv1d(x, torch.ones(2, 4, 9)), False),
    ],
)
def test_cheap_is_what_is_listed(function: Callable[[Tensor], Tensor], cheap: bool) -> None:
    """Nothing random, no product of a layer; every spelling of what is."""
    seen = []

    class Ask(torch.overrides.TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            seen.append(is_cheap(func, args, kwargs or {}))
            return func(*args, **(kwargs or {}))

    x = torch.ones(1, 4, 16)
    weights = torch.ones(1, 4, 4)
    with Ask():
        function(x if "conv1d" in function.__code__.co_names else weights) if hasattr(
            function, "__code__"
        ) else function(weights)

    assert seen[-1] is cheap


class Body(nn.Module):
    """A function of a product, so that it gets a gradient."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(64, 64), nn.Linear(64, 64)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.function(self.first(x)))  # type: ignore[no-any-return]


def written(x: Tensor) -> Tensor:
    """A result of a cheap call that is written to afterwards."""
    return F.silu(x).add_(1)


def part_written(x: Tensor) -> Tensor:
    y = F.silu(x)
    y[:, :3].relu_()
    return y


def swapped(x: Tensor) -> Tensor:
    return F.silu(x).t().contiguous().t().mul(2).view_as(x)


def expanded(x: Tensor) -> Tensor:
    return F.layer_norm(x, (64,))[:, :1].expand(-1, 64) * F.silu(x)


def seen_as_bits(x: Tensor) -> Tensor:
    return x * F.silu(x).detach().view(torch.int32).abs().float().clamp(0, 1)


def in_a_slice(x: Tensor) -> Tensor:
    left, right = F.gelu(F.layer_norm(x, (64,))).split(32, dim=-1)
    return torch.cat([left * right, left.tanh()], -1)


@pytest.mark.parametrize(
    "function", [written, part_written, swapped, expanded, seen_as_bits, in_a_slice]
)
def test_views_and_writes_are_told_apart(function: Callable[[Tensor], Tensor]) -> None:
    """The bits are those without the lever, whatever is seen of a result or written into it."""
    x = torch.randn(128, 64)

    def net() -> nn.Module:
        return Body(function)

    assert differing(run(FP32, (), net, x), run(FP32, REMAKE, net, x)) == []


def test_an_input_that_was_overwritten_is_an_error_as_without() -> None:
    """Autograd's own sentence, and no wrong gradient."""

    def overwritten(x: Tensor) -> Tensor:
        y = F.silu(x)
        x.mul_(2)
        return y

    model = Body(overwritten)
    apply_rules(model, REMAKE, FP32)

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        model(torch.randn(128, 64)).sum().backward()


def test_a_batch_that_was_overwritten_is_an_error() -> None:
    """What is to be made again from it cannot be any more."""
    model, x = Net(), images()
    apply_rules(model, REMAKE, FP32)
    loss = model(x).sum()
    x.zero_()

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_gradients_accumulate_over_two_backward_passes_of_one_graph() -> None:
    """A call can be repeated as often as a graph is walked, in checkpoints too."""
    torch.manual_seed(0)
    model, x = Net(), images()
    apply_rules(model, (*REMAKE, CHECKPOINT), FP32)
    loss = model(x).square().mean()
    loss.backward(retain_graph=True)
    once = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    loss.backward()

    twice = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(torch.equal(2 * a, b) for a, b in zip(once, twice, strict=True))


def test_second_derivatives_are_those_without() -> None:
    """Restored tensors stand where the saved ones stood in the graph."""

    def penalty(rules: tuple[ActivationRule, ...]) -> Tensor:
        torch.manual_seed(0)
        model = Body(lambda x: F.silu(F.layer_norm(x, (64,))))
        apply_rules(model, rules, FP32)
        x = torch.randn(128, 64, requires_grad=True)
        (slope,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        slope.square().sum().backward()
        assert x.grad is not None
        return x.grad

    assert torch.equal(penalty(()), penalty(REMAKE))


def test_backward_under_autocast_leaves_no_casts_behind() -> None:
    """A cast of a weight made without gradients must not be found by the next forward pass."""

    def gradients(rules: tuple[ActivationRule, ...]) -> dict[str, Tensor]:
        torch.manual_seed(0)
        model, x = Net().train(), images()
        apply_rules(model, rules, BF16)
        with torch.autocast("cpu", torch.bfloat16):
            for _ in range(2):
                model(x).float().square().mean().backward()
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    plain = gradients(())

    assert "stem.weight" in plain
    assert differing(plain, gradients(REMAKE)) == []


def test_evaluation_and_forward_without_gradients_note_nothing() -> None:
    """The lever acts where something is saved for a training step."""
    model, x = Net(), images()
    plain = copy.deepcopy(model)
    apply_rules(model, REMAKE, FP32)
    with torch.no_grad():
        torch.manual_seed(0)
        got = model(x)
        torch.manual_seed(0)
        expected = plain(x)
    model.eval(), plain.eval()

    assert torch.equal(expected, got)
    assert torch.equal(plain(x), model(x))


def test_nothing_stays_in_force_after_an_interrupt() -> None:
    """Neither the hook on saved tensors nor the mode that sees calls."""

    class Interrupted(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            F.relu(x)
            raise KeyboardInterrupt

    model = Interrupted()
    apply_rules(model, REMAKE, FP32)
    with contextlib.suppress(KeyboardInterrupt):
        model(torch.randn(LEAST_NUMEL, requires_grad=True))

    assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None
    assert torch._C._len_torch_function_stack() == 0


@pytest.fixture
def no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("rules", [REMAKE, (*REMAKE, CHECKPOINT)], ids=["alone", "checkpointed"])
def test_nothing_outlives_the_backward_pass(rules: tuple[ActivationRule, ...]) -> None:
    """No cycle keeps a tensor until the garbage collector comes, nor does the lever's book."""
    model, x = Net(), images()
    apply_rules(model, rules, FP32)
    model(x).sum().backward()  # modules that torch imports then keep the frames of the first call
    alive: list[weakref.ref[Any]] = []

    def note(module: nn.Module, args: Any, output: Tensor) -> None:
        alive.append(weakref.ref(output.untyped_storage()))

    for module in model.modules():
        module.register_forward_hook(note)
    model(x).sum().backward()

    assert len(alive) > 20
    assert [reference() for reference in alive if reference() is not None] == []


@pytest.mark.usefixtures("no_collector")
def test_a_graph_that_is_dropped_frees_what_it_held() -> None:
    """Without a backward pass too."""
    model, x = Net(), images()
    apply_rules(model, REMAKE, FP32)
    seen: list[weakref.ref[Any]] = []
    model.stem.register_forward_hook(
        lambda module, args, output: seen.append(weakref.ref(output.untyped_storage()))
    )
    loss = model(x).sum()
    del loss

    assert [reference() for reference in seen] == [None]


def test_a_module_that_packs_inside_of_the_lever_packs_as_alone() -> None:
    """The innermost lever counts; what it keeps, the outer one may make again, exactly."""
    packed = ActivationRule(modules="blocks.[23]", lever="int8")
    alone = run(FP32, (packed,))

    assert differing(alone, run(FP32, (packed, *REMAKE))) == []
