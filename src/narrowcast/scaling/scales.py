"""The loss scale as a value: what it is now, and what it is after one more step.

fp16 has no numbers between 0 and 6e-8, and many gradients of a healthy model lie there. Multiplying
the loss by a scale moves all gradients up by the same factor; they are divided by it again before
the optimizer sees them (Micikevicius et al. 2018, section 3.2). Too large a scale overflows, so the
largest one that works is searched for all the time: double it after a long run of finite steps,
halve it and skip the step when a gradient is not finite.

The usual implementation has no floor, and one NaN that stays takes the scale to exactly 0 after 166
steps; then 0 x inf writes NaN into the weights. Here the scale stays within [floor, ceiling], and a
failure that no scale can cure leaves it alone and is counted instead (`narrowcast.scaling.skips`).
"""

from __future__ import annotations

import math
import struct
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from narrowcast.errors import CheckpointError, UsageError
from narrowcast.formats import float_format

__all__ = [
    "DynamicScale",
    "LossScale",
    "NoScale",
    "StaticScale",
    "loss_scale_from_dict",
    "loss_scale_to_dict",
    "sound_saved_scale",
]

# A scale lives in an fp32 tensor on the device. Its reciprocal, by which gradients are multiplied,
# must be finite too, which the smallest normal number guarantees: 1 / 2^-126 = 2^126.
_LARGEST = float_format("fp32").max
_SMALLEST = float_format("fp32").tiny


def _as_fp32(x: float) -> float:
    """Round to fp32; beyond its range, infinity of the same sign."""
    try:
        return float(struct.unpack("<f", struct.pack("<f", x))[0])
    except OverflowError:
        return math.copysign(math.inf, x)


def _refuse(what: str, expected: str) -> UsageError:
    return UsageError(f"{what} is not usable: {expected}", hint="see docs/loss-scaling.md")


@dataclass(frozen=True, kw_only=True)
class NoScale:
    """The null object: fp32 and bf16 have range enough."""

    @property
    def scale(self) -> float:
        return 1.0

    def after(self, *, finite: bool) -> NoScale:
        return self

    def after_nonfinite_loss(self) -> NoScale:
        return self


@dataclass(frozen=True, kw_only=True)
class StaticScale:
    """A scale that the user chose and that no step changes."""

    scale: float = 2.0**16

    def __post_init__(self) -> None:
        if not _SMALLEST <= self.scale <= _LARGEST:
            raise _refuse(f"loss scale {self.scale}", "it must be positive and finite in fp32")

    def after(self, *, finite: bool) -> StaticScale:
        return self

    def after_nonfinite_loss(self) -> StaticScale:
        return self


