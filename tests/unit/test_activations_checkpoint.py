"""Facts about checkpointing a module: the same bits as without, in fewer bytes."""

from __future__ import annotations

import contextlib
import copy
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from narrowcast.activations.rules import apply_rules, unused_levers
from narrowcast.errors import UsageError
from narrowcast.memory.measure import MemoryLedger
from narrowcast.plan import ActivationRule
from narrowcast.policy import POLICIES, Policy
from narrowcast.precision.cast import (
    backward_context,
    forward_context,
    numeric_settings,
    prepare_model,
)

BLOCKS = (ActivationRule(modules="blocks.*", lever="checkpoint"),)
REHEARSED = Policy(name="bf16", compute="bf16", autocast_rules="cuda")
ISLANDS_INSIDE = POLICIES["bf16"].keeping_fp32("blocks.*.norm")
ISLAND_BLOCK = POLICIES["bf16"].keeping_fp32("blocks.1")
TRUE_ISLAND = POLICIES["bf16-true"].keeping_fp32("blocks.*.norm", "blocks.0")


class Block(nn.Module):
    """Linear, batch norm, dropout, softmax, residual; takes and returns more than a tensor."""

    def __init__(self, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.norm = nn.BatchNorm1d(8) if norm is None else norm
        self.dropout = nn.Dropout(0.3)
        self.calls = 0

    def forward(self, x: Tensor, *, extra: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        self.calls += 1
        y = self.dropout(self.norm(self.linear(x)).softmax(-1))
        return x + y * extra["scale"][0], {"seen": y.exp()}


class Net(nn.Module):
    def __init__(self, norm: Callable[[], nn.Module] | None = None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(None if norm is None else norm()) for _ in range(3))
        self.gain = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        total = x.new_zeros(())
        scale = [self.gain(x)]
        for block in self.blocks:
            x, also = block(x, extra={"scale": scale, "flag": True})
            total = total + also["seen"].sum()
        return x.sum() + total


def run(
    policy: Policy, rules: tuple[ActivationRule, ...], net: Callable[[], nn.Module] = Net
) -> dict[str, Tensor]:
    """Return loss, gradients, buffers and the random state after two steps on one batch."""
    torch.manual_seed(0)
    model, x = net(), torch.randn(6, 8)
    prepare_model(model, policy, "cpu")
    apply_rules(model, rules, policy)
    seen = {}
    for step in range(2):
        with numeric_settings(policy), forward_context(policy, "cpu"):
            loss = model(x)
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


@pytest.mark.parametrize(
    "policy",
    [
        POLICIES["fp32"],
        POLICIES["bf16"],
        POLICIES["fp16"],
        POLICIES["bf16-true"],
        REHEARSED,
        ISLANDS_INSIDE,
        ISLAND_BLOCK,
        TRUE_ISLAND,
    ],
    ids=["fp32", "bf16", "fp16", "true", "rehearsed", "islands inside", "island", "true islands"],
)
def test_gradients_buffers_and_random_state_have_the_same_bits_as_without(policy: Policy) -> None:
    """Also with dropout, batch norm, keyword and nested arguments, and islands on and in blocks."""
    assert differing(run(policy, ()), run(policy, BLOCKS)) == []


class Drawing(nn.Module):
    """A block that draws from everything that a forward may draw from."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.own = nn.Linear(8, 8), torch.Generator().manual_seed(3)
        self.below = nn.Module()
        self.below.generator = self.own  # one generator under two names
        self.below.other = torch.Generator().manual_seed(4)

    def forward(self, x: Tensor) -> Tensor:
        gain = random.uniform(0.5, 1.5) + float(np.random.rand())  # noqa: NPY002
        noise = torch.rand(8, generator=self.own) + torch.rand(8, generator=self.below.other)
        return x + torch.tanh(self.linear(x)) * (gain + noise + torch.rand(8))


class DrawingNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        random.seed(1)
        np.random.seed(1)  # noqa: NPY002
        self.blocks = nn.ModuleList(Drawing() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        drawn = [random.random(), float(np.random.rand())]  # noqa: NPY002
        return x.sum() + sum(drawn)


def test_numbers_drawn_outside_of_torchs_generators_are_drawn_again() -> None:
    """From Python's, from numpy's, and from generators of the modules; and each is put back."""
    assert (
        differing(run(POLICIES["fp32"], (), DrawingNet), run(POLICIES["fp32"], BLOCKS, DrawingNet))
        == []
    )


def test_a_recomputation_that_fails_puts_random_numbers_back() -> None:
    """The states are what they were, whatever ends it."""
    torch.manual_seed(0)
    model, x = DrawingNet(), torch.randn(6, 8)
    apply_rules(model, BLOCKS, POLICIES["fp32"])
    loss = model(x)
    before = random.getstate(), model.blocks[0].own.get_state()
    with torch.no_grad():
        model.blocks[0].linear.weight = nn.Parameter(torch.randn(5, 5))
    with pytest.raises(RuntimeError):
        loss.backward()

    assert random.getstate() == before[0]
    assert torch.equal(model.blocks[0].own.get_state(), before[1])


@pytest.mark.parametrize(
    "norm",
    [
        lambda: nn.BatchNorm1d(8),
        lambda: nn.BatchNorm1d(8, momentum=None),
        lambda: nn.BatchNorm1d(8, affine=False),
        lambda: nn.BatchNorm1d(8, track_running_stats=False),
        lambda: nn.BatchNorm1d(8).eval(),
    ],
    ids=["momentum", "cumulative", "without weights", "no statistics", "frozen"],
)
def test_running_statistics_are_written_once(norm: Callable[[], nn.Module]) -> None:
    """The recomputation leaves mean, variance and the count of batches alone, in every variant."""

    def net() -> nn.Module:
        return Net(norm)

    plain, levered = run(POLICIES["fp32"], (), net), run(POLICIES["fp32"], BLOCKS, net)

    assert differing(plain, levered) == []


def test_running_statistics_that_overflowed_stay_as_they_are() -> None:
    """An inf that the first forward wrote is still an inf, and no NaN, after the recomputation."""

    def net() -> nn.Module:
        model = Net()
        model.blocks[0].norm.running_var.fill_(torch.inf)  # type: ignore[union-attr,operator]
        return model

    plain, levered = run(POLICIES["fp32"], (), net), run(POLICIES["fp32"], BLOCKS, net)

    assert torch.inf in plain["buffer blocks.0.norm.running_var"]
    assert differing(plain, levered) == []


def test_instance_norms_are_written_once_too() -> None:
    """Whatever norm keeps running statistics keeps those of the first forward."""

    def net() -> nn.Module:
        torch.manual_seed(3)
        body = nn.Sequential(nn.Conv1d(4, 4, 1), nn.InstanceNorm1d(4, track_running_stats=True))
        model = nn.Module()
        model.blocks = nn.ModuleList([body])
        model.forward = lambda x: body(x.view(3, 4, 4)).square().sum()  # type: ignore[method-assign]
        return model

    assert differing(run(POLICIES["fp32"], (), net), run(POLICIES["fp32"], BLOCKS, net)) == []


def test_checkpoints_nest() -> None:
    """A rule inside of another one's modules recomputes within the recomputation."""
    nested = (*BLOCKS, ActivationRule(modules="blocks.*.linear", lever="checkpoint"))

    assert differing(run(REHEARSED, ()), run(REHEARSED, nested)) == []


def test_the_recomputation_casts_as_the_rehearsal_did_in_a_plain_loop() -> None:
    """Backward outside of any context of ours still recomputes under CUDA's cast lists."""
    torch.manual_seed(0)
    model, x = Net(), torch.randn(6, 8)
    plain = copy.deepcopy(model)
    apply_rules(model, BLOCKS, REHEARSED)
    for one in (plain, model):
        torch.manual_seed(1)
        with forward_context(REHEARSED, "cpu"):
            loss = one(x)
        loss.backward()

    pairs = zip(plain.parameters(), model.parameters(), strict=True)
    assert all(torch.equal(p.grad, q.grad) for p, q in pairs)  # type: ignore[arg-type]


@pytest.mark.parametrize(("training", "grad", "calls"), [(1, 1, 2), (0, 1, 1), (1, 0, 1)])
def test_forward_runs_again_only_in_training_with_gradients(
    training: int, grad: int, calls: int
) -> None:
    """Evaluation costs nothing more, and keeps nothing less."""
    model = Net().train(bool(training))
    apply_rules(model, BLOCKS, POLICIES["fp32"])
    with torch.set_grad_enabled(bool(grad)):
        loss = model(torch.randn(6, 8))
    if grad:
        loss.backward()

    assert [block.calls for block in model.blocks] == [calls] * 3


def test_only_the_inputs_of_blocks_are_held() -> None:
    """Between forward and backward a chain of blocks holds one tensor each."""
    blocks = [nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64)) for _ in range(4)]
    model = nn.ModuleDict({"blocks": nn.ModuleList(blocks)})
    x = torch.randn(128, 64)
    apply_rules(model, BLOCKS, POLICIES["fp32"])
    with MemoryLedger(model) as ledger:
        ledger.inputs(x)
        y = x
        for block in blocks:
            y = block(y)
        y.sum().backward()

    # The first block's input is the batch, and the sum keeps nothing.
    assert ledger.first_lines("backward")["activations"] == 3 * x.nbytes


