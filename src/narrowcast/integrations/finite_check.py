"""What a GradScaler is to a trainer, also for precisions that need no scaling.

Trainers look at gradients in fp16 only. A NaN in bf16 goes into the weights, or every step is
skipped by somebody and nobody says so. A FiniteCheck has the methods of a GradScaler that trainers
call, scales by nothing, and keeps the same ledger.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from functools import lru_cache
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

__all__ = ["FiniteCheck", "HostScaler", "nonfinite_flags"]

_CPU = torch.device("cpu")
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
        return self._watch.passing(outputs)

    def unscale_(self, optimizer: Optimizer) -> None:
        """Do nothing: gradients stand at their own scale."""

    def step(self, optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
        """Step unless a gradient is not finite.

        Returns what `optimizer.step` returned, or a StepOutcome where that is None.
        """
        step = self._steps + 1
        flags = nonfinite_flags(gradients.collect(optimizer))
        if not any(flag.item() for flag in flags):
            self._last = StepOutcome(step)
            returned = optimizer.step(*args, **kwargs)
            return self._last if returned is None else returned
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

    Whatever changed them since is looked at by `nonfinite_flags`, in a fifth of torch's time.
    """

    def _look_again(self, optimizer: Optimizer) -> None:
        flags = nonfinite_flags(gradients.collect(optimizer))
        self._per_optimizer_states[id(optimizer)]["seen_again"] = dict(enumerate(flags))


def nonfinite_flags(pending: list[Tensor]) -> list[Tensor]:
    """Return, unread, for each kind of gradient 1 if an element is not finite, else 0; fp32.

    By the operation with which torch unscales: it takes a sixth of the time of norms on small
    models, and writes each gradient times 1.
    """
    return [_flag(alike) for alike in _alike(pending)]


def _alike(pending: list[Tensor]) -> Iterable[list[Tensor]]:
    """Return gradients by device and format; mostly they are all of one."""
    if not pending:
        return ()
    dtype, device = pending[0].dtype, pending[0].device
    if all(g.dtype is dtype for g in pending) and (
        device.type == "cpu" or all(g.device == device for g in pending)
    ):
        return (pending,)
    kinds: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for gradient in pending:
        kinds.setdefault((gradient.device, gradient.dtype), []).append(gradient)
    return kinds.values()


def _flag(alike: list[Tensor]) -> Tensor:
    if alike[0].dtype not in _CHECKED:
        return (~gradients.all_finite(alike)).float()
    found, one = _zero_and_one(alike[0].device)
    found = found.clone()
    torch._amp_foreach_non_finite_check_and_unscale_(alike, found, one)
    return found


@lru_cache(maxsize=16)
def _zero_and_one(device: torch.device) -> tuple[Tensor, Tensor]:
    return torch.zeros((), device=device), torch.ones((), device=device)