@dataclass(frozen=True, kw_only=True)
class DynamicScale:
    """A scale that follows the gradients, within [floor, ceiling].

        on overflow                           (a gradient was not finite; the step is skipped)
            row <- row + 1
            if row >= hysteresis              scale <- max(scale * backoff, floor)
            count this overflow in the window; more than `window_overflows` start it anew
        on a finite step
            row <- 0, good <- good + 1
            if good = interval                scale <- min(scale * growth, ceiling), unless that
                                              is not finite in fp32; the window starts anew

    With the defaults this is the rule of `torch.amp.GradScaler`, product by product rounded to
    fp32 as its kernel does it (Micikevicius et al. 2018, section 3.2); the bounds are ours.
    Raises UsageError for values with which the rule makes no sense.
    """

    scale: float = 2.0**16
    growth: float = 2.0
    backoff: float = 0.5
    interval: int = 2000
    """Finite steps until the scale grows."""
    floor: float = 1.0
    """Below 1 the loss would be scaled *down*: fp16 gradients that overflow there are not cured."""
    ceiling: float = _LARGEST
    hysteresis: int = 1
    """The overflow of a row with which lowering begins; 2 forgives every lone overflow."""
    window_overflows: int = 0
    """Overflows that a growth window may hold without starting anew. With torch's 0, one overflow
    in every 1,999 steps takes the scale down for ever, since it never grows in between."""
    calibration_interval: int | None = None
    """A shorter interval in force until the first overflow, to find the range sooner."""
    good_steps: int = 0
    overflows_in_row: int = 0
    overflows_in_window: int = 0
    calibrated: bool = False
    """Whether an overflow has been seen."""

    def __post_init__(self) -> None:
        if not _SMALLEST <= self.floor <= self.ceiling <= _LARGEST:
            raise _refuse(
                f"bounds [{self.floor}, {self.ceiling}] of the loss scale",
                f"need {_SMALLEST:.4g} <= floor <= ceiling <= {_LARGEST:.4g}",
            )
        if not self.floor <= self.scale <= self.ceiling:
            raise _refuse(
                f"loss scale {self.scale}", f"it must lie in [{self.floor}, {self.ceiling}]"
            )
        if not 1 < self.growth < math.inf:
            raise _refuse(f"growth factor {self.growth}", "it must be greater than 1")
        if not 0 < self.backoff < 1:
            raise _refuse(f"backoff factor {self.backoff}", "it must lie between 0 and 1")
        for name, smallest in (("interval", 1), ("hysteresis", 1), ("window_overflows", 0)):
            if getattr(self, name) < smallest:
                raise _refuse(f"{name} {getattr(self, name)}", f"it must be {smallest} or more")
        if self.calibration_interval is not None and self.calibration_interval < 1:
            raise _refuse(f"calibration interval {self.calibration_interval}", "at least 1 step")

    @property
    def is_torch_rule(self) -> bool:
        """Whether no option is set that torch's kernel does not know."""
        return (self.hysteresis, self.window_overflows, self.calibration_interval) == (1, 0, None)

    @property
    def current_interval(self) -> int:
        """Finite steps until growth: the shorter interval while calibrating."""
        if self.calibration_interval is None or self.calibrated:
            return self.interval
        return self.calibration_interval

    @property
    def is_at_floor(self) -> bool:
        """Whether an overflow can lower the scale no further."""
        return self.scale <= self.floor

    def after(self, *, finite: bool) -> DynamicScale:
        """Return the scale after a step whose scaled gradients were all finite, or were not."""
        return self._after_finite() if finite else self._after_overflow()

    def after_nonfinite_loss(self) -> DynamicScale:
        """Return the same scale: it was not the cause; a lower one would only lose gradients."""
        return self

    def _after_overflow(self) -> DynamicScale:
        in_row = self.overflows_in_row + 1
        in_window = self.overflows_in_window + 1
        # A window that is over budget starts anew; one within it keeps its finite steps.
        is_over = in_window > self.window_overflows
        lowered = max(_as_fp32(self.scale * self.backoff), self.floor)
        return replace(
            self,
            scale=lowered if in_row >= self.hysteresis else self.scale,
            good_steps=0 if is_over else self.good_steps,
            overflows_in_row=in_row,
            overflows_in_window=0 if is_over else in_window,
            calibrated=True,
        )

    def _after_finite(self) -> DynamicScale:
        good = self.good_steps + 1
        if good < self.current_interval:
            return replace(self, good_steps=good, overflows_in_row=0)
        grown = _as_fp32(self.scale * self.growth)
        return replace(
            self,
            scale=min(grown, self.ceiling) if math.isfinite(grown) else self.scale,
            good_steps=0,
            overflows_in_row=0,
            overflows_in_window=0,
        )


LossScale = NoScale | StaticScale | DynamicScale

_KINDS: dict[str, type[NoScale] | type[StaticScale] | type[DynamicScale]] = {
    "none": NoScale,
    "static": StaticScale,
    "dynamic": DynamicScale,
}


def loss_scale_to_dict(value: LossScale) -> dict[str, Any]:
    """Return the kind and all fields, of plain JSON types."""
    kind = next(name for name, cls in _KINDS.items() if cls is type(value))
    return {"kind": kind, **asdict(value)}


def loss_scale_from_dict(saved: Mapping[str, Any]) -> LossScale:
    """Rebuild what `loss_scale_to_dict` returned; raises CheckpointError when it cannot be."""
    fields = dict(saved)
    kind = fields.pop("kind", None)
    if kind not in _KINDS:
        raise CheckpointError(
            f"a saved loss scale is of kind {kind!r}, not one of {', '.join(_KINDS)}",
            hint="it was written by another version of narrowcast, or damaged",
        )
    try:
        return _KINDS[kind](**fields)
    except (TypeError, UsageError) as error:
        raise CheckpointError(
            f"a saved loss scale cannot be used: {error}",
            hint="use an older checkpoint, or set the value in this one by hand",
        ) from error


def sound_saved_scale(saved: object, *, floor: float, ceiling: float) -> float:
    """Return a scale from another program's checkpoint, moved into [floor, ceiling] with a warning.

    Raises CheckpointError for 0, a negative number, infinity and NaN: that scaler was dead, and
    the weights saved beside it may hold NaN already.
    """
    if not isinstance(saved, int | float) or not math.isfinite(saved) or saved <= 0:
        raise CheckpointError(
            f"the saved loss scale is {saved!r}; only a positive finite number can be trained with",
            hint="check the weights of this checkpoint for NaN and prefer an older one; to go on "
            "from it, set its 'scale' to 65536.0 before loading",
        )
    moved = min(max(float(saved), floor), ceiling)
    if moved != saved:
        warnings.warn(
            f"the saved loss scale {saved} lies outside [{floor}, {ceiling}]; going on at {moved}",
            stacklevel=3,
        )
    return moved