def test_the_ledger_sees_a_recomputation_as_a_call_of_the_module() -> None:
    """What the recomputation leaves is an activation, of the module that made it."""

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Square(), Square()])

        def forward(self, x: Tensor) -> Tensor:
            return self.blocks[1](self.blocks[0](x)).sum()

    class Square(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(256))

        def forward(self, x: Tensor) -> Tensor:
            return (x * self.weight).exp().exp()

    model = Outer()
    apply_rules(model, BLOCKS, POLICIES["fp32"])
    with MemoryLedger(model) as ledger:
        model(torch.full((64, 256), -1.0)).backward()
    timeline = ledger.record().timeline

    one = 64 * 256 * 4
    held = {p.module: p.categories.get("activations", 0) for p in timeline if p.phase == "backward"}
    most = max(p.categories.get("activations", 0) for p in timeline if p.phase == "backward")
    # The input of blocks.1, which its product keeps too, and the results of both exponentials.
    assert most == 3 * one
    assert {"blocks.0", "blocks.1"} <= held.keys()


def test_hooks_of_the_module_run_once() -> None:
    """A user's hook on a checkpointed block counts one call a step, and may change the input."""
    model, seen = Net(), []
    model.blocks[0].register_forward_hook(lambda *_: seen.append(1))
    apply_rules(model, BLOCKS, POLICIES["fp32"])
    model(torch.randn(6, 8)).backward()

    assert seen == [1]


