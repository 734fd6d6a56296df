"""What became of each optimizer step: an outcome, a ledger of the skipped ones, and when to stop.

A skipped step is ordinary while a loss scale is being found and a symptom afterwards. What tells
them apart is whether a lower scale could have cured it: an overflow above the scale's floor may be
cured by the next back-off; a NaN loss, or an overflow at the floor, comes back whatever it does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from narrowcast.errors import PrecisionError, UsageError
from narrowcast.records.run import SkippedStep, SkipReason

__all__ = [
    "SkipLedger",
    "SkipLimit",
    "SkipRow",
    "StepOutcome",
    "nonfinite_parameters",
    "require_skip_limit",
    "skip_reason",
    "stuck_error",
]

SkipLimit = int | Literal["auto"] | None

# A bad batch or two can be bad luck; eight in a row that no scale cures are not.
_INCURABLE_LIMIT = 8
# One read of the device for so many fused steps: late enough to cost little, early enough to stop.
_READ_EVERY = 16


def require_skip_limit(limit: SkipLimit) -> None:
    """Raise UsageError unless it is 'auto', None or a whole number from 1 on."""
    is_word = limit is None or limit == "auto"
    is_count = isinstance(limit, int) and not isinstance(limit, bool) and limit >= 1
    if not is_word and not is_count:
        raise UsageError(
            f"max_consecutive_skips={limit!r}: it is how many skips in a row end the training",
            hint="'auto' counts those that no lower scale can cure, None never ends it",
        )


def skip_reason(*, overflow: bool, broken: bool, bad_loss: bool) -> SkipReason:
    """Name why a step is skipped, or '' when it is not.

    `overflow`: a gradient was not finite before unscaling; `broken`: only afterwards. A bad loss
    makes every gradient bad, so it goes before both.
    """
    if (overflow or broken) and bad_loss:
        return "non-finite loss"
    if overflow:
        return "gradient overflow"
    return "non-finite gradient" if broken else ""


class StepOutcome:
    """What became of one call of `GradScaler.step`: true when the optimizer stepped.

    Asking may read the device, once, when a fused optimizer decided there.
    """

    __slots__ = ("_flags", "_skip", "step")

    def __init__(
        self, step: int, skip: SkippedStep | None = None, *, flags: Tensor | None = None
    ) -> None:
        self.step: Final = step
        self._skip = skip
        self._flags = flags

    @property
    def flags(self) -> Tensor | None:
        """The unread answer, fp32 of shape (4,): overflow, broken, bad loss, scale."""
        return self._flags

    @property
    def skip(self) -> SkippedStep | None:
        """The ledger's entry, or None when the optimizer stepped."""
        if self._flags is not None:
            overflow, broken, bad_loss, scale = self._flags.tolist()
            self._flags = None
            reason = skip_reason(
                overflow=bool(overflow), broken=bool(broken), bad_loss=bool(bad_loss)
            )
            if reason:
                self._skip = SkippedStep(
                    step=self.step, reason=reason, loss_scale=scale, parameters=()
                )
        return self._skip

    @property
    def applied(self) -> bool:
        return self.skip is None

    @property
    def reason(self) -> SkipReason:
        return "" if self.skip is None else self.skip.reason

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of parameters with non-finite gradients; unknown, so empty, after a fused step."""
        return () if self.skip is None else self.skip.parameters

    def __bool__(self) -> bool:
        return self.applied

    def __repr__(self) -> str:
        said = "applied" if self.applied else f"skipped: {self.reason}"
        return f"<StepOutcome {self.step}: {said}>"


@dataclass(frozen=True, kw_only=True)
class SkipRow:
    """How many steps in a row were skipped, and how many of them no lower scale could cure."""

    skipped: int = 0
    incurable: int = 0

    def after_applied(self) -> SkipRow:
        return SkipRow()

    def after_skip(self, *, curable: bool) -> SkipRow:
        """Count a skip; `curable` when it was an overflow and the scale could still go down."""
        return SkipRow(skipped=self.skipped + 1, incurable=self.incurable + (not curable))

    def is_too_long(self, limit: SkipLimit) -> bool:
        """Whether to give up: a number counts all skips, 'auto' the incurable ones, None never.

        'auto' lets a scale of any height come down to its floor, 16 skips from 2^16, and gives up
        eight skips later; eight losses in a row that are NaN suffice as well.
        """
        if limit is None:
            return False
        if limit == "auto":
            return self.incurable >= _INCURABLE_LIMIT
        return self.skipped >= limit


_ADVICE = {
    "non-finite loss": "the loss was not finite before it was scaled, so no scale can help: look "
    "first for NaN or inf in the batch (torch.isfinite(inputs).all()), then for a log or a "
    "division of 0 or an fp16 value above 65504 in the forward pass; keep that module in fp32, or "
    "train in bf16",
    "gradient overflow": "keep the modules of these parameters in fp32, clip or lower the learning "
    "rate, or train in bf16, which has the range of fp32",
    "non-finite gradient": "lowering the scale cannot cure these: look at what produces or changes "
    "them, such as the derivative of a root or norm at 0, a gradient penalty, or a hook",
}


def stuck_error(row: SkipRow, last: SkippedStep) -> PrecisionError:
    """Build the error for a row of skipped steps that got too long."""
    # A loss that is no number breaks every gradient: no parameter is at fault.
    is_loss = last.reason == "non-finite loss"
    where = f" in {', '.join(last.parameters)}" if last.parameters and not is_loss else ""
    return PrecisionError(
        f"{row.skipped} optimizer steps in a row were skipped, the last one step {last.step} at "
        f"loss scale {last.loss_scale:g}: {last.reason}{where}",
        hint=_ADVICE[last.reason],
    )


def nonfinite_parameters(
    optimizer: Optimizer, names: Mapping[int, str], *, at_most: int = 8
) -> tuple[str, ...]:
    """Name the optimizer's parameters whose gradients are not finite; reads the device once.

    The last ones come first: backward starts there, so that is where an overflow begins. `names`
    maps the id of a parameter to its name; without one it is named by group, index and shape.
    """
    labels, flags = [], []
    for i, group in enumerate(optimizer.param_groups):
        for j, parameter in enumerate(group["params"]):
            if parameter.grad is None:
                continue
            gradient = parameter.grad
            values = gradient._values() if gradient.is_sparse else gradient
            label = f"group {i} parameter {j} of shape {tuple(parameter.shape)}"
            labels.append(names.get(id(parameter), label))
            flags.append(torch.isfinite(values).all())
    if not flags:
        return ()
    finite = torch.stack([flag.to(flags[0].device) for flag in flags]).tolist()
    found = [label for label, good in zip(labels, finite, strict=True) if not good]
    return tuple(reversed(found))[:at_most]


class SkipLedger:
    """Counts steps and keeps the skipped ones; one step may hold attempts of several optimizers."""

    def __init__(self) -> None:
        self.steps = 0
        self.row = SkipRow()
        self.last: StepOutcome | None = None
        self.attempts: list[tuple[Optimizer, StepOutcome]] = []
        """Of the step that is under way."""
        self._uncounted: list[list[StepOutcome]] = []
        self._skips: list[SkippedStep] = []

    @property
    def skips(self) -> tuple[SkippedStep, ...]:
        """All skips, also of the step under way; may read the device."""
        current = [outcome for _, outcome in self.attempts]
        late = [o.skip for outcomes in (*self._uncounted, current) for o in outcomes]
        return (*self._skips, *(skip for skip in late if skip))

    @property
    def is_plain(self) -> bool:
        """Whether the step under way is of one optimizer that, as the host knows, stepped."""
        if len(self.attempts) != 1:
            return False
        outcome = self.attempts[0][1]
        return outcome.flags is None and outcome.skip is None

    def record(self, optimizer: Optimizer, skip: SkippedStep | None) -> None:
        self.attempts.append((optimizer, StepOutcome(self.steps + 1, skip)))
        self.last = self.attempts[-1][1]

    def record_unread(self, optimizer: Optimizer, flags: Tensor) -> None:
        """Record a step that was decided on the device; `flags`: see StepOutcome."""
        self.attempts.append((optimizer, StepOutcome(self.steps + 1, flags=flags)))
        self.last = self.attempts[-1][1]

    def close(self, *, floor: float) -> SkippedStep | None:
        """End the step under way; return the newest skip when the device was read and it skipped.

        Unread outcomes are left unread until there are sixteen steps of them.
        """
        is_quiet = self.is_plain and not (self._uncounted or self.row.skipped)
        outcomes = [outcome for _, outcome in self.attempts]
        self.steps += 1
        self.attempts = []
        if is_quiet:
            return None  # nearly every step: all of it is known, and nothing to be counted
        self._uncounted.append(outcomes)
        is_due = all(o.flags is None for o in outcomes) or len(self._uncounted) >= _READ_EVERY
        return self.count(floor=floor) if is_due else None

    def count(self, *, floor: float) -> SkippedStep | None:
        """Read what is unread and bring the row up to date; `floor` is the scale's."""
        newest = None
        for outcomes in self._uncounted:
            skips = [outcome.skip for outcome in outcomes if outcome.skip]
            newest = skips[-1] if skips else None
            self._skips += skips
            if skips:
                curable = [s.reason == "gradient overflow" and s.loss_scale > floor for s in skips]
                self.row = self.row.after_skip(curable=all(curable))
            elif outcomes:
                self.row = self.row.after_applied()
        self._uncounted = []
        return newest

    def to_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs; call `count` before."""
        skips = [asdict(skip) | {"parameters": list(skip.parameters)} for skip in self._skips]
        return {"steps": self.steps, "row": asdict(self.row), "skips": skips}

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> SkipLedger:
        """Rebuild from `to_dict`; raises KeyError or TypeError when it is not of that form."""
        ledger = cls()
        ledger.steps = int(saved["steps"])
        ledger.row = SkipRow(**saved["row"])
        ledger._skips = [
            SkippedStep(**{**skip, "parameters": tuple(skip["parameters"])})
            for skip in saved["skips"]
        ]
        return ledger
