"""Facts about offload: what travels, what stays, and that gradients keep their bits.

There is no device to leave on a CPU. A stand-in copies into other tensors, and keeps a log of what
a stream would have been told; the copies themselves are for ``tests/gpu`` to prove.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from narrowcast.activations.checkpointing import Checkpoint
from narrowcast.activations.couriers import QueueCourier
from narrowcast.activations.forward import put
from narrowcast.activations.offload import LEAST_BYTES, Offload
from narrowcast.activations.remake import Remake
from narrowcast.activations.rules import apply_rules
from narrowcast.errors import UsageError
from narrowcast.memory.measure import MemoryLedger
from narrowcast.plan import ActivationRule
from narrowcast.policy import POLICIES

FP32 = POLICIES["fp32"]
ROWS, WIDTH = 128, 128  # 64 KiB in fp32, the least that travels


class StandIn:
    """Copies at once, and notes sizes and waits in order."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.copies = 0

    def on_host(self, size: int) -> Tensor:
        self.log.append(f"out {size}")
        return torch.empty(size, dtype=torch.uint8)

    def on_device(self, size: int) -> Tensor:
        self.log.append(f"back {size}")
        return torch.full((size,), 255, dtype=torch.uint8)

    def copy(self, source: Tensor, target: Tensor) -> int:
        target.copy_(source)
        self.copies += 1
        return self.copies

    def wait(self, done: Any) -> None:
        self.log.append(f"wait {done}")

    def sizes(self, way: str) -> list[int]:
        return [int(line.split()[1]) for line in self.log if line.startswith(way)]


