"""Counts what a tensor holds, by exponent, in a pass that any what-if can be answered from later.

A float read as an integer, without its sign, is ordered as its magnitude is, and its exponent is
its upper bits. So everything is counted in integers, exactly, whatever a device does to subnormal
numbers in arithmetic:

    fp32   | eeeeeeee mmmmmmmmmmmmmmmmmmmmmmm     0 < e < 255   floor(log2 |x|) = e - 127
             00000000 00000000000000000000000     zero
             00000000 000001mmmmmmmmmmmmmmmmm     subnormal: the place of its first bit
             11111111 00000000000000000000000     infinity, NaN above it

16-bit and 8-bit formats are widened to fp32 first, which is exact.

On a CPU the upper bits are counted. Elsewhere
the integers are sorted and the borders looked up: no element decides what runs next, so nothing
waits for the device until `read` does, once for as many tensors as it is given.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from narrowcast.errors import UsageError
from narrowcast.formats import FORMATS, FloatFormat
from narrowcast.precision.cast import format_name
from narrowcast.records.ranges import TensorRange

__all__ = ["Counted", "count", "measure", "measure_all", "read"]

# Elements that are counted at once: temporaries of 1 MiB on a CPU, and enough to fill a GPU.
_CHUNK_CPU = 1 << 18
_CHUNK = 1 << 22


@dataclass(frozen=True)
class _Bits:
    """How a format's numbers look as integers without their sign."""

    format: FloatFormat
    dtype: torch.dtype
    integer: torch.dtype

    @property
    def top(self) -> int:
        """The upper bits of infinity and NaN."""
        return (1 << self.format.exponent_bits) - 1

    @property
    def infinity(self) -> int:
        return self.top << self.format.mantissa_bits

    @property
    def unsigned(self) -> int:
        """The largest integer, and the mask that takes a sign away."""
        return torch.iinfo(self.integer).max

    @property
    def lowest_exponent(self) -> int:
        """Of the smallest subnormal number."""
        return self.format.min_exponent - self.format.mantissa_bits

    @property
    def borders(self) -> list[int]:
        """The smallest integer of each kind: of each exponent, of infinity, of NaN."""
        mantissa = self.format.mantissa_bits
        subnormal = [1 << place for place in range(mantissa)]
        normal = [field << mantissa for field in range(1, self.top)]
        return [*subnormal, *normal, self.infinity, self.infinity + 1]


_FP32_BITS = _Bits(FORMATS["fp32"], torch.float32, torch.int32)
_FP64_BITS = _Bits(
    FloatFormat(name="float64", exponent_bits=11, mantissa_bits=52, storage_bytes=8),
    torch.float64,
    torch.int64,
)


def _bits_for(dtype: torch.dtype) -> _Bits:
    return _FP64_BITS if dtype is torch.float64 else _FP32_BITS


