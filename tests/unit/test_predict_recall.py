"""What is recalled is what torch answers, operation by operation."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

from narrowcast.prediction import recall
from narrowcast.prediction.recall import Recall

aten = torch.ops.aten


class Recalling(TorchDispatchMode):
    """Every operation through a Recall; counts those that torch was asked for."""

    def __init__(self, mode: FakeTensorMode) -> None:
        super().__init__()
        self.recall = Recall(mode)
        self.asked = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:
            return args[0].device
        return self.recall.call(_Counted(func, self), args, kwargs or {})


class _Counted:
    """An operation that counts its calls, and is equal to itself as the operation is."""

    def __init__(self, func: Any, mode: Recalling) -> None:
        self.func, self.mode = func, mode
        self.namespace, self.tags = func.namespace, func.tags

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.mode.asked += 1
        return self.func(*args, **kwargs)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Counted) and other.func is self.func

    def __hash__(self) -> int:
        return hash(self.func)


@pytest.fixture(autouse=True)
def _forget() -> None:
    """Nothing is known when a test begins."""
    recall._ANSWERS.clear()


@pytest.fixture
def mode() -> FakeTensorMode:
    return FakeTensorMode(allow_non_fake_inputs=True)


def described(value: Any, arguments: list[Tensor]) -> Any:
    """Say all of a result that a ledger could tell, storages by the argument they belong to."""
    if not isinstance(value, Tensor):
        return value
    storages = [t.untyped_storage()._cdata for t in arguments if t.layout is torch.strided]
    own = value.untyped_storage()
    place = storages.index(own._cdata) if own._cdata in storages else None
    is_given = next((i for i, t in enumerate(arguments) if t is value), None)
    return (
        type(value), value.dtype, value.shape, value.stride(), value.storage_offset(),
        value.device, own.nbytes(), place, is_given,
    )  # fmt: skip


OPERATIONS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "sum": lambda x, y: x + y,
    "of another format": lambda x, y: x.to(torch.bfloat16) + y,
    "with a number": lambda x, y: x * 2,
    "with a fraction": lambda x, y: x.long() * 2.5,
    "in place": lambda x, y: x.add_(y),
    "transposed": lambda x, y: x.t(),
    "view": lambda x, y: x.view(-1),
    "reshape that copies": lambda x, y: x.t().reshape(-1),
    "slice": lambda x, y: x[1:, 2:],
    "step": lambda x, y: x[:, ::2],
    "expanded": lambda x, y: x[:1].expand(3, 6),
    "bits": lambda x, y: x.view(torch.int32),
    "product": lambda x, y: x @ y.t(),
    "product of a transposed": lambda x, y: x.t() @ y,
    "dimension": lambda x, y: x.sum(1),
    "whole": lambda x, y: x.sum(),
    "several": lambda x, y: x.split(2, 1),
    "of which one": lambda x, y: x.max(1),
    "norm": lambda x, y: torch.nn.functional.layer_norm(x, (6,)),
    "made": lambda x, y: torch.zeros(3, 4, dtype=torch.float16),
    "like": lambda x, y: torch.empty_like(x.t()),
    "foreach": lambda x, y: torch._foreach_add([x, y], 1.0),
    "foreach in place": lambda x, y: torch._foreach_add_([x, y], 1.0),
    "into another": lambda x, y: torch.add(x, 1, out=y),
    "into itself": lambda x, y: torch.add(x, y, out=y),
    "cast": lambda x, y: x.half(),
    "joined": lambda x, y: torch.cat([x, y]),
    "no element": lambda x, y: x[:0] + 1,
    "nothing": lambda x, y: torch.empty(0),
    "where": lambda x, y: torch.where(x > 0, x, 0.0),
    "picked": lambda x, y: x.gather(1, torch.zeros(3, 2, dtype=torch.long)),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_the_second_answer_is_the_first_and_torchs(name: str, mode: FakeTensorMode) -> None:
    """Format, size, stride, offset, storage and identity; and torch is not asked again."""
    operation = OPERATIONS[name]

    def answered() -> Any:
        x, y = torch.empty(3, 6), torch.empty(3, 6)
        flat, spec = tree_flatten(operation(x, y))
        return [described(value, [x, y]) for value in flat], spec

    with mode:
        expected = answered()
    recalling = Recalling(mode)
    with mode, recalling:
        first = answered()
        asked = recalling.asked
        second = answered()

    assert expected == first == second
    assert recalling.asked == asked


def test_arguments_that_are_one_tensor_are_told_from_two_that_are_alike(
    mode: FakeTensorMode,
) -> None:
    """`out=` may be an operand or a third tensor of the same size: each is returned itself."""
    with mode, Recalling(mode):
        x, y, z = (torch.empty(4) for _ in range(3))

        assert torch.add(x, y, out=y) is y
        assert torch.add(x, y, out=z) is z
        assert torch.add(x, y, out=x) is x
        assert torch.add(x, x, out=x) is x
        assert torch.add(x, y, out=z) is z


def test_a_tensor_that_is_resized_for_its_result_is_resized_every_time(
    mode: FakeTensorMode,
) -> None:
    """What changes its arguments is not remembered."""
    with mode, Recalling(mode):
        x = torch.ones(8)
        for _ in range(3):
            out = torch.empty(0)
            aten.add.out(x, x, out=out)

            assert out.shape == (8,)
            assert out.untyped_storage().nbytes() == 32


def test_numbers_that_reach_a_size_are_told_apart(mode: FakeTensorMode) -> None:
    """The dimension of a sum matters, the number that is added does not, its type does."""
    recalling = Recalling(mode)
    with mode, recalling:
        x = torch.ones(3, 6, dtype=torch.int64)
        assert (x.sum(0).shape, x.sum(1).shape) == ((6,), (3,))
        assert (x[1:].shape, x[2:].shape) == ((2, 6), (1, 6))
        x + 1
        asked = recalling.asked
        x + 2
        assert recalling.asked == asked
        assert [(x + 2.0).dtype, (x + 2).dtype] == [torch.float32, torch.int64]
        assert (x + True).dtype is torch.int64


def test_values_are_refused_as_ever(mode: FakeTensorMode) -> None:
    """Whatever is known already, an operation that needs values is passed on to torch."""
    with mode, Recalling(mode):
        x = torch.ones(3)
        for _ in range(2):
            with pytest.raises(DynamicOutputShapeException):
                x.nonzero()
            with pytest.raises(DataDependentOutputException):
                x.sum().item()


def test_the_default_format_is_part_of_the_question(mode: FakeTensorMode) -> None:
    """torch.zeros without a dtype is of the default one at the time."""
    with mode, Recalling(mode):
        found = [torch.zeros(2).dtype]
        torch.set_default_dtype(torch.float64)
        try:
            found.append(torch.zeros(2).dtype)
        finally:
            torch.set_default_dtype(torch.float32)

    assert found == [torch.float32, torch.float64]


def test_answers_serve_another_mode_with_tensors_of_its_own(mode: FakeTensorMode) -> None:
    """They are of the process; tensors are of a mode, and none of another is taken or given."""
    other = FakeTensorMode()
    with mode, Recalling(mode):
        strange = torch.ones(3) * 2
    recalling = Recalling(other)
    with other, recalling:
        own = torch.ones(3) * 2

    assert isinstance(own, FakeTensor)
    assert (own.fake_mode, strange.fake_mode) == (other, mode)


def test_what_is_remembered_is_bounded(
    mode: FakeTensorMode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that predicts for ever does not grow for ever."""
    monkeypatch.setattr(recall, "_MOST", 10)
    with mode, Recalling(mode):
        for size in range(1, 30):
            assert (torch.ones(size) + 1).shape == (size,)

    assert len(recall._ANSWERS) <= 10


