"""What a GradScaler is to a trainer, also for precisions that need no scaling.

Trainers look at gradients in fp16 only. A NaN in bf16 goes into the weights, or every step is
skipped by somebody and nobody says so. A FiniteCheck has the methods of a GradScaler that trainers
call, scales by nothing, and keeps the same ledger.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from narrowcast.dropin.grad_scaler import GradScaler
from narrowcast.engine import gradients
from narrowcast.errors import CheckpointError
from narrowcast.records.run import SkippedStep
from narrowcast.scaling.loss_watch import LossWatch
from narrowcast.scaling.scales import NoScale
from narrowcast.scaling.skips import (
    SkipLimit,
    SkipRow,
    StepOutcome,
    nonfinite_parameters,
    require_skip_limit,
    stuck_error,
)

__all__ = ["FiniteCheck", "Flags", "HostScaler"]

_CPU = torch.device("cpu")
_STRIDED = torch.strided
Kind = tuple[torch.device, torch.dtype]
_CHECKED = (torch.float32, torch.float16, torch.bfloat16)
"""What torch's operation takes on every device; wider numbers are looked at otherwise."""


class FiniteCheck:
    """Steps an optimizer unless a gradient is not finite.

    Reads the device once a step for each format that gradients are in.
    """

    value = NoScale()

    def __init__(
        self,
        *,
        names: Iterable[tuple[str, Tensor]] = (),
        max_consecutive_skips: SkipLimit = "auto",
    ) -> None:
        require_skip_limit(max_consecutive_skips)
        self._names = {id(parameter): name for name, parameter in names}
        self._limit = max_consecutive_skips
        self._watch = LossWatch()
        self._flags = Flags()
        self._steps = 0
        self._row = SkipRow()
        self._skips: list[SkippedStep] = []
        self._newest: SkippedStep | None = None
        """The newest skip of the step under way, which may be of several optimizers."""
        self._last: StepOutcome | None = None

    @property
    def last_outcome(self) -> StepOutcome | None:
        """What became of the newest call of `step`; None before the first."""
        return self._last

    @property
    def skips(self) -> tuple[SkippedStep, ...]:
        """All steps skipped so far, also those before a resumed checkpoint."""
        return tuple(self._skips)

    def is_enabled(self) -> bool:
        return True

    def get_scale(self) -> float:
        return self.value.scale

    def scale(self, outputs: Any) -> Any:
        """Return the outputs as they are, and hold them: a skipped step is asked for its loss."""
        if type(outputs) is not Tensor:
            return self._watch.passing(outputs)
        self._watch.hold(outputs)
        return outputs

    def unscale_(self, optimizer: Optimizer) -> None:
        """Do nothing: gradients stand at their own scale."""

    def step(self, optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
        """Step unless a gradient is not finite.

        Returns what `optimizer.step` returned, or a StepOutcome where that is None.
        """
        step = self._steps + 1
        flags = self._flags.raised(gradients.collect(optimizer))
        if not any(flag.item() for flag in flags):
            self._last = StepOutcome(step)
            returned = optimizer.step(*args, **kwargs)
            return self._last if returned is None else returned
        self._flags.lower()
        self._newest = SkippedStep(
            step=step,
            reason="non-finite loss" if self._watch.was_bad(_CPU) else "non-finite gradient",
            loss_scale=1.0,
            parameters=nonfinite_parameters(optimizer, self._names),
        )
        self._skips.append(self._newest)
        self._last = StepOutcome(step, self._newest)
        return self._last

    def update(self, new_scale: object = None) -> None:
        """Count the step; raises PrecisionError for a row of skips that is too long."""
        self._steps += 1
        self._watch.clear()
        newest, self._newest = self._newest, None
        if newest is None:
            if self._row.skipped:
                self._row = self._row.after_applied()
            return
        self._row = row = self._row.after_skip(curable=False)
        if row.is_too_long(self._limit):
            self._row = SkipRow()  # whoever catches the error gets as many tries again
            raise stuck_error(row, newest)

    def state_dict(self) -> dict[str, Any]:
        """Return the ledger, of plain JSON types."""
        skips = [asdict(skip) | {"parameters": list(skip.parameters)} for skip in self._skips]
        return {"ledger": {"steps": self._steps, "row": asdict(self._row), "skips": skips}}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load what `state_dict` returned; raises CheckpointError for anything else."""
        try:
            saved = state_dict["ledger"]
            steps, row = int(saved["steps"]), SkipRow(**saved["row"])
            skips = [
                SkippedStep(**skip | {"parameters": tuple(skip["parameters"])})
                for skip in saved["skips"]
            ]
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"the saved record of skipped steps cannot be used: {error!r}",
                hint="was it saved in another precision? fp16 keeps the state of a loss scaler",
            ) from error
        self._steps, self._row, self._skips = steps, row, skips


class HostScaler(GradScaler):
    """A GradScaler for trainers that unscale gradients before every step, for hooks to see them.

    Gradients that are all of one device and format are unscaled, and what changed them since is
    looked at, in one operation each and without the bookkeeping for several devices: a fifth of a
    small step.
    """

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self._flags: dict[int, Flags] = {}
        """By the id of the optimizer; all are down between steps, whoever has the id next."""

    def _unscale_grads_(
        self,
        optimizer: Optimizer,
        inv_scale: Tensor,
        found_inf: Tensor,
        allow_fp16: bool,  # noqa: FBT001 -- torch's own signature
    ) -> dict[torch.device, Tensor]:
        pending = _dense(optimizer)
        kinds = _alike(pending)
        if len(kinds) == 1 and pending[0].device == found_inf.device:
            is_known = pending[0].dtype in _CHECKED
            if is_known and (allow_fp16 or pending[0].dtype is not torch.float16):
                torch._amp_foreach_non_finite_check_and_unscale_(pending, found_inf, inv_scale)
                return {found_inf.device: found_inf}
        return super()._unscale_grads_(optimizer, inv_scale, found_inf, allow_fp16)

    def _look_again(self, optimizer: Optimizer) -> None:
        pending = _dense(optimizer)
        if not pending:
            super()._look_again(optimizer)
            return
        flags = self._flags.get(id(optimizer))
        if flags is None:
            flags = self._flags[id(optimizer)] = Flags()
        seen = flags.raised(pending)
        self._per_optimizer_states[id(optimizer)]["seen_again"] = dict(enumerate(seen))

    def _judge(self, optimizer: Optimizer, state: dict[str, Any]) -> SkippedStep | None:
        skip = super()._judge(optimizer, state)
        if skip is not None:
            self._flags.pop(id(optimizer), None)  # up, and they do not go down
        return skip

    def _record_fused(self, optimizer: Optimizer, state: dict[str, Any]) -> None:
        super()._record_fused(optimizer, state)
        if not self._reads_are_free():
            self._flags.pop(id(optimizer), None)  # on the device, and not known yet


def _dense(optimizer: Optimizer) -> list[Tensor]:
    """List the gradients, or nothing if one of them is sparse."""
    found = []
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            gradient = parameter.grad
            if gradient is None:
                continue
            if gradient.layout is not _STRIDED:
                return []
            found.append(gradient)
    return found


class Flags:
    """Says for each kind of gradient whether an element is not finite: fp32 1, else 0; unread.

    By the operation with which torch unscales: it takes a sixth of the time of norms on small
    models, and writes each gradient times 1. Flags are made once, and go up but not down.
    """

    def __init__(self) -> None:
        self._made: dict[Kind, tuple[Tensor, Tensor]] = {}
        """For each kind its flag, and the 1 that gradients are multiplied by."""

    def raised(self, pending: list[Tensor]) -> list[Tensor]:
        """Return a flag for each kind of gradient, up if an element is not finite."""
        return [self._of(alike) for alike in _alike(pending)]

    def _of(self, alike: list[Tensor]) -> Tensor:
        kind = alike[0].device, alike[0].dtype
        made = self._made.get(kind)
        if made is None:
            if kind[1] not in _CHECKED:
                return (~gradients.all_finite(alike)).float()
            made = torch.zeros((), device=kind[0]), torch.ones((), device=kind[0])
            self._made[kind] = made
        flag, one = made
        torch._amp_foreach_non_finite_check_and_unscale_(alike, flag, one)
        return flag

    def lower(self) -> None:
        """Take the flags down for the next step."""
        for flag, _ in self._made.values():
            flag.zero_()


def _alike(pending: list[Tensor]) -> Collection[list[Tensor]]:
    """Return gradients by device and format; mostly they are all of one."""
    if not pending:
        return ()
    dtype, device = pending[0].dtype, pending[0].device
    for g in pending:
        if g.dtype is not dtype or g.device != device:
            break
    else:
        return (pending,)
    kinds: dict[Kind, list[Tensor]] = {}
    for gradient in pending:
        kinds.setdefault((gradient.device, gradient.dtype), []).append(gradient)
    return kinds.values()