@dataclass(frozen=True, eq=False)
class Counted:
    """A tensor that has been counted, perhaps on a device that has not been asked yet."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    tally: _Tally | Tensor
    """On a device, fp64: zeros, each exponent, infinities, NaN; largest, smallest, squares."""


def measure(tensor: Tensor) -> TensorRange:
    """Return what a floating-point tensor holds, exactly; reads the device once.

    Raises UsageError for a tensor of whole or complex numbers.
    """
    return read([count(tensor)])[0]


def measure_all(tensors: Iterable[Tensor]) -> tuple[TensorRange, ...]:
    """Return what each tensor holds; reads each device once."""
    return read([count(tensor) for tensor in tensors])


@torch.no_grad()
def count(tensor: Tensor) -> Counted:
    """Count a tensor, of any floating dtype and layout in memory, without reading a device.

    A sparse tensor counts as the dense one that it stands for. Holds nothing of the tensor.
    """
    _require_real(tensor)
    bits = _bits_for(tensor.dtype)
    values = tensor.detach()
    absent = 0
    if values.layout is torch.sparse_coo:
        values = values.coalesce().values()
        absent = tensor.numel() - values.numel()
    tally: _Tally | Tensor
    if values.device.type == "cpu":
        tally = _Tally(bits, absent)
        for part in _parts(values, _CHUNK_CPU):
            tally.add(part.to(bits.dtype))
    else:
        tally = _counted_unread(_parts(values, _CHUNK), bits, values.device)
        tally[0] += absent
    return Counted(tensor.dtype, tuple(tensor.shape), tally)


def read(counted: Sequence[Counted]) -> tuple[TensorRange, ...]:
    """Turn counts into records, in their order; waits for each device once."""
    by_device: dict[torch.device, list[Tensor]] = {}
    for one in counted:
        if isinstance(one.tally, Tensor):
            by_device.setdefault(one.tally.device, []).append(one.tally)
    rows = {}
    for tallies in by_device.values():
        numbers = torch.split(torch.cat(tallies).cpu(), [tally.numel() for tally in tallies])
        rows.update({id(tally): row.tolist() for tally, row in zip(tallies, numbers, strict=True)})
    return tuple(
        _record(one, rows[id(one.tally)] if isinstance(one.tally, Tensor) else one.tally.row())
        for one in counted
    )


def _require_real(tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise UsageError(
            f"a {type(tensor).__name__} was to be measured", hint="pass a torch.Tensor"
        )
    if not tensor.is_floating_point():
        raise UsageError(
            f"a tensor of {format_name(tensor.dtype)} and shape {tuple(tensor.shape)} was to be "
            "measured",
            hint="only floating-point numbers have a range; measure .real and .imag of complex "
            "ones, and .float() of whole ones",
        )
    if tensor.layout not in (torch.strided, torch.sparse_coo) or tensor.is_meta:
        where = "on the meta device" if tensor.is_meta else f"of {tensor.layout}"
        raise UsageError(
            f"a tensor {where} was to be measured", hint="pass a dense tensor that has values"
        )


def _parts(values: Tensor, size: int) -> Iterator[Tensor]:
    """Yield the elements, in any order, in flat pieces; copies only where memory has gaps."""
    if not values.is_contiguous():
        order = sorted(range(values.dim()), key=values.stride, reverse=True)
        values = values.permute(order)
    flat = values.reshape(-1)
    if 0 < flat.numel() <= size:
        yield flat
    elif flat.numel():
        yield from torch.split(flat, size)


class _Tally:
    """Counts on the CPU, where asking costs nothing: what is rare is looked at where it occurs."""

    def __init__(self, bits: _Bits, zeros: int) -> None:
        self._bits = bits
        self._zeros = zeros
        self._nans = 0
        self._fields: Tensor | None = None
        """Elements by the upper bits of their integer."""
        self._subnormal: Tensor | None = None
        self._largest = 0
        self._smallest = bits.infinity
        self._squares = 0.0

    def add(self, values: Tensor) -> None:
        """Count flat elements of the widened dtype."""
        bits, mantissa = self._bits, self._bits.format.mantissa_bits
        magnitude = values.view(bits.integer) & bits.unsigned
        fields = torch.bincount(magnitude >> mantissa, minlength=bits.top + 1)
        zeros = values.numel() - int(torch.count_nonzero(magnitude))
        self._zeros += zeros
        self._fields = fields if self._fields is None else self._fields + fields
        if int(fields[0]) > zeros:
            few = magnitude[(magnitude < 1 << mantissa) & (magnitude > 0)]
            # Exact as floats, whose exponent is the place of the first bit.
            places = (few.to(values.dtype).view(bits.integer) >> mantissa) - bits.format.bias
            found = torch.bincount(places, minlength=mantissa)
            self._subnormal = found if self._subnormal is None else self._subnormal + found
        if int(fields[bits.top]):
            self._nans += int((magnitude > bits.infinity).sum())
            finite = magnitude < bits.infinity
            magnitude, values = magnitude[finite], values[finite]
        if zeros < magnitude.numel():
            self._largest = max(self._largest, int(magnitude.max()))
            # 0 - 1 without its sign is the largest integer, so that zeros come last.
            smallest = magnitude.sub_(1).bitwise_and_(bits.unsigned).min()
            self._smallest = min(self._smallest, int(smallest) + 1)
            self._squares += float(torch.linalg.vector_norm(values, dtype=torch.float64)) ** 2

    def row(self) -> list[float]:
        """Return the numbers in the order in which a device gives them."""
        bits = self._bits
        fields = _numbers(self._fields, bits.top + 1)
        subnormal = _numbers(self._subnormal, bits.format.mantissa_bits)
        ends = torch.tensor([self._largest, self._smallest], dtype=bits.integer)
        kinds = [self._zeros, *subnormal, *fields[1 : bits.top]]
        return [
            *kinds,
            fields[bits.top] - self._nans,
            self._nans,
            *ends.view(bits.dtype).tolist(),
            self._squares,
        ]


def _numbers(counts: Tensor | None, size: int) -> list[int]:
    return [0] * size if counts is None else counts.tolist()


def _counted_unread(parts: Iterable[Tensor], bits: _Bits, device: torch.device) -> Tensor:
    """Count on a device that must not be asked: sort, and look the borders up."""
    borders = _borders(bits, device)
    row = torch.zeros(borders.numel() + 4, dtype=torch.float64, device=device)
    row[-2] = torch.inf
    for part in parts:
        values = part.to(bits.dtype)
        ordered = (values.view(bits.integer) & bits.unsigned).sort().values
        below = torch.searchsorted(ordered, borders)
        ends = torch.full((1,), values.numel(), dtype=below.dtype, device=device)
        row[:-3] += torch.cat([below, ends]).diff(prepend=torch.zeros_like(ends))
        first, last = below[:1], below[-2:-1] - 1  # of the finite elements that are not zero
        at = torch.cat([last, first]).clamp(0, values.numel() - 1)
        extremes = ordered.gather(0, at).view(bits.dtype).double()
        is_any = first <= last
        row[-3:-2] = torch.maximum(row[-3:-2], torch.where(is_any, extremes[:1], 0))
        row[-2:-1] = torch.minimum(row[-2:-1], torch.where(is_any, extremes[1:], torch.inf))
        finite = torch.where(torch.isfinite(values), values, 0)
        row[-1] += torch.linalg.vector_norm(finite, dtype=torch.float64).square()
    return row


@cache
def _borders(bits: _Bits, device: torch.device) -> Tensor:
    return torch.tensor(bits.borders, dtype=bits.integer, device=device)


def _record(counted: Counted, row: list[float]) -> TensorRange:
    zeros, *exponents, infs, nans, largest, smallest, squares = row
    counts = [int(number) for number in exponents]
    nonempty = [place for place, number in enumerate(counts) if number]
    first, last = (nonempty[0], nonempty[-1]) if nonempty else (0, -1)
    finite = int(zeros) + sum(counts)
    return TensorRange(
        dtype=format_name(counted.dtype),
        shape=counted.shape,
        numel=finite + int(infs) + int(nans),
        zeros=int(zeros),
        nans=int(nans),
        infs=int(infs),
        amax=largest if nonempty else 0.0,
        amin=smallest if nonempty else 0.0,
        rms=(squares / finite) ** 0.5 if finite else 0.0,
        lowest_exponent=_bits_for(counted.dtype).lowest_exponent + first if nonempty else 0,
        exponent_counts=tuple(counts[first : last + 1]),
    )
