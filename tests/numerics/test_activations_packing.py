"""Facts about the formats of compressed activations: bytes, errors, and the mean."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from narrowcast.activations.layout import Layout
from narrowcast.activations.packing import GROUP, PACKINGS, packed_bytes, packed_signs, signs
from narrowcast.activations.rounding_stream import RoundingStream

FORMATS = ["int8", "e4m3"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [1, 7, 8, 9, GROUP - 1, GROUP, GROUP + 1, 2**15 - 1, 2**15, 2**15 + 1, 2**20 + 129]
STREAM = RoundingStream(0)


def restored(x: Tensor, name: str) -> Tensor:
    packing = PACKINGS[name]
    packed = packing.pack(x, STREAM.next(x.device))
    assert packed.dtype == torch.uint8
    assert packed.nbytes == packing.nbytes(x.numel())
    return packing.unpack(packed, x.numel(), x.dtype)


def steps(x: Tensor, name: str) -> Tensor:
    """Return the distance of neighbouring values of the format at each number, in fp64.

    The slow and obvious way: a scale by comparison for each group, a step by the logarithm.
    """
    largest = {"int8": 127.0, "e4m3": 448.0}[name]
    least = 2.0**-24 if x.dtype == torch.float16 else 2.0**-126
    result = torch.empty(x.numel(), dtype=torch.float64)
    for start in range(0, x.numel(), GROUP):
        group = x[start : start + GROUP].double().abs()
        scale = least
        while group.max().item() > largest * scale:
            scale *= 2
        if name == "int8":
            result[start : start + GROUP] = scale
        else:
            exponent = (group / scale).log2().floor().clamp(min=-6)
            result[start : start + GROUP] = scale * torch.exp2(exponent - 3)
    return result


def numbers(size: int, dtype: torch.dtype, *, spread: float = 2.0) -> Tensor:
    """Normal numbers whose size differs from group to group by `spread` powers of ten."""
    groups = torch.arange(size) // GROUP
    magnitudes = 10.0 ** (spread * torch.rand(int(groups[-1]) + 1) - spread / 2)
    return (torch.randn(size) * magnitudes[groups]).to(dtype)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FORMATS)
def test_a_number_comes_back_within_a_step(name: str, dtype: torch.dtype, size: int) -> None:
    """In its own dtype and shape, less than one step away, and zeros as zeros."""
    x = numbers(size, dtype)
    x[::3] = 0
    got = restored(x, name)

    assert (got.dtype, got.shape, got.device) == (dtype, x.shape, x.device)
    if size < 2**17:  # the reference goes group by group
        assert bool(((got.double() - x.double()).abs() < steps(x, name)).all())
    assert torch.equal(got[::3], torch.zeros_like(got[::3]))


@pytest.mark.parametrize("name", FORMATS)
def test_nothing_is_left_of_nothing(name: str) -> None:
    """An empty tensor is packed into no bytes and comes back empty."""
    got = restored(torch.empty(0, dtype=torch.bfloat16), name)

    assert (got.shape, got.dtype) == ((0,), torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FORMATS)
def test_what_the_format_holds_comes_back_exactly(name: str, dtype: torch.dtype) -> None:
    """Codes times a power of two are numbers of every dtype: restoring rounds nothing."""
    if name == "int8":
        codes = torch.arange(-127, 128).float()
    else:
        every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
        codes = every[every.isfinite()]
    largest = codes.abs().max().item()
    rest = torch.nn.functional.pad(codes, (0, -len(codes) % (GROUP - 1))).view(-1, GROUP - 1)
    # Each group holds the largest code, so that its scale is known.
    values = torch.nn.functional.pad(rest, (1, 0), value=largest)
    # e4m3 spans 2**-9 to 448; times 2**-8 its smallest is a subnormal of fp16 that fp16 holds.
    x = (values * 2.0**-8).flatten().to(dtype)

    assert torch.equal(x, restored(x, name))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FORMATS)
def test_extremes_of_a_dtype_come_back_within_a_step(name: str, dtype: torch.dtype) -> None:
    """The largest, the least normal and the least subnormal number, each in a group of its own."""
    info = torch.finfo(dtype)
    for value in (info.max, -info.max, info.tiny, info.smallest_normal / 4):
        x = torch.full((GROUP,), value, dtype=dtype)
        got = restored(x, name)

        assert bool(got.isfinite().all())
        assert bool(((got.double() - x.double()).abs() < steps(x, name)).all())


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FORMATS)
def test_a_group_that_broke_is_nan_and_its_neighbours_are_not(
    name: str, dtype: torch.dtype, bad: float
) -> None:
    """A non-finite number is never hidden: the whole group is NaN."""
    x = torch.ones(3 * GROUP, dtype=dtype)
    x[GROUP + 5] = bad
    got = restored(x, name)

    assert bool(got[GROUP : 2 * GROUP].isnan().all())
    assert torch.equal(got[:GROUP], x[:GROUP])
    assert torch.equal(got[2 * GROUP :], x[2 * GROUP :])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FORMATS)
def test_rounding_is_right_in_the_mean(name: str, dtype: torch.dtype) -> None:
    """Over 4,096 roundings the mean of each of 512 numbers is its value, within 6 standard errors.

    The variance of one rounding is p (1 - p) step^2, at most a quarter of step^2. A mean of 4,096
    is off by more than 6 deviations with a probability of about 2e-9, times 512 numbers: 1e-6 a
    test. Round-to-nearest, or restoring to bf16 with a scale that is no power of two, would be off
    by up to 0.5 and 0.25 steps; 6 standard errors are 0.047 steps.
    """
    x = numbers(512, dtype)
    trials = 4096
    total = torch.zeros(512, dtype=torch.float64)
    for _ in range(trials):
        total += restored(x, name).double()
    step = steps(x, name)
    bound = 6 * 0.5 * step / math.sqrt(trials) + 2**-24 * step

    assert bool(((total / trials - x.double()).abs() <= bound).all())


@pytest.mark.parametrize("name", FORMATS)
def test_a_number_is_rounded_afresh_each_time(name: str) -> None:
    """Two roundings of one tensor differ in about 2 p (1 - p) of its numbers, and not in none."""
    x = torch.randn(GROUP * 64)

    assert not torch.equal(restored(x, name), restored(x, name))


def test_a_stream_repeats_from_its_state_and_leaves_the_global_one_alone() -> None:
    """Two integers say what comes next; torch's own generator is neither read nor moved."""
    stream = RoundingStream(3)
    before = torch.get_rng_state()
    first = [stream.next(torch.device("cpu")).initial_seed() for _ in range(5)]
    other = RoundingStream(0)
    other.load_state_dict({"seed": 3, "drawn": 2})
    again = [other.next(torch.device("cpu")).initial_seed() for _ in range(3)]

    assert first[2:] == again
    assert len(set(first)) == 5
    assert stream.state_dict() == other.state_dict() == {"seed": 3, "drawn": 5}
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("size", [0, *SIZES])
@pytest.mark.parametrize("dtype", DTYPES)
def test_signs_are_what_the_backward_of_relu_reads(dtype: torch.dtype, size: int) -> None:
    """One bit an element; 1 where the number is not <= 0, also for NaN, and 0 elsewhere."""
    x = torch.randn(size).to(dtype)
    x[::5], x[1::7] = 0, torch.nan
    x[2::7] = -0.0
    bits = packed_signs(x)
    got = signs(bits, size, dtype)

    assert bits.nbytes == packed_bytes(size) == math.ceil(size / 8)
    assert (got.dtype, got.shape) == (dtype, x.shape)
    assert torch.equal(got, (~(x <= 0)).to(dtype))


@pytest.mark.parametrize(
    "make",
    [
        lambda x: x,
        lambda x: x.transpose(0, 2),
        lambda x: x.permute(3, 1, 0, 2),
        lambda x: x.to(memory_format=torch.channels_last),
        lambda x: x[1:, :, ::2],
        lambda x: x[:, 2:3],
        lambda x: x.chunk(2, dim=-1)[1].transpose(1, 2),
        lambda x: x[:, :, :1, :1],
    ],
    ids=["plain", "transposed", "permuted", "channels last", "slice", "one", "chunk", "ones"],
)
def test_a_layout_gives_back_the_tensor_in_the_order_of_its_memory(make: object) -> None:
    """Values and shape are the same; strides too where the tensor covers its memory."""
    tensor = make(torch.randn(4, 6, 8, 10))  # type: ignore[operator]
    layout = Layout.of(tensor)
    flat = layout.flat(tensor)
    got = layout.tensor(flat.clone())
    is_view = flat.untyped_storage()._cdata == tensor.untyped_storage()._cdata

    assert torch.equal(got, tensor)
    if is_view and 1 not in tensor.shape:
        assert got.stride() == tensor.stride()
