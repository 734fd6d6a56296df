"""What a GradScaler is to a trainer, also for precisions that need no scaling.

Trainers look at gradients in fp16 only. A NaN in bf16 goes into the weights, or every step is
skipped by somebody and nobody says so. A FiniteCheck has the methods of a GradScaler that trainers
call, scales by nothing, and keeps the same ledger.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
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
    SkipLedger,
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
        self._ledger = SkipLedger()
        self._watch = LossWatch()

    @property
    def last_outcome(self) -> StepOutcome | None:
        """What became of the newest call of `step`; None before the first."""
        return self._ledger.last

    @property
    def skips(self) -> tuple[SkippedStep, ...]:
        """All steps skipped so far, also those before a resumed checkpoint."""
        return self._ledger.skips

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
        flags = nonfinite_flags(gradients.collect(optimizer))
        if not any(flag.item() for flag in flags.values()):
            self._ledger.record(optimizer, None)
            returned = optimizer.step(*args, **kwargs)
            return self._ledger.last if returned is None else returned
        bad_loss = bool(self._watch.was_bad(_CPU))
        skip = SkippedStep(
            step=self._ledger.steps + 1,
            reason="non-finite loss" if bad_loss else "non-finite gradient",
            loss_scale=1.0,
            parameters=nonfinite_parameters(optimizer, self._names),
        )
        self._ledger.record(optimizer, skip)
        return self._ledger.last

    def update(self, new_scale: object = None) -> None:
        """Count the step; raises PrecisionError for a row of skips that is too long."""
        newest = self._ledger.close(floor=1.0)
        self._watch.clear()
        row = self._ledger.row
        if newest is not None and row.is_too_long(self._limit):
            self._ledger.row = SkipRow()  # whoever catches the error gets as many tries again
            raise stuck_error(row, newest)

    def state_dict(self) -> dict[str, Any]:
        """Return the ledger, of plain JSON types."""
        return {"ledger": self._ledger.to_dict()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load what `state_dict` returned; raises CheckpointError for anything else."""
        try:
            self._ledger = SkipLedger.from_dict(state_dict["ledger"])
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"the saved record of skipped steps cannot be used: {error!r}",
                hint="was it saved in another precision? fp16 keeps the state of a loss scaler",
            ) from error


class HostScaler(GradScaler):
    """A GradScaler for trainers that unscale gradients before every step, for hooks to see them.

    Whatever changed them since is looked at by `nonfinite_flags`, in a fifth of torch's time.
    """

    def _look_again(self, optimizer: Optimizer) -> None:
        flags = nonfinite_flags(gradients.collect(optimizer))
        self._per_optimizer_states[id(optimizer)]["seen_again"] = flags


def nonfinite_flags(pending: list[Tensor]) -> dict[tuple[torch.device, torch.dtype], Tensor]:
    """Return, unread, for each kind of gradient 1 if an element is not finite, else 0; fp32.

    By the operation with which torch unscales: it takes a sixth of the time of norms on small
    models, and writes each gradient times 1.
    """
    kinds: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for gradient in pending:
        kinds.setdefault((gradient.device, gradient.dtype), []).append(gradient)
    flags = {}
    for kind, alike in kinds.items():
        device, dtype = kind
        if dtype in _CHECKED:
            flags[kind] = torch.zeros((), device=device)
            torch._amp_foreach_non_finite_check_and_unscale_(alike, flags[kind], _one(device))
        else:
            flags[kind] = (~gradients.all_finite(alike)).float()
    return flags


@lru_cache(maxsize=16)
def _one(device: torch.device) -> Tensor:
    return torch.ones((), device=device)
