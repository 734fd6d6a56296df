"""What a tensor holds, against numpy counting one element at a time."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch
from torch import Tensor

from narrowcast.errors import UsageError
from narrowcast.precision.cast import format_name
from narrowcast.ranges import histogram
from narrowcast.ranges.histogram import count, measure, measure_all, read
from narrowcast.records.ranges import TensorRange

SIXTEEN = (torch.float16, torch.bfloat16)
EIGHT = (torch.float8_e4m3fn, torch.float8_e5m2)
FLOATS = (torch.float32, torch.float64, *SIXTEEN, *EIGHT)


def every_number(dtype: torch.dtype) -> Tensor:
    """Return all bit patterns of a format of 16 or 8 bits."""
    bits = 8 * dtype.itemsize
    integer = torch.int16 if bits == 16 else torch.int8
    return torch.arange(-(1 << (bits - 1)), 1 << (bits - 1)).to(integer).view(dtype)


def extremes(dtype: torch.dtype) -> Tensor:
    """Return zeros of both signs, limits, subnormals, powers of two and what is not finite."""
    limits = torch.finfo(dtype)
    smallest = limits.smallest_normal * limits.eps
    numbers = [0.0, -0.0, 1.0, -2.0, 0.5, math.nan, limits.max, limits.min, limits.smallest_normal]
    numbers += [limits.smallest_normal * (1 - limits.eps), smallest, -3 * smallest]
    if dtype is not torch.float8_e4m3fn:
        numbers += [math.inf, -math.inf]
    return torch.tensor(numbers, dtype=torch.float64).to(dtype)


def oracle(tensor: Tensor) -> TensorRange:
    """Count one element at a time, in Python floats."""
    numbers = [abs(float(x)) for x in tensor.detach().to(torch.float64).flatten()]
    finite = [x for x in numbers if math.isfinite(x)]
    some = [x for x in finite if x]
    by_exponent = Counter(math.frexp(x)[1] - 1 for x in some)
    lowest, highest = (min(by_exponent), max(by_exponent)) if some else (0, -1)
    scale = max(some, default=1.0)
    return TensorRange(
        dtype=format_name(tensor.dtype),
        shape=tuple(tensor.shape),
        numel=len(numbers),
        zeros=len(finite) - len(some),
        nans=sum(map(math.isnan, numbers)),
        infs=sum(map(math.isinf, numbers)),
        amax=max(some, default=0.0),
        amin=min(some, default=0.0),
        rms=scale * math.sqrt(math.fsum((x / scale) ** 2 for x in finite) / len(finite))
        if finite
        else 0.0,
        lowest_exponent=lowest,
        exponent_counts=tuple(by_exponent[e] for e in range(lowest, highest + 1)),
    )


def counted_unread(tensor: Tensor) -> TensorRange:
    """Measure in the way of a device that must not be asked, here on the CPU."""
    bits = histogram._bits_for(tensor.dtype)
    parts = histogram._parts(tensor.detach(), 1000)
    row = histogram._counted_unread(parts, bits, tensor.device)
    return read([histogram.Counted(tensor.dtype, tuple(tensor.shape), row)])[0]


def assert_same(found: TensorRange, expected: TensorRange) -> None:
    """Equal in all but the last bits of rms, a square root of a sum in fp64."""
    # Summation of n squares in any order: n / 2 ulps of fp64 at most, then halved by the root.
    tolerance = max(expected.numel, 4) * 2.0**-53 * expected.rms
    assert found.rms == pytest.approx(expected.rms, abs=tolerance, rel=0)
    assert vars(found) | {"rms": 0} == vars(expected) | {"rms": 0}


@pytest.mark.parametrize("dtype", [*SIXTEEN, *EIGHT], ids=str)
def test_every_bit_pattern_of_a_narrow_format_is_counted_where_it_belongs(
    dtype: torch.dtype,
) -> None:
    """Zeros, subnormals, normals, infinities and NaN of all patterns, in both ways of counting."""
    numbers = every_number(dtype)

    expected = oracle(numbers)
    assert_same(measure(numbers), expected)
    assert_same(counted_unread(numbers), expected)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("times", [1, 700])
def test_limits_of_a_format_are_counted_where_they_belong(dtype: torch.dtype, times: int) -> None:
    """Signed zeros, largest, smallest normal and subnormal numbers, NaN and infinities."""
    numbers = extremes(dtype).repeat(times)
    if dtype is torch.float64:  # whose largest number squared no format holds
        numbers = numbers[numbers.abs().nan_to_num() < 1e300]

    expected = oracle(numbers)
    assert_same(measure(numbers), expected)
    assert_same(counted_unread(numbers), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *SIXTEEN], ids=str)
@pytest.mark.parametrize(
    "shape",
    [(), (0,), (1,), (3, 0, 2), (255,), (256,), (257,), (4, 5, 6), (histogram._CHUNK_CPU + 1,)],
    ids=str,
)
def test_a_tensor_of_any_shape_gives_what_numpy_gives(
    dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    """Empty, of no dimension, and around the sizes of a block: shape and all counts are true."""
    tensor = (torch.randn(shape, dtype=torch.float64) * 1e-3).to(dtype)

    found = measure(tensor)
    magnitude = np.abs(tensor.double().numpy()).ravel()
    some = magnitude[magnitude > 0]
    exponents = np.frexp(some)[1] - 1
    lowest = exponents.min() if some.size else 0
    assert (found.shape, found.numel, found.dtype) == (shape, tensor.numel(), format_name(dtype))
    assert found.exponent_counts == tuple(np.bincount(exponents - lowest).tolist())
    assert found.lowest_exponent == lowest
    assert found.zeros == magnitude.size - some.size
    assert found.amax == (some.max() if some.size else 0)
    assert found.amin == (some.min() if some.size else 0)
    rms = np.sqrt(np.mean(magnitude**2)) if magnitude.size else 0
    assert found.rms == pytest.approx(rms, rel=max(4, tensor.numel()) * 2.0**-53)


def layouts() -> list[tuple[str, Tensor]]:
    base = torch.randn(6, 8, 10)
    return [
        ("transposed", base.transpose(0, 2)),
        ("strided", base[::2, 1::3]),
        ("expanded", base[:, :1, :].expand(6, 8, 10)),
        ("channels last", torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)),
        ("flipped view", base.flip(1)[1:]),
        ("requires grad", base.clone().requires_grad_()),
        ("a parameter", torch.nn.Parameter(base)),
    ]


@pytest.mark.parametrize(("name", "tensor"), layouts(), ids=[name for name, _ in layouts()])
def test_the_layout_in_memory_makes_no_difference(name: str, tensor: Tensor) -> None:
    """Views, gaps and repeated elements count as the elements that they show."""
    before = tensor.detach().clone()

    assert_same(measure(tensor), oracle(tensor))
    assert_same(counted_unread(tensor), oracle(tensor))
    assert torch.equal(before, tensor.detach())


def test_a_sparse_gradient_counts_as_the_dense_one() -> None:
    """Rows that are not stored are zeros, and rows that occur twice are added."""
    indices = torch.tensor([[1, 4, 1]])
    sparse = torch.sparse_coo_tensor(indices, torch.ones(3, 2), (6, 2), check_invariants=True)

    found = measure(sparse)
    assert_same(found, oracle(sparse.to_dense()))
    assert (found.zeros, found.numel) == (8, 12)


def test_many_tensors_are_read_in_their_order() -> None:
    """A batch of counts gives the records that single ones give, whatever their formats."""
    tensors = [torch.randn(n).to(d) for n, d in ((3, torch.float32), (0, torch.float16))]
    tensors += [torch.randn(5, dtype=torch.float64), torch.zeros(2, dtype=torch.bfloat16)]

    assert measure_all(tensors) == tuple(measure(tensor) for tensor in tensors)
    assert read([]) == ()


def test_counting_holds_nothing_of_the_tensor() -> None:
    """What is counted now can be read when the tensor has long been overwritten."""
    tensor = torch.ones(10)
    counted = count(tensor)
    tensor.fill_(torch.nan)

    assert read([counted])[0].zeros == 0
    assert read([counted])[0].amax == 1.0


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(3),
        torch.tensor([True]),
        torch.zeros(2, dtype=torch.complex64),
        torch.zeros(2, device="meta"),
        [1.0],
    ],
    ids=["whole", "bool", "complex", "meta", "list"],
)
def test_what_has_no_range_is_refused(tensor: object) -> None:
    """Whole and complex numbers, tensors without values, and what is no tensor."""
    with pytest.raises(UsageError, match="was to be measured") as caught:
        measure(tensor)  # type: ignore[arg-type]

    assert caught.value.hint


def test_counting_draws_no_random_numbers_and_needs_no_gradient() -> None:
    """Looking changes no stream, and no graph."""
    tensor = torch.randn(10, requires_grad=True) * 2
    state = torch.get_rng_state()

    measure(tensor)
    assert torch.equal(state, torch.get_rng_state())