def offloaded(model: nn.Module, *names: str) -> tuple[nn.Module, StandIn]:
    """Return a copy of the model with the lever on the named modules, and who carries for it."""
    levered, transport = copy.deepcopy(model), StandIn()
    courier = QueueCourier(transport)
    for name in names:
        put(levered.get_submodule(name), (Offload(lambda _: courier),))
    return levered, transport


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    model(x).square().sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(self.norm(x)).chunk(3, dim=-1)
        q, k, v = (part.unflatten(-1, (4, -1)).transpose(1, 2) for part in parts)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.out(y.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


def test_attention_keeps_its_bits_and_its_projection_travels_once() -> None:
    """q, k and v are views of one storage, which comes back once, with their strides."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), Attention())
    x = torch.randn(2, ROWS, WIDTH)
    levered, transport = offloaded(model, "1")
    one = x.nbytes

    assert_same(gradients(model, x), gradients(levered, x))
    # The norm's input and result, q k v in one, what attention returned.
    assert transport.sizes("out") == [one, one, 3 * one, one]
    # What attention returned comes back for the projection behind it, and again for attention.
    assert transport.sizes("back") == [one, 3 * one, one, one, one]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_convolutions_keep_their_bits(memory_format: torch.memory_format) -> None:
    """Also in channels-last memory, whose order kernels depend on; buffers and statistics stay."""
    torch.manual_seed(0)
    block = nn.Sequential(
        nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 3)
    )
    model = nn.Sequential(nn.Conv2d(3, 8, 1), block).to(memory_format=memory_format)
    x = torch.randn(4, 3, 32, 32).contiguous(memory_format=memory_format)
    levered, transport = offloaded(model, "1")

    assert_same(gradients(model, x), gradients(levered, x))
    # The first convolution's input, the norm's, and ReLU's result, which the last one takes.
    assert transport.sizes("out") == [4 * 8 * 32 * 32 * 4, *[4 * 16 * 32 * 32 * 4] * 2]
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), levered.buffers(), strict=True))


def test_weights_buffers_and_what_came_in_without_a_gradient_stay() -> None:
    """The batch, a mask and a table live on the device anyway; a copy of them frees nothing."""

    class Body(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(WIDTH, WIDTH)
            self.register_buffer("table", torch.randn(ROWS, WIDTH))

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return self.linear(x) * mask * self.table

    model = Body()
    x, mask = torch.randn(ROWS, WIDTH), torch.randn(ROWS, WIDTH)
    plain = copy.deepcopy(model)
    levered, transport = offloaded(model, "")
    plain(x, mask).sum().backward()
    levered(x, mask).sum().backward()

    assert transport.log == []
    assert_same(
        {n: p.grad for n, p in plain.named_parameters()},  # type: ignore[misc]
        {n: p.grad for n, p in levered.named_parameters()},  # type: ignore[misc]
    )


@pytest.mark.parametrize(("rows", "travels"), [(ROWS - 1, False), (ROWS, True)])
def test_storages_below_64_kib_stay(rows: int, travels: bool) -> None:
    """At the limit a storage travels, one row below it stays."""
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU())
    levered, transport = offloaded(model, "1")
    x = torch.randn(rows, WIDTH)
    levered(x).sum().backward()

    assert (x.nbytes >= LEAST_BYTES) == travels
    assert transport.sizes("out") == ([x.nbytes] if travels else [])


def chain(length: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), *(nn.GELU() for _ in range(length)))


def test_a_source_is_let_go_when_three_more_have_been_started() -> None:
    """The computation waits for copy 1 once copy 4 is under way, and for the rest in backward."""
    levered, transport = offloaded(chain(6), *(str(i) for i in range(1, 7)))
    y = levered(torch.randn(ROWS, WIDTH))
    out = f"out {ROWS * WIDTH * 4}"

    assert transport.log == [out, out, out, out, "wait 1", out, "wait 2", out, "wait 3"]
    del transport.log[:]
    y.sum().backward()
    assert transport.log[:3] == ["wait 4", "wait 5", "wait 6"]


def test_backward_has_the_next_one_fetched_before_it_asks() -> None:
    """With the last one the one before it is begun; each is fetched once and waited for once."""
    model = chain(4)
    levered, transport = offloaded(model, *(str(i) for i in range(1, 5)))
    x = torch.randn(ROWS, WIDTH)
    y = levered(x)
    del transport.log[:]
    y.square().sum().backward()
    back = f"back {ROWS * WIDTH * 4}"
    fetched = transport.log[3:]  # after the waits for what was still leaving

    assert fetched == [back, "wait 5", back, "wait 6", back, "wait 7", back, "wait 8"]


def test_what_was_fetched_ahead_and_never_asked_for_is_waited_for() -> None:
    """A graph that is dropped half-way leaves no copy into memory that others may get."""
    levered, transport = offloaded(chain(3), "1", "2", "3")
    y = levered(torch.randn(ROWS, WIDTH))
    last = y.grad_fn
    held = last._saved_self  # asks for the last one, and has the one before it fetched
    begun = transport.copies
    del y, last, held

    assert transport.log[-1] == f"wait {begun}"


def test_a_kept_graph_comes_back_a_second_time() -> None:
    """The host holds the bytes as long as the graph lives."""
    model = chain(3)
    levered, _ = offloaded(model, "1", "2", "3")
    x = torch.randn(ROWS, WIDTH)
    loss = levered(x).square().sum()
    loss.backward(retain_graph=True)
    levered.zero_grad()
    loss.backward()

    assert_same(gradients(model, x), {n: p.grad for n, p in levered.named_parameters()})  # type: ignore[misc]


def test_the_inputs_of_checkpoints_travel() -> None:
    """On one module, what checkpointing keeps is what offload takes away; the bits stay."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), Attention(), Attention())
    x = torch.randn(2, ROWS, WIDTH)
    levered, transport = copy.deepcopy(model), StandIn()
    courier = QueueCourier(transport)
    for index in (1, 2):
        put(levered[index], (Offload(lambda _: courier), Checkpoint(FP32)))

    assert_same(gradients(model, x), gradients(levered, x))
    assert transport.sizes("out") == [x.nbytes, x.nbytes]


def test_a_module_on_a_cpu_is_refused_when_it_runs_too() -> None:
    """A model that was moved back after its rules were applied."""
    model = chain(1)
    put(model[0], (Offload(),))

    with pytest.raises(UsageError, match="on cpu"):
        model(torch.randn(ROWS, WIDTH))


def test_fake_tensors_travel_so_that_a_gpu_can_be_predicted() -> None:
    """Blocks hold nothing in forward; in backward one block's tensors are back at a time."""

    def ledger_of(rules: tuple[ActivationRule, ...]) -> MemoryLedger:
        model = nn.ModuleDict({"blocks": nn.ModuleList(Attention() for _ in range(3))})
        x = torch.randn(2, ROWS, WIDTH)
        apply_rules(model, rules, FP32)
        ledger = MemoryLedger(model)
        with ledger:
            ledger.inputs(x)
            y = x
            for block in model["blocks"]:  # type: ignore[union-attr]
                y = block(y)
            y.square().sum().backward()
        return ledger

    with FakeTensorMode():
        plain = ledger_of(())
        levered = ledger_of((ActivationRule(modules="auto", lever="offload"),))
    one = 2 * ROWS * WIDTH * 4
    statistics = 3 * (2 * 2 * ROWS * 4 + 2 * 4 * ROWS * 4)  # mean, 1/deviation, log-sum-exp

    assert plain.first_lines("backward")["activations"] == 3 * 6 * one + statistics
    assert levered.first_lines("backward")["activations"] == statistics + one  # square's argument
    # Backward of attention has q, k, v and its result back, and makes as many gradients.
    in_backward = sum(levered.peak_lines("backward").values())
    assert in_backward < sum(plain.peak_lines("backward").values()) - 2 * 5 * one


def test_what_is_remade_starts_from_what_travelled() -> None:
    """Offload stands outside of the lever that remakes: it sees what is kept, once each."""
    torch.manual_seed(0)

    def layer() -> nn.Conv2d:
        return nn.Conv2d(8, 8, 5, padding=2, bias=False)

    plain = nn.Sequential(layer(), nn.BatchNorm2d(8), nn.ReLU(), layer(), nn.SiLU(), layer())
    model, x, transport = copy.deepcopy(plain), torch.randn(128, 8, 8, 8), StandIn()
    courier = QueueCourier(transport)
    put(model, (Offload(lambda _: courier), Remake(FP32)))

    assert_same(gradients(plain, x), gradients(model, x))
    # The results of two convolutions; the batch stays where it is.
    assert transport.sizes("out") == [x.nbytes, x.nbytes]