def test_a_list_that_the_module_appends_to_is_the_callers() -> None:
    """The first forward gets the very objects that it was called with."""

    class Appending(nn.Module):
        def forward(self, x: Tensor, found: list[Tensor]) -> Tensor:
            found.append(x.exp())
            return found[-1] * 2

    model = nn.ModuleDict({"blocks": nn.ModuleList([Appending()])})
    apply_rules(model, BLOCKS, POLICIES["fp32"])
    found: list[Tensor] = []
    x = torch.randn(4, requires_grad=True)
    model["blocks"][0](x, found).sum().backward()  # type: ignore[index]

    assert len(found) == 1
    assert x.grad is not None


def test_a_module_that_writes_another_buffer_is_refused() -> None:
    """A count in a buffer would be counted twice: the module and the buffer are named."""

    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.count += 1  # type: ignore[operator]
            return self.linear(x)  # type: ignore[no-any-return]

    model = nn.ModuleDict({"blocks": nn.ModuleList([Counting()])})
    apply_rules(model, BLOCKS, POLICIES["fp32"])

    with pytest.raises(UsageError, match="Counting writes its buffer 'count'"):
        model["blocks"][0](torch.randn(2, 8))  # type: ignore[index]


def test_nothing_stays_in_force_after_an_interrupt() -> None:
    """Ctrl-C in the middle of a block leaves no hook on saved tensors behind."""

    class Interrupted(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise KeyboardInterrupt

    model = nn.ModuleDict({"blocks": nn.ModuleList([Interrupted()])})
    apply_rules(model, BLOCKS, POLICIES["fp32"])
    with contextlib.suppress(KeyboardInterrupt):
        model["blocks"][0](torch.randn(2, 8, requires_grad=True))  # type: ignore[index]

    assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None


def test_a_checkpointed_module_that_is_never_called_is_reported() -> None:
    """A lever on a module whose weight is used elsewhere did nothing, which can be asked for."""
    model = Net()
    rules = (*BLOCKS, ActivationRule(modules="gain", lever="checkpoint"))
    apply_rules(model, rules, POLICIES["fp32"])
    with torch.no_grad():
        model(torch.randn(6, 8))
    never = unused_levers(model)
    model(torch.randn(6, 8))

    assert never == dict.fromkeys(("blocks.0", "blocks.1", "blocks.2", "gain"), ("checkpoint",))
    assert unused_levers(model) == {}


def test_gradients_accumulate_over_two_backward_passes_of_one_graph() -> None:
    """A graph that is kept is recomputed for each backward pass."""
    torch.manual_seed(0)
    model, x = Net(), torch.randn(6, 8)
    apply_rules(model, BLOCKS, POLICIES["fp32"])
    loss = model(x)
    loss.backward(retain_graph=True)
    once = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    loss.backward()

    twice = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(torch.equal(2 * a, b) for a, b in zip(once, twice, strict=True))
