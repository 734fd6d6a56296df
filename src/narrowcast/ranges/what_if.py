"""What a format would make of values that were counted once: zeros, subnormals, infinities.

An element becomes zero, subnormal or infinite by where it lies relative to a limit of the format,
and the histogram knows how many elements lie in each power of two. With a scale the limits move
instead of the elements.

Exact, for any scale: all elements but those in the one power of two [2^e, 2^(e+1)) that a limit
lies in, and all of these too where the largest or the smallest element settles it. Shared out
evenly otherwise, over the numbers that the tensor's own format has there: an estimate, and exact
again where the format has only one, as for the smallest fp16 number. Limits are those of rounding
to nearest, ties to even, at powers of two of scale: half the smallest subnormal number, and the
largest number and half a step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from narrowcast.errors import UsageError
from narrowcast.formats import FORMATS, FloatFormat, float_format
from narrowcast.records.ranges import TensorRange

__all__ = ["merged", "scaled", "would_be_subnormal", "would_overflow", "would_underflow"]


def would_underflow(values: TensorRange, into: str, scale: float = 1.0) -> float:
    """Return the share of the finite non-zero elements that format `into` rounds to 0.

    The elements are multiplied by `scale` before. 0 where there are none.
    """
    limit = float_format(into).smallest_subnormal / 2  # a tie, and 0 is even
    return _share(values, _below(values, limit, _positive(scale), inclusive=True))


def would_be_subnormal(values: TensorRange, into: str, scale: float = 1.0) -> float:
    """Return the share of the finite non-zero elements that become subnormal: short of bits."""
    form, factor = float_format(into), _positive(scale)
    zero = _below(values, form.smallest_subnormal / 2, factor, inclusive=True)
    # Half a step below the smallest normal number the tie goes up, to the even one.
    limit = form.tiny - form.smallest_subnormal / 2
    return _share(values, max(0.0, _below(values, limit, factor, inclusive=False) - zero))


def would_overflow(values: TensorRange, into: str, scale: float = 1.0) -> float:
    """Return the share of the finite non-zero elements beyond the largest number of the format.

    They become infinite; in e4m3, which has no infinity, NaN or the largest number: torch 2.13 has
    the latter.
    """
    form, factor = float_format(into), _positive(scale)
    limit = form.max + form.ulp(form.max) / 2
    # The largest number is odd, so that a tie leaves it; e4m3 ends one earlier, on an even one.
    below = _below(values, limit, factor, inclusive=not form.has_inf)
    return _share(values, sum(values.exponent_counts) - below)


def merged(ranges: Sequence[TensorRange]) -> TensorRange:
    """Count several tensors together; the widest of their formats stands for them."""
    if not ranges:
        raise UsageError("no ranges to merge", hint="pass at least one")
    if len(ranges) == 1:
        return ranges[0]
    counted = [one for one in ranges if one.exponent_counts]
    lowest = min((one.lowest_exponent for one in counted), default=0)
    top = max((one.lowest_exponent + len(one.exponent_counts) for one in counted), default=0)
    counts = [0] * (top - lowest)
    for one in counted:
        for place, number in enumerate(one.exponent_counts, one.lowest_exponent - lowest):
            counts[place] += number
    numel = sum(one.numel for one in ranges)
    finite = [one.numel - one.nans - one.infs for one in ranges]
    squares = sum(number * one.rms**2 for number, one in zip(finite, ranges, strict=True))
    return TensorRange(
        dtype=max(ranges, key=_width).dtype,
        shape=(numel,),
        numel=numel,
        zeros=sum(one.zeros for one in ranges),
        nans=sum(one.nans for one in ranges),
        infs=sum(one.infs for one in ranges),
        amax=max(one.amax for one in ranges),
        amin=min((one.amin for one in counted), default=0.0),
        rms=math.sqrt(squares / sum(finite)) if sum(finite) else 0.0,
        lowest_exponent=lowest,
        exponent_counts=tuple(counts),
    )


def scaled(values: TensorRange, factor: float) -> TensorRange:
    """Return the range of the values times a power of two, as gradients are unscaled: exact.

    Raises UsageError for another factor, which would mix the exponents.
    """
    mantissa, exponent = math.frexp(_positive(factor))
    if mantissa != 0.5:
        raise UsageError(
            f"a range cannot be multiplied by {factor!r}: it is no power of two",
            hint="multiply the tensor, and measure it again",
        )
    return replace(
        values,
        amax=values.amax * factor,
        amin=values.amin * factor,
        rms=values.rms * factor,
        lowest_exponent=values.lowest_exponent + exponent - 1 if values.exponent_counts else 0,
    )


def _positive(scale: float) -> float:
    if not 0 < scale < math.inf:
        raise UsageError(f"a scale of {scale!r}", hint="a loss scale is a positive finite number")
    return scale


def _width(values: TensorRange) -> int:
    """Order formats by their mantissa; what is none of ours (float64) is wider than all."""
    known = FORMATS.get(values.dtype)
    return known.mantissa_bits if known else 52


def _share(values: TensorRange, number: float) -> float:
    total = sum(values.exponent_counts)
    return min(1.0, max(0.0, number / total)) if total else 0.0


def _below(values: TensorRange, limit: float, scale: float, *, inclusive: bool) -> float:
    """Estimate how many finite non-zero elements, times `scale`, lie below a limit (or on it)."""
    bound = limit / scale
    total = sum(values.exponent_counts)
    if values.amax < bound or (inclusive and values.amax == bound):
        return total
    if bound < values.amin or (not inclusive and values.amin == bound):
        return 0
    exponent = math.frexp(bound)[1] - 1
    place = exponent - values.lowest_exponent
    lower = sum(values.exponent_counts[:place])
    inside = values.exponent_counts[place]
    part = inside * _part_below(bound, exponent, FORMATS.get(values.dtype), inclusive=inclusive)
    # The smallest element is below, and the largest is not: so much is known of those inside.
    least = 1 if place == 0 else 0
    most = inside - (1 if place == len(values.exponent_counts) - 1 else 0)
    return lower + min(max(part, least), most)


def _part_below(bound: float, exponent: int, form: FloatFormat | None, *, inclusive: bool) -> float:
    """Return which part of a format's numbers in [2^e, 2^(e+1)) lies below a bound (or on it)."""
    base = 2.0**exponent
    if form is None:
        return bound / base - 1
    step = base * form.eps
    if base >= form.smallest_subnormal:
        step = max(step, form.smallest_subnormal)
    places = (bound - base) / step
    return (math.floor(places) + 1 if inclusive else math.ceil(places)) * step / base