class Compared(TorchDispatchMode):
    """Asks a Recall and torch for every operation that changes nothing, and compares."""

    def __init__(self, mode: FakeTensorMode) -> None:
        super().__init__()
        self.recall = Recall(mode)
        self.compared = 0
        self.differing: list[tuple[Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:
            return args[0].device
        kwargs = kwargs or {}
        result = self.recall.call(func, args, kwargs)
        arguments = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)]
        tensors = [*arguments, *(t for t in tree_flatten(result)[0] if isinstance(t, Tensor))]
        if not func._schema.is_mutable and all(t.layout is torch.strided for t in tensors):
            again = func(*args, **kwargs)
            found, expected = (
                [described(value, arguments) for value in tree_flatten(one)[0]]
                for one in (result, again)
            )
            self.compared += 1
            if found != expected:
                self.differing.append((func, found, expected))
        return result


@pytest.fixture
def samples() -> list[Any]:
    """torch's own operators. Importing them freezes torch.backends' switches, which is undone."""
    from torch.testing._internal.common_methods_invocations import op_db

    torch.backends.flags_frozen.__globals__["__allow_nonbracketed_mutation_flag"] = True
    return list(op_db)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_every_operation_of_torchs_samples_is_recalled_as_it_is(samples: list[Any]) -> None:
    """The first sample of a third of torch's own operators, twice, every result against torch's.

    What needs values or has no meta kernel raises as it does without.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    comparing = Compared(mode)
    for op in samples[::3]:
        sample = next(iter(op.sample_inputs("cpu", torch.float32)), None)
        if torch.float32 not in op.supported_dtypes("cpu") or sample is None:
            continue
        call = (sample.input, sample.args, sample.kwargs)
        for _ in range(2):
            with mode, contextlib.suppress(Exception):
                fake = tree_map_only(Tensor, mode.from_tensor, call)
                with comparing:
                    op(fake[0], *fake[1], **fake[2])

    assert comparing.differing == []
    assert comparing.compared > 400
