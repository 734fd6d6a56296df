"""The ledger on hand-written models and loops, where every byte can be worked out on paper."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.modules import module as module_hooks
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks
from torch.utils.checkpoint import checkpoint

from narrowcast.errors import UsageError
from narrowcast.memory.measure import MemoryLedger
from narrowcast.records.codec import from_json, to_json
from narrowcast.records.memory import CATEGORIES, MemoryRecord

WIDTH, BATCH = 32, 4
SQUARE = 4 * WIDTH * WIDTH
ROW = 4 * WIDTH


@pytest.mark.parametrize(
    ("cut", "covered"),
    [
        (lambda data: data[4:8], 4 * ROW),
        (lambda data: (data[4:8], data[6:9]), 5 * ROW),
        (lambda data: (data[6:9], data[0:2]), 5 * ROW),
        (lambda data: data[4:8, :1], 3 * ROW + 4),
        (lambda data: data[4:4], 0),
        (lambda data: data[3:4].expand(5, WIDTH), ROW),
        (lambda data: (data[:50], data[50:]), 100 * ROW),
        (lambda data: data, 100 * ROW),
        (lambda data: data.t(), 100 * ROW),
    ],
)
def test_of_a_view_that_is_announced_what_it_covers_counts(
    cut: Callable[[Tensor], Any], covered: int
) -> None:
    """What is covered twice counts once, and the rest of the data set is held anyway."""
    data = torch.randn(100, WIDTH)
    batch = cut(data)
    with MemoryLedger(mlp()) as ledger:
        ledger.inputs(batch)
        data.sum()

    assert lines(ledger.record())["inputs"] == covered


def test_what_happens_while_a_batch_is_drawn_is_not_seen() -> None:
    """Neither views of the data set, nor copies on the way, nor a module that transforms it."""
    data, transform, model = torch.randn(100, WIDTH), nn.BatchNorm1d(WIDTH), mlp()
    with MemoryLedger(model) as ledger:
        for first in (0, 4):
            with ledger.drawing():
                x = torch.stack([transform(data)[first + i] for i in range(BATCH)]).detach()
            ledger.inputs(x)
            model(x).sum().backward()

    record = ledger.record()
    held = lines(record)
    assert (held["inputs"], held["buffers"], held["unattributed"]) == (BATCH * ROW, 0, 0)
    assert not any("only read" in note for note in record.notes)


def test_parts_of_two_draws_do_not_add_up() -> None:
    """The second micro-batch takes the place of the first, in one and the same data set."""
    data = torch.randn(100, WIDTH)
    with MemoryLedger(mlp()) as ledger:
        for first, size in ((0, 8), (50, 3)):
            with ledger.drawing():
                x = data[first : first + size]
            ledger.inputs(x)
            x.sum()

    assert ledger.last_lines()["inputs"] == 3 * ROW
    assert lines(ledger.record())["inputs"] == 8 * ROW


def mlp(layers: int = 3) -> nn.Sequential:
    """Square layers without biases, a ReLU after each: every weight has SQUARE bytes."""
    parts: list[nn.Module] = []
    for _ in range(layers):
        parts += [nn.Linear(WIDTH, WIDTH, bias=False), nn.ReLU()]
    return nn.Sequential(*parts)


def batch() -> Tensor:
    return torch.randn(BATCH, WIDTH)


def autocast(dtype: torch.dtype | None) -> contextlib.AbstractContextManager[Any]:
    return torch.autocast("cpu", dtype=dtype) if dtype else contextlib.nullcontext()


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, dtype: torch.dtype | None = None
) -> None:
    with autocast(dtype):
        loss = model(x).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def ledger_of(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    step: Callable[[], object],
    *inputs: Any,
) -> MemoryRecord:
    ledger = MemoryLedger(model, optimizer)
    with ledger:
        ledger.inputs(inputs)
        step()
    return ledger.record(precision="test")


def lines(record: MemoryRecord) -> dict[str, int]:
    return {line.category: line.bytes for line in record.lines}


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_lines_and_modules_sum_to_the_total(
    dtype: torch.dtype | None, kind: type[torch.optim.Optimizer]
) -> None:
    """Every byte of the peak stands in one line and in one module; every category has a line."""
    model, x = mlp(), batch()
    optimizer = kind(model.parameters(), lr=1e-3)
    train(model, optimizer, x, dtype)

    record = ledger_of(model, optimizer, lambda: train(model, optimizer, x, dtype), x)

    assert list(lines(record)) == list(CATEGORIES)
    assert sum(lines(record).values()) == record.total_peak_bytes
    assert sum(m.bytes for m in record.modules) == record.total_peak_bytes
    assert max(p.bytes for p in record.timeline) == record.total_peak_bytes
    assert from_json(MemoryRecord, to_json(record)) == record


def test_the_state_that_outlives_a_step_is_counted_by_what_it_is() -> None:
    """Weights, moments, step counters, buffers and the batch have the sizes that they have."""
    model, x = nn.Sequential(mlp(), nn.BatchNorm1d(WIDTH)), batch()
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
    train(model, optimizer, x)

    held = lines(ledger_of(model, optimizer, lambda: train(model, optimizer, x), x))

    weights = sum(p.nbytes for p in model.parameters())
    counters = 4 * len(list(model.parameters()))
    assert held["parameters"] == weights
    assert held["optimizer_state"] == 2 * weights + counters
    assert held["buffers"] == sum(b.nbytes for b in model.buffers())
    assert held["inputs"] == x.nbytes
    assert held["unattributed"] == held["master_weights"] == 0


def test_what_is_saved_for_backward_is_an_activation() -> None:
    """After forward an MLP holds the output of each ReLU, and nothing of its linear layers.

    The last ReLU's output is saved twice (by itself and by the square), and counted once.
    """
    model, x = mlp(layers=3), batch()
    ledger = MemoryLedger(model)

    with ledger:
        ledger.inputs(x)
        loss = model(x).square().mean()
    held = ledger.last_lines()

    assert held["activations"] == 3 * BATCH * ROW
    assert held["temporaries"] == loss.nbytes


def test_weight_copies_of_autocast_stand_apart_from_activations() -> None:
    """Two bytes a weight for each layer whose input needs a gradient; activations are halved."""
    model, x = mlp(layers=3), batch()
    ledger = MemoryLedger(model)

    with ledger:
        ledger.inputs(x)
        with autocast(torch.bfloat16):
            loss = model(x).square().sum()
    held = ledger.last_lines()
    del loss

    # The first layer's input is the batch, so its weight copy ends with the autocast cache.
    assert held["autocast_casts"] == 2 * SQUARE // 2
    # bf16: the cast batch, three ReLU outputs; and CPU autocast squares (pow) in bf16.
    assert held["activations"] == 4 * BATCH * ROW // 2


def test_a_weight_copy_belongs_to_the_module_of_its_weight() -> None:
    """Also when another module than the one that holds the weight uses it."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.holder = nn.Linear(WIDTH, WIDTH, bias=False)
            self.user = nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(self.user(x), self.holder.weight)

    model = Tied()
    x = batch().requires_grad_()
    ledger = MemoryLedger(model)
    with ledger, autocast(torch.bfloat16):
        loss = model(x).sum()
    record = ledger.record()
    del loss

    by_name = {m.name: m.categories for m in record.modules}
    assert by_name["holder"] == {"parameters": SQUARE, "autocast_casts": SQUARE // 2}


def test_gradients_are_gradients_from_their_first_byte() -> None:
    """At the end of backward all gradients are there, whichever moment the peak takes."""
    model, x = mlp(), batch()

    record = ledger_of(model, None, lambda: model(x).square().mean().backward(), x)

    assert record.peak_phase == "backward"
    assert lines(record)["gradients"] == 3 * SQUARE


def test_a_second_micro_batch_adds_to_gradients_and_makes_temporaries() -> None:
    """What is added to .grad and thrown away is a temporary; .grad itself is counted once."""
    model, x = mlp(layers=1), batch()
    model(x).sum().backward()

    record = ledger_of(model, None, lambda: model(x).sum().backward(), x)

    held = lines(record)
    assert held["gradients"] == SQUARE
    assert held["temporaries"] >= SQUARE


def test_temporaries_of_the_optimizer_are_not_its_state() -> None:
    """foreach AdamW holds one more copy of all weights while it steps: pytorch#97712."""
    model, x = mlp(), batch()
    optimizer = torch.optim.AdamW(model.parameters(), foreach=True)
    train(model, optimizer, x)

    record = ledger_of(model, optimizer, lambda: train(model, optimizer, x), x)

    assert (record.peak_phase, record.peak_module) == ("optimizer", "(optimizer)")
    assert 3 * SQUARE <= lines(record)["temporaries"] < 4 * SQUARE
    assert lines(record)["optimizer_state"] == 6 * SQUARE + 3 * 4


def test_optimizer_state_made_in_the_measured_step_is_state() -> None:
    """Moments are born in the first step; they are not temporaries because they are new."""
    model, x = mlp(), batch()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    record = ledger_of(model, optimizer, lambda: train(model, optimizer, x), x)

    assert record.peak_phase == "optimizer"
    assert lines(record)["optimizer_state"] == 3 * SQUARE


def test_fp32_copies_that_only_the_optimizer_holds_are_master_weights() -> None:
    """The hand-made master copy of a bf16 model: the optimizer's parameters are not the model's."""
    model = mlp().bfloat16()
    masters = [p.detach().float().requires_grad_() for p in model.parameters()]
    optimizer = torch.optim.SGD(masters, lr=0.1)
    x = batch().bfloat16()

    def step() -> None:
        model(x).float().sum().backward()
        for master, p in zip(masters, model.parameters(), strict=True):
            assert p.grad is not None
            master.grad, p.grad = p.grad.float(), None
        optimizer.step()
        for master, p in zip(masters, model.parameters(), strict=True):
            p.data.copy_(master.data)

    held = lines(ledger_of(model, optimizer, step, x))

    assert held["master_weights"] == 3 * SQUARE
    assert held["parameters"] == 3 * SQUARE // 2
    assert held["gradients"] >= 3 * SQUARE


def test_the_three_phases_follow_each_other() -> None:
    """Forward, backward, then everything up to the next forward: clipping and the update."""
    model, x = mlp(), batch()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step() -> None:
        for _ in range(2):
            model(x).sum().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    record = ledger_of(model, optimizer, step, x)

    phases = [p.phase for p in record.timeline]
    changes = [phases[0]] + [b for a, b in pairwise(phases) if a != b]
    assert changes == ["forward", "backward", "forward", "backward", "optimizer"]


def test_a_ledger_of_two_steps_can_begin_at_the_second() -> None:
    """Peak and timeline are the second step's; the events tell of both."""
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    x = batch()
    ledger = MemoryLedger(model, optimizer)
    with ledger:
        torch.randn(1000, 1000)
        train(model, optimizer, x)
        ledger.begin_here()
        train(model, optimizer, x)

    record = ledger.record()
    assert record.total_peak_bytes == ledger.peak_bytes == ledger.peak_seen_bytes < 4_000_000
    assert max(change for _, change in ledger.events()) == 4_000_000
    second = ledger_of(model, optimizer, lambda: train(model, optimizer, x))
    assert record.total_peak_bytes == second.total_peak_bytes
    assert lines(record) == lines(second)


def test_a_batch_that_was_not_announced_is_found_at_the_door_of_the_model() -> None:
    """Arguments of the outermost module are inputs, by position or by name."""

    class Named(nn.Module):
        def forward(self, *, x: Tensor) -> Tensor:
            return x.sin()

    for model, call in ((mlp(), lambda m, x: m(x)), (Named(), lambda m, x: m(x=x))):
        x = batch()
        ledger = MemoryLedger(model)
        with ledger:
            call(model, x)

        assert lines(ledger.record())["inputs"] == x.nbytes


def test_what_nobody_announced_is_a_line_of_its_own() -> None:
    """A tensor from before that an operation returns, such as a view, is in the total."""
    model, x, foreign = mlp(), batch(), torch.ones(BATCH, WIDTH)

    record = ledger_of(model, None, lambda: model(x).mul(foreign.t().t()).sum().backward(), x)

    assert lines(record)["unattributed"] == foreign.nbytes
    assert any("'unattributed'" in note and "(outside modules)" in note for note in record.notes)


def test_what_is_only_read_is_a_note() -> None:
    """A batch is taken from a data set in memory: the batch is counted, the data set is named."""
    model, data = mlp(), torch.ones(100, WIDTH)
    ids = torch.arange(BATCH)

    record = ledger_of(model, None, lambda: model(data[ids]).sum().backward(), ids)

    held = lines(record)
    assert (held["unattributed"], held["inputs"]) == (0, ids.nbytes + BATCH * ROW)
    assert any("12.5 KiB" in note and "only read" in note for note in record.notes)


def test_a_constant_made_in_the_step_is_not_taken_for_an_old_one() -> None:
    """torch.tensor makes its storage below the dispatcher, and is new all the same."""
    model, x = mlp(), batch()

    record = ledger_of(model, None, lambda: model(x) + torch.tensor([1.0] * WIDTH), x)

    assert lines(record)["unattributed"] == 0


class Repeated(nn.Module):
    """Calls one layer three times, hides tensors in a dict, and returns more than a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(WIDTH, WIDTH, bias=False)
        self.last = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> dict[str, Any]:
        for _ in range(3):
            x = self.shared(x).tanh()
        return {"out": [self.last(x)], "note": "not a tensor"}


def test_backward_is_attributed_to_the_modules_that_made_the_graph() -> None:
    """Weight gradients of a layer that is called three times belong to it; no hook on tensors."""
    model, x = Repeated(), batch()

    def step() -> None:
        model(x)["out"][0].sum().backward()

    record = ledger_of(model, None, step, x)

    backward = [p.module for p in record.timeline if p.phase == "backward"]
    assert {"last", "shared", "(model)"} <= set(backward)
    assert backward.index("last") < backward.index("shared")
    assert record.timeline[-1].categories["gradients"] == 2 * SQUARE
    by_name = {m.name: m.categories for m in record.modules}
    assert by_name["last"]["gradients"] == SQUARE
    assert by_name["(model)"]["activations"] >= BATCH * ROW  # what is left of tanh's outputs


class Checkpointed(nn.Module):
    def __init__(self, *, reentrant: bool) -> None:
        super().__init__()
        self.body = mlp(layers=4)
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = checkpoint(self.body, x, use_reentrant=self.reentrant)
        return out


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputed_activations_are_activations(reentrant: bool) -> None:
    """Checkpointing holds only the input over forward, and in backward what it computes again."""
    model = Checkpointed(reentrant=reentrant)
    x = batch().requires_grad_()
    forward_only = MemoryLedger(model)
    with forward_only:
        forward_only.inputs(x)
        loss = model(x).sum()
    del loss

    record = ledger_of(model, None, lambda: model(x).sum().backward(), x)

    assert forward_only.last_lines()["activations"] <= BATCH * ROW  # sum() saves no values
    assert max(p.categories.get("activations", 0) for p in record.timeline) >= 4 * BATCH * ROW
    assert {f"body.{i}" for i in (0, 2, 4, 6)} <= {
        p.module for p in record.timeline if p.phase == "backward"
    }


def test_a_gradient_that_is_used_up_at_once_was_a_gradient() -> None:
    """Updating in the gradient's own hook, and dropping it, leaves no .grad to look at."""
    model, x = mlp(layers=1), batch()

    def release(p: Tensor) -> None:
        assert p.grad is not None
        p.data.sub_(p.grad)
        p.grad = None

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(release)
    record = ledger_of(model, None, lambda: model(x).sum().backward(), x)

    assert max(p.categories.get("gradients", 0) for p in record.timeline) == SQUARE


def test_gradients_of_sparse_embeddings_are_counted() -> None:
    """A sparse gradient has no storage of its own, but its parts have."""
    model = nn.Embedding(100, 8, sparse=True)
    optimizer = torch.optim.SparseAdam(model.parameters())
    ids = torch.tensor([1, 5, 7])

    def step() -> None:
        model(ids).sum().backward()
        optimizer.step()

    record = ledger_of(model, optimizer, step, ids)

    assert max(p.categories.get("gradients", 0) for p in record.timeline) >= 3 * 8 * 4


def test_a_model_and_an_optimizer_that_nobody_named_are_found() -> None:
    """Called modules bring their parameters, stepping optimizers their state."""
    teacher, x = mlp(), batch()
    optimizer = torch.optim.SGD(teacher.parameters(), lr=0.1, momentum=0.9)
    train(teacher, optimizer, x)
    ledger = MemoryLedger()

    with ledger:
        train(teacher, optimizer, x)
    held = lines(ledger.record())

    assert (held["parameters"], held["optimizer_state"]) == (3 * SQUARE, 3 * SQUARE)
    assert held["inputs"] == x.nbytes


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_measured_step_computes_the_same_bits(dtype: torch.dtype | None) -> None:
    """The ledger observes; weights after a measured step are those of a plain one."""
    torch.manual_seed(1)
    measured, plain, x = mlp(), mlp(), batch()
    plain.load_state_dict(measured.state_dict())
    for model, watch in ((measured, True), (plain, False)):
        optimizer = torch.optim.AdamW(model.parameters())
        with MemoryLedger(model, optimizer) if watch else contextlib.nullcontext():
            train(model, optimizer, x, dtype)

    pairs = zip(measured.parameters(), plain.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_nothing_is_kept_alive_by_being_watched() -> None:
    """Outputs that autograd saves form no cycle with the graph that they came from."""
    model, x = mlp(), batch()
    ledger = MemoryLedger(model)

    with ledger:
        ledger.inputs(x)
        model(x).exp().tanh().sum()  # the graph is dropped without a backward pass
    held = ledger.last_lines()

    assert held["activations"] == held["temporaries"] == 0


def test_everything_that_was_hooked_is_unhooked_also_after_an_error() -> None:
    """A failing step leaves modules, parameters, optimizers and storages as they were."""
    model, x = mlp(), batch()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    resize = torch.UntypedStorage.resize_

    def hooks() -> list[int]:
        return [
            len(module_hooks._global_forward_hooks),
            len(module_hooks._global_forward_pre_hooks),
            len(_global_optimizer_pre_hooks),
            len(_global_optimizer_post_hooks),
            len(model._forward_pre_hooks),
            *(len(p._backward_hooks or ()) for p in model.parameters()),
            *(len(p._post_accumulate_grad_hooks or ()) for p in model.parameters()),
        ]

    before = hooks()

    def fail() -> None:
        model(x).sum().backward()
        assert hooks() != before
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), MemoryLedger(model, optimizer):
        fail()

    assert hooks() == before
    assert torch.UntypedStorage.resize_ is resize
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None


def test_a_ledger_measures_once_and_reports_afterwards() -> None:
    """Asking too early, or measuring twice, is an error that says what to do."""
    ledger = MemoryLedger(mlp())
    with pytest.raises(UsageError, match="nothing to report yet"):
        ledger.record()
    with ledger, pytest.raises(UsageError, match="nothing to report yet"):
        ledger.record()

    with pytest.raises(UsageError, match="has measured already"):
        ledger.__enter__()


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_fake_tensors_give_the_same_ledger_as_real_ones(dtype: torch.dtype | None) -> None:
    """Sizes are all that it takes: a prediction may use the ledger on tensors without contents."""

    def measure() -> MemoryRecord:
        model, x = Repeated(), batch()
        optimizer = torch.optim.AdamW(model.parameters())

        def step() -> None:
            with autocast(dtype):
                loss = model(x)["out"][0].square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        step()
        return ledger_of(model, optimizer, step, x)

    real = measure()
    with FakeTensorMode():
        fake = measure()

    assert fake.lines == real.lines
    assert fake.modules == real.modules


def test_several_optimizers_are_all_counted() -> None:
    """A mapping of optimizers (GANs) holds the state of each."""
    model, x = nn.ModuleDict({"a": mlp(), "b": mlp()}), batch()
    optimizers = {
        name: torch.optim.SGD(part.parameters(), lr=0.1, momentum=0.9)
        for name, part in model.items()
    }

    def step() -> None:
        model["b"](model["a"](x)).sum().backward()
        for optimizer in optimizers.values():
            optimizer.step()

    step()
    ledger = MemoryLedger(model, optimizers)
    with ledger:
        ledger.inputs(x)
        step()

    assert lines(ledger.record())["optimizer_state"] == 6 * SQUARE


def test_an_old_tensor_that_is_saved_for_backward_is_still_only_read() -> None:
    """The look at saved tensors makes a view of its own, which is no operation of the step."""
    old = torch.ones(100, requires_grad=True)
    ledger = MemoryLedger()

    with ledger:
        old.exp().mul(old).sum().backward()
    held = lines(ledger.record())

    assert held["unattributed"] == 0


def test_a_ledger_inside_another_is_refused() -> None:
    """Each would count the other's work; afterwards the outer one reports, and a next one opens."""
    with MemoryLedger() as outer:
        with pytest.raises(UsageError, match="inside another one"):
            MemoryLedger().__enter__()
        torch.ones(8)
    with MemoryLedger() as following:
        torch.ones(8)

    assert outer.record().total_peak_bytes == following.record().total_peak_bytes
