"""What a GradScaler is to a trainer, also for precisions that need no scaling.

Trainers look at gradients in fp16 only. A NaN in bf16 goes into the weights, or every step is
skipped by somebody and nobody says so. A FiniteCheck has the methods of a GradScaler that trainers
call, scales by nothing, and keeps the same ledger.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from narrowcast.errors import CheckpointError
from narrowcast.integrations.looks import Flags
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

__all__ = ["FiniteCheck"]

_CPU = torch.device("cpu")


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
        self._watch.note(outputs)
        return outputs

    def unscale_(self, optimizer: Optimizer) -> None:
        """Do nothing: gradients stand at their own scale."""

    def step(self, optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
        """Step unless a gradient is not finite.

        Returns what `optimizer.step` returned, or a StepOutcome where that is None.
        """
        step = self._steps + 1
        if not self._flags.are_up_for(optimizer):
            self._last = outcome = StepOutcome(step)
            returned = optimizer.step(*args, **kwargs)
            return outcome if returned is None else returned
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
