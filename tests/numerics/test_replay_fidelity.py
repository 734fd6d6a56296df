"""What one operation lost by its format: its error, absorbed addends, collapsed numbers, constants.

Bounds: rounding to nearest errs by at most half a unit in the last place, eps / 2 of the result.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from narrowcast.records.diagnosis import ExecutedOp
from narrowcast.replay.recorder import OpRecorder

DTYPES = [torch.float16, torch.bfloat16]


def done(call: Callable[[], Any]) -> tuple[ExecutedOp, ...]:
    with OpRecorder(nn.Identity(), errors=True) as ops:
        call()
    return ops.events


def last(call: Callable[[], Any]) -> ExecutedOp:
    return done(call)[-1]


def rms(values: Tensor) -> float:
    return values.double().square().mean().sqrt().item()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 5), (64, 33)])
def test_the_error_of_a_product_is_that_against_fp32(dtype: torch.dtype, shape: Any) -> None:
    """Element by element, against the plain formula, on contiguous and transposed inputs."""
    a, b = torch.randn(shape).to(dtype).mT if len(shape) == 2 else torch.randn(shape).to(dtype), 3.3

    op = last(lambda: a * b)

    exact = a.float() * b
    assert op.local_error == pytest.approx(rms((a * b).float() - exact) / rms(exact), rel=1e-6)
    assert op.local_error <= torch.finfo(dtype).eps / 2


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "operation",
    [
        F.linear,
        lambda x, w: F.layer_norm(x, (16,)),
        lambda x, w: x.softmax(-1),
        lambda x, w: F.scaled_dot_product_attention(*[x[None, None]] * 3),
        lambda x, w: F.gelu(x),
        lambda x, w: x.sum(0),
        lambda x, w: torch.bmm(x[None], w[None]),
        lambda x, w: x.clone().add_(w[:8]),
    ],
)
def test_operations_on_sane_values_err_by_roundings_alone(
    dtype: torch.dtype, operation: Callable[[Tensor, Tensor], Tensor]
) -> None:
    """A handful of roundings: at most 4 eps, and never nothing at all."""
    x, w = torch.randn(8, 16).to(dtype), torch.randn(16, 16).to(dtype)

    errors = [op.local_error for op in done(lambda: operation(x, w))]

    assert all(error is not None for error in errors)
    assert 0 < max(e for e in errors if e is not None) <= 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "operation",
    [
        lambda x: x.clone(),
        lambda x: torch.cat([x, x]),
        lambda x: x.relu(),
        lambda x: x * 2,
        lambda x: x[torch.tensor([1, 0])],
    ],
)
def test_exact_operations_err_by_nothing(
    dtype: torch.dtype, operation: Callable[[Tensor], Tensor]
) -> None:
    """Moves, selections and products with powers of two round nothing."""
    x = torch.randn(8, 16).to(dtype)

    assert [op.local_error for op in done(lambda: operation(x))][-1] == 0.0


def test_backward_operations_are_judged_too() -> None:
    """The gradient of a linear layer in bf16 errs by a rounding."""
    linear = nn.Linear(16, 16).to(torch.bfloat16)
    x = torch.randn(8, 16).to(torch.bfloat16)

    events = done(lambda: linear(x).square().sum().backward())

    products = [op.local_error for op in events if op.op == "aten.mm.default"]
    assert products
    assert all(0 < e <= torch.finfo(torch.bfloat16).eps for e in products if e is not None)


def test_overflow_is_an_infinite_error_and_shared_infinities_are_none() -> None:
    """Where fp32 is finite and fp16 is not; an inf in both is no error."""
    x = torch.tensor([1.0, 300.0]).half()
    y = torch.tensor([1.0, 12.0]).half()
    both = torch.tensor([1.0, math.inf]).half()

    assert last(lambda: x * x).local_error == math.inf
    assert last(y.exp).local_error == math.inf
    assert last(x.exp).local_error < 1e-3  # exp(300) is infinite in fp32 too
    assert last(lambda: both * 2).local_error == 0.0


def test_random_operations_and_fp32_are_not_judged() -> None:
    """Dropout cannot be done twice; in fp32 there is nothing to lose."""
    x = torch.ones(64).bfloat16()
    wide = torch.ones(8)

    state = torch.get_rng_state()
    dropped = done(lambda: F.dropout(x, 0.5))
    torch.set_rng_state(state)
    F.dropout(x, 0.5)

    assert dropped[0].local_error is None
    assert last(lambda: wide * 3.3).local_error is None


def test_judging_draws_no_random_number() -> None:
    """The generator stands where it would stand without the recorder."""
    x = torch.ones(64).bfloat16()
    torch.manual_seed(1)
    plain = F.dropout(x) * 2, torch.rand(1)
    torch.manual_seed(1)
    with OpRecorder(nn.Identity(), errors=True):
        judged = F.dropout(x) * 2, torch.rand(1)

    assert torch.equal(plain[0], judged[0])
    assert torch.equal(plain[1], judged[1])


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("sign", [1, -1])
def test_absorbed_addends_are_counted(in_place: bool, sign: int) -> None:
    """In bf16 1 + 2^-9 is 1, and 1 + 2^-7 is not; zeros are no addends; either side may be it."""
    total = torch.tensor([1.0, 1.0, 1.0, 2.0**-9, 1.0]).bfloat16()
    addend = torch.tensor([2.0**-9, 2.0**-7, 0.0, 1.0, 2.0**-7]).bfloat16()

    def add() -> None:
        if in_place:
            total.clone().add_(addend, alpha=sign)
        else:
            torch.add(total, addend, alpha=sign)

    assert last(add).absorbed == 0.5  # 2 of the 4 that are not zero


def test_absorption_is_looked_for_in_16_bit_sums_of_two_tensors_alone() -> None:
    """Not in eps, which is meant to be small, nor in fp32 results."""
    x = torch.ones(4).bfloat16()

    assert last(lambda: x + 1e-6).absorbed is None
    assert last(lambda: x + torch.ones(4)).absorbed is None
    assert last(lambda: x * x).absorbed is None
    assert last(lambda: x - torch.zeros(4).bfloat16()).absorbed is None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0,), (1,), (5,), (3, 4)])
@pytest.mark.parametrize("form", ["lerp_", "lerp", "lerp of a weight tensor", "copy_"])
def test_averages_that_stand_still_are_counted(
    form: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    """From 1 towards 2 by less than a quarter of the spacing at 1; by all of it they arrive."""
    mean, goal = torch.ones(shape, dtype=dtype), torch.full(shape, 2.0, dtype=dtype)
    small = torch.finfo(dtype).eps / 8

    def move(weight: float) -> ExecutedOp:
        if form == "lerp_":
            return last(lambda: mean.clone().lerp_(goal, weight))
        if form == "lerp":
            return last(lambda: torch.lerp(mean, goal, weight))
        if form == "copy_":
            return last(lambda: mean.clone().copy_(mean.float() + weight * (goal - mean).float()))
        return last(lambda: torch.lerp(mean, goal, torch.full(shape, weight, dtype=dtype)))

    numel = mean.numel()
    assert move(small).absorbed == (1.0 if numel else None)
    assert move(1.0).absorbed == (0.0 if numel else None)
    assert move(0.0).absorbed is None


def test_an_average_that_has_arrived_has_nowhere_to_go() -> None:
    """Nearer than 8 eps a fast one counts as there, and nearer than one a slow one."""
    mean = torch.ones(4).bfloat16()

    near, nearest = mean * (1 + 2.0**-5), mean * (1 + 2.0**-7)

    assert last(lambda: torch.lerp(mean, near, 0.1)).absorbed is None
    assert last(lambda: torch.lerp(mean, near, torch.full((4,), 0.1).bfloat16())).absorbed is None
    assert last(lambda: torch.lerp(mean, near, 0.01)).absorbed == 1.0
    assert last(lambda: torch.lerp(mean, nearest, 0.01)).absorbed is None


def test_what_is_copied_in_the_same_or_fewer_bits_absorbs_nothing() -> None:
    """Rounding is where wider numbers are written over narrower ones."""
    mean = torch.ones(4).bfloat16()

    assert last(lambda: mean.clone().copy_(mean * 2)).absorbed is None
    assert last(lambda: torch.ones(4).copy_(mean)).absorbed is None
    assert last(lambda: mean.clone().copy_(torch.arange(4))).absorbed is None


@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers_beside_a_constant_of_which_nothing_is_left_are_swallowed(
    dtype: torch.dtype,
) -> None:
    """Zeros are none of them; a constant beside large numbers is no matter."""
    small = torch.tensor([0.0, 1.0, 1.0, 8.0], dtype=dtype) * torch.finfo(dtype).eps / 8

    for call in (lambda: 1 - small, lambda: 1 + small, lambda: small + 1, lambda: small - 1):
        assert last(call).swallowed == pytest.approx(2 / 3)
    assert last(lambda: small.clone().add_(1)).swallowed == pytest.approx(2 / 3)
    assert last(lambda: torch.ones(3, dtype=dtype) + 1e-6).swallowed == 0.0
    assert last(lambda: small.float() + 1).swallowed is None
    assert last(lambda: small + small).swallowed is None
    assert last(lambda: torch.zeros(3, dtype=dtype) + 1).swallowed is None


def test_what_stands_in_the_place_of_a_buffer_says_whose() -> None:
    """A new tensor; what is written in place has the buffer among its sources already."""
    model = nn.Module()
    model.register_buffer("mean", torch.ones(3))
    model.register_buffer("still", torch.ones(3))
    model.frozen = nn.Parameter(torch.ones(3), requires_grad=False)
    with OpRecorder(model) as ops:
        model.mean = model.mean * 0.5 + 1.0
        model.frozen.data = model.frozen.data * 2
        model.still.mul_(3)
        ops.kept()

    assert [op.keeps for op in ops.events] == ["", "mean", "frozen", ""]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_running_sum_in_16_bits_stops_at_its_last_whole_number(dtype: torch.dtype) -> None:
    """Beyond 2^(mantissa + 1) each second sum of ones equals the one before."""
    limit = {torch.float16: 2048, torch.bfloat16: 256}[dtype]
    ones = torch.ones(2 * limit, dtype=dtype)

    op = last(lambda: ones.cumsum(0))

    assert op.absorbed == pytest.approx(0.25, abs=0.01)  # half of the second half
    assert last(lambda: ones[:limit].cumsum(0)).absorbed == 0.0
    assert last(lambda: ones[:1].cumsum(0)).absorbed is None


@pytest.mark.parametrize("dtype", DTYPES)
def test_whole_numbers_collapse_beyond_the_mantissa(dtype: torch.dtype) -> None:
    """Positions up to 2^(mantissa + 1) stay distinct; twice as many lose a quarter of them."""
    limit = {torch.float16: 2048, torch.bfloat16: 256}[dtype]

    for wide in (torch.float32, torch.float64, torch.int64):
        few, many = torch.arange(limit + 1, dtype=wide), torch.arange(2 * limit, dtype=wide)
        assert last(lambda x=few: x.to(dtype)).collapsed == 0.0  # type: ignore[misc]
        collapsed = last(lambda x=many: x.to(dtype)).collapsed  # type: ignore[misc]
        assert collapsed == pytest.approx(0.25, abs=0.01)
        target = torch.zeros(2 * limit, dtype=dtype)
        copied = last(lambda x=many, y=target: y.copy_(x))  # type: ignore[misc]
        assert copied.collapsed == collapsed
    made = last(lambda: torch.arange(2 * limit, dtype=dtype))
    assert made.collapsed == pytest.approx(0.25, abs=0.01)


def test_other_casts_collapse_nothing() -> None:
    """Fractions, masks, mask values, NaN, huge numbers that are whole by necessity, empty ones."""
    for x in (torch.randn(99) * 1e4, torch.tensor([1e9, 1e9 + 64]), torch.tensor([math.nan, 1.0])):
        assert last(lambda x=x: x.bfloat16()).collapsed is None  # type: ignore[misc]
    for x in (torch.tensor([0.0, 1.0]), torch.tensor([0.0, -1e6, 1e6])):
        assert last(lambda x=x: x.bfloat16()).collapsed == 0.0  # type: ignore[misc]
    assert last(lambda: torch.zeros(0).bfloat16()).collapsed is None
    assert last(lambda: torch.ones(3, dtype=torch.bool).bfloat16()).collapsed is None
    assert last(lambda: torch.arange(9999.0).bfloat16().float()).collapsed is None


@pytest.mark.parametrize(
    ("call", "value", "becomes"),
    [
        (lambda x: x + 1e-8, 1e-8, 0.0),
        (lambda x: x.clamp(min=1e-8), 1e-8, 0.0),
        (lambda x: x * -1e9, -1e9, -math.inf),
        (lambda x: torch.add(x, torch.tensor(1e-8)), 1e-8, 0.0),
        (lambda x: x.sub_(100_000), 100_000.0, math.inf),
    ],
)
def test_constants_that_fp16_does_not_hold_are_listed(
    call: Callable[[Tensor], Tensor], value: float, becomes: float
) -> None:
    """eps that is 0, mask values that are infinite."""
    (op,) = [op for op in done(lambda: call(torch.ones(3).half())) if op.constants]

    assert op.constants[0].value == pytest.approx(value)
    assert op.constants[0].becomes == becomes


@pytest.mark.parametrize(
    "call",
    [
        lambda x: x + 1e-7,  # a subnormal number
        lambda x: x * 0.0,
        lambda x: torch.add(x, x, alpha=1e-9),
        lambda x: F.layer_norm(x, (3,), eps=1e-12),  # the kernel holds it in fp32
        lambda x: x.masked_fill(x > 0, -math.inf),
        lambda x: x.float() + 1e-8,
        lambda x: x + (x.float().mean() * 1e-9),  # computed, so no constant
    ],
)
def test_constants_that_it_holds_or_never_gets_are_not(call: Callable[[Tensor], Tensor]) -> None:
    """What is kept in fp32 by the kernel, or meant to be infinite."""
    events = done(lambda: call(torch.ones(3).half()))

    assert [op.constants for op in events if op.dtype == "fp16" and op.constants] == []


def test_a_number_that_is_infinite_on_purpose_is_marked() -> None:
    """So a mask is told from an overflow."""
    x = torch.ones(3).half()

    assert last(lambda: x.masked_fill(x > 0, -math.inf)).infinite_constant
    assert last(lambda: torch.full((2,), math.inf)).infinite_constant
    assert not last(lambda: x.masked_fill(x > 0, -1e4)).infinite_constant
