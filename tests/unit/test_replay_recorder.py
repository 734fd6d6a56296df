"""Every operation of a step: in order, with its module, its line, its dtype and its values."""

from __future__ import annotations

import gc
import math
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from narrowcast.errors import UnknownName, UsageError
from narrowcast.policy import Policy, policy_named
from narrowcast.precision.cast import backward_context, forward_context, prepare_model
from narrowcast.ranges.histogram import measure
from narrowcast.records.codec import dumps, loads
from narrowcast.records.diagnosis import ExecutedOp
from narrowcast.replay.recorder import OpRecorder
from replayed import Checkpointed, Net, Square, at, batch, compute_loss, engine_of


def recorded(model: nn.Module, x: Tensor, **options: Any) -> tuple[ExecutedOp, ...]:
    """Record ``model(x).sum()`` and its backward pass."""
    with OpRecorder(model, batch=x, **options) as ops:
        loss = model(x).sum()
        loss.backward()
        ops.mark(loss, "loss")
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                ops.mark(parameter.grad, name)
    return ops.events


class Two(nn.Module):
    """One layer called twice, an operation of the model's own, and one in place."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(4, 4)
        self.again = self.shared
        self.tail = nn.Sequential(nn.Linear(4, 4), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        x = self.shared(x)  # first
        x.mul_(2)  # in place
        x = self.again(x)  # second
        return self.tail(x)  # tail


def test_forward_and_backward_name_module_and_line() -> None:
    """In backward they are those of the forward operation whose node is running."""
    events = recorded(Two(), torch.randn(3, 4))

    found = [(op.op.split(".")[1], *at(op)) for op in events if op.code.startswith(("x", "ret"))]
    first, second = "x = self.shared(x)  # first", "x = self.again(x)  # second"
    in_place, tail = "x.mul_(2)  # in place", "return self.tail(x)  # tail"
    assert [f for f in found if f[1] == "forward"] == [
        ("addmm", "forward", "shared", first),
        ("mul_", "forward", "(model)", in_place),
        ("addmm", "forward", "shared", second),
        ("addmm", "forward", "tail.0", tail),
        ("tanh", "forward", "tail.1", tail),
    ]
    backward = [f for f in found if f[1] == "backward"]
    assert backward[0] == ("tanh_backward", "backward", "tail.1", tail)
    assert [f for f in backward if f[3] == in_place] == [("mul", "backward", "(model)", in_place)]
    assert {f[2:] for f in backward if f[0] == "mm"} == {
        ("tail.0", tail),
        ("shared", second),
        ("shared", first),
    }
    assert all(op.file == __file__ for op in events if op.line)
    assert [op.index for op in events] == list(range(len(events)))


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.filterwarnings("ignore:torch.utils.checkpoint")
def test_recomputation_is_forward_and_says_so(use_reentrant: bool) -> None:
    """Modules and functions that run again inside backward keep their places."""
    model = Checkpointed(use_reentrant=use_reentrant)
    events = recorded(model, torch.randn(3, 4, requires_grad=True))

    again = [op for op in events if op.recomputed]
    assert {op.phase for op in again} == {"forward"}
    ran = [(op.op, op.module) for op in again]
    assert ("aten.addmm.default", "inner.0") in ran
    assert ("aten.sin.default", "(model)") in ran
    code = "return x.sin().exp()  # recomputed"
    assert {op.code for op in again if op.op == "aten.sin.default"} == {code}
    cosines = [op for op in events if op.op == "aten.cos.default"]  # the derivative of sin
    assert [at(op) for op in cosines] == [("backward", "(model)", code)]
    products = [op for op in events if op.op == "aten.mm.default"]
    assert {op.module for op in products} == {"inner.0"}


def test_a_functions_own_backward_shows_its_own_lines() -> None:
    """The operations of a custom autograd.Function stand in the user's code, in both passes."""

    class Squares(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return Square.apply(self.linear(x))

    events = recorded(Squares(), torch.randn(3, 4))

    products = [op for op in events if op.op == "aten.mul.Tensor"]
    assert [at(op) for op in products] == [
        ("forward", "(model)", "return x * x  # own forward"),
        ("backward", "(model)", "return 2 * gradients[0] * x  # own backward"),
        ("backward", "(model)", "return 2 * gradients[0] * x  # own backward"),
    ]


def test_the_loss_is_outside_of_the_model_and_foreign_modules_are_known_by_class() -> None:
    """'' where no module is at work; a loss that is a module bears its class's name."""
    model, criterion = nn.Linear(4, 3), nn.CrossEntropyLoss()
    with OpRecorder(model) as ops:
        outputs = model(torch.randn(2, 4)) * 2
        criterion(outputs, torch.tensor([0, 1])).backward()

    modules = {op.op: op.module for op in ops.events if op.phase == "forward"}
    assert modules["aten.mul.Tensor"] == ""
    assert modules["aten._log_softmax.default"] == "CrossEntropyLoss"
    assert modules["aten.addmm.default"] == "(model)"
    backward = {op.op: op.module for op in ops.events if op.phase == "backward"}
    assert backward["aten._log_softmax_backward_data.default"] == "CrossEntropyLoss"


def test_modules_are_right_again_after_one_raised() -> None:
    """A caught exception leaves no module behind on the stack."""

    class Raises(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise ValueError

    class Catches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bad, self.good = Raises(), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            try:
                x = self.bad(x)
            except ValueError:
                x = x.cos()
            return self.good(x)

    events = recorded(Catches(), torch.randn(2, 4))

    assert [(op.op, op.module) for op in events[:2]] == [
        ("aten.cos.default", "(model)"),
        ("aten.addmm.default", "good"),
    ]


def test_gradient_of_a_gradient_has_places_too() -> None:
    """A penalty on the gradient runs backward inside the loss, and its own backward after."""
    model = nn.Linear(4, 4)
    with OpRecorder(model) as ops:
        x = torch.randn(2, 4, requires_grad=True)
        outputs = model(x).sin()
        (gradient,) = torch.autograd.grad(outputs.sum(), x, create_graph=True)
        gradient.square().sum().backward()

    cosines = [op for op in ops.events if op.op == "aten.cos.default"]
    assert {op.code for op in cosines} == {"outputs = model(x).sin()"}
    assert {op.phase for op in cosines} == {"backward"}


@pytest.mark.parametrize("name", ["fp32", "fp16", "bf16", "bf16-true"])
def test_the_dtype_is_that_below_autocast(name: str) -> None:
    """Products run in the policy's format; autocast's casts are operations of their own."""
    policy = policy_named(name)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    prepare_model(model, policy, "cpu")
    with OpRecorder(model) as ops:
        with forward_context(policy, "cpu"):
            loss = model(torch.randn(2, 4)).float().sum()
        loss.backward()

    products = {op.dtype for op in ops.events if ".mm." in op.op or ".addmm." in op.op}
    assert products == {policy.compute}
    casts = [op for op in ops.events if op.op == "aten._to_copy.default" and op.module == "0"]
    is_autocast = name in ("fp16", "bf16")
    assert bool(casts) == is_autocast
    if is_autocast:
        assert {s for op in casts for s in op.sources if s} >= {"0.weight", "0.bias"}


def test_rehearsed_rules_of_cuda_are_seen_as_they_execute() -> None:
    """Softmax takes fp32 under CUDA's lists, on a CPU as well."""
    policy = Policy(name="r", compute="bf16", autocast_rules="cuda")
    model = nn.Sequential(nn.Linear(4, 4), nn.Softmax(-1))
    with OpRecorder(model) as ops:
        with forward_context(policy, "cpu"):
            loss = model(torch.randn(2, 4)).square().sum()
        with backward_context(policy, "cpu"):
            loss.backward()

    dtypes = {op.op: op.dtype for op in ops.events}
    assert dtypes["aten.addmm.default"] == "bf16"
    assert dtypes["aten._softmax.default"] == "fp32"


def test_ranges_are_those_of_inputs_before_and_outputs_after() -> None:
    """Also of an operation in place, and of an input that is a view."""
    x = torch.tensor([[1.0, -2.0], [0.0, 4.0]])
    with OpRecorder(nn.Identity(), batch=x) as ops:
        y = x.t() * 3
        y.mul_(2)

    product, doubled = ops.events
    assert product.inputs == (measure(x.t()),)
    assert product.outputs == (measure(x.t() * 3),)
    assert doubled.inputs == product.outputs
    assert doubled.outputs == (measure(x.t() * 6),)
    assert (product.fed_by, product.sources) == ((-1,), ("batch",))
    assert (doubled.fed_by, doubled.sources) == ((0,), ("",))


def test_what_is_no_computation_is_no_event() -> None:
    """Views, new memory without values, whole numbers, comparisons."""
    with OpRecorder(nn.Identity()) as ops:
        x = torch.empty(4, 4)
        x.view(16)[2:].unsqueeze(0).detach()
        torch.arange(4) + 1
        torch.zeros(3, dtype=torch.bool) | True
        x[0].isnan()

    assert ops.events == ()


def test_empty_sparse_complex_and_lists_are_followed() -> None:
    """Every layout and kind of number that a step may hold."""
    model = nn.Embedding(5, 3, sparse=True)
    with OpRecorder(model) as ops:
        rows = model(torch.tensor([0, 2]))
        turned = torch.view_as_real(torch.view_as_complex(rows.view(3, 2)) * 1j)
        joined = torch.cat([turned.flatten(), torch.zeros(0)])
        joined.sum().backward()
        assert model.weight.grad is not None
        ops.mark(model.weight.grad, "weight")

    by_name = {op.op: op for op in ops.events if op.phase == "forward"}
    assert by_name["aten.mul.Tensor"].dtype == "complex64"
    assert by_name["aten.cat.default"].fed_by[0] == by_name["aten.mul.Tensor"].index
    assert by_name["aten.cat.default"].inputs[1].numel == 0
    assert [op.op for op in ops.events if "weight" in op.results] != []


def test_of_several_writers_the_one_that_broke_it_is_named() -> None:
    """A tensor that is filled piece by piece has many writers."""
    with OpRecorder(nn.Identity()) as ops:
        total = torch.zeros(3)
        for place, value in enumerate((1.0, 0.0, 2.0)):
            total[place] = torch.tensor(value).reciprocal()
        total.sum()

    broken = [op for op in ops.events if op.outputs and not op.outputs[0].is_finite]
    assert [op.op for op in broken[:2]] == ["aten.reciprocal.default", "aten.copy_.default"]
    last = ops.events[-1]
    assert last.op == "aten.sum.default"
    assert last.fed_by == (broken[1].index,)


@pytest.mark.parametrize("ranges", ["all", "suspects", "none"])
def test_ranges_are_counted_where_asked(ranges: str) -> None:
    """``suspects``: only operations whose result is not finite, with their inputs."""
    with OpRecorder(nn.Identity(), ranges=ranges) as ops:  # type: ignore[arg-type]
        x = torch.ones(2).log()
        y = x.reciprocal()
        y.mul_(2)

    counted = [bool(op.outputs) for op in ops.events]
    assert (
        counted[-3:]
        == {
            "all": [True, True, True],
            "suspects": [False, True, True],
            "none": [False, False, False],
        }[ranges]
    )
    if ranges == "suspects":
        assert ops.events[-1].inputs[0].infs == 2
        assert [op.inputs for op in ops.events[:-2]] == [()] * (len(ops.events) - 2)


def test_no_tensor_is_kept_alive() -> None:
    """Activations die when autograd lets go of them, recorder or not."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    with OpRecorder(model, errors=True) as ops:
        hidden = model(torch.randn(2, 4))
        storage = weakref.ref(hidden.untyped_storage())
        hidden.sum().backward()
        del hidden
        gc.collect()

        assert storage() is None
    assert ops.events


def test_recording_changes_no_bit() -> None:
    """Loss and gradients under the recorder are those without it, dropout included."""
    engine = engine_of("bf16")
    results = []
    for watch in (False, True):
        torch.manual_seed(3)
        engine.model.zero_grad()
        ops = OpRecorder(engine.model, errors=True) if watch else torch.no_grad()
        if watch:
            ops.__enter__()
        with forward_context(engine.policy, "cpu"):
            loss = compute_loss(engine.model, batch())
        loss.backward()
        if watch:
            ops.__exit__(None, None, None)
        results.append([loss, *(p.grad for p in engine.model.parameters())])

    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_events_travel_as_json() -> None:
    """Also constants and errors that are infinite."""
    with OpRecorder(nn.Identity(), errors=True) as ops:
        torch.ones(2, dtype=torch.float16) * 1e9

    assert ops.events[-1].local_error == math.inf
    assert ops.events[-1].constants[0].becomes == math.inf
    for op in ops.events:
        assert loads(ExecutedOp, dumps(op)) == op


def test_misuse_is_refused() -> None:
    """An unknown choice, and a recorder that has been used."""
    with pytest.raises(UnknownName, match="choice of ranges 'most'"):
        OpRecorder(nn.Identity(), ranges="most")  # type: ignore[arg-type]
    recorder = OpRecorder(nn.Identity())
    with recorder:
        torch.ones(2) + 1
    with pytest.raises(UsageError, match="entered a second time"), recorder:
        pass


def test_hooks_are_gone_afterwards() -> None:
    """Nothing of the recorder stays in torch."""
    hooks = torch.nn.modules.module
    before = len(hooks._global_forward_hooks), len(hooks._global_forward_pre_hooks)
    model = Net()
    with OpRecorder(model) as ops:
        F.relu(model(batch()[0]))

    assert (len(hooks._global_forward_hooks), len(hooks._global_forward_pre_hooks)) == before
    count = len(ops.events)
    model(batch()[0])
    assert len(ops.events) == count
