"""The drop-in GradScaler without what a trainer does not need of it, for steps that are ordinary.

Trainers unscale gradients before every step, for hooks and clipping to see them, so each step looks
at them twice. Torch's scaler makes its flags anew each time and sorts gradients by device and
format; half of what an adapter costs on a small model is that.
"""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import OptState, _refresh_per_optimizer_state
from torch.optim import Optimizer

from narrowcast.dropin.grad_scaler import GradScaler
from narrowcast.integrations.looks import alike
from narrowcast.optim.release import require_kept
from narrowcast.scaling.scales import DynamicScale

__all__ = ["HostScaler"]

_DEVICES = ("cpu", "cuda")
"""Where a scale has its reciprocal taken in fp64, as torch does but on MPS."""


class HostScaler(GradScaler):
    """Does what a GradScaler does, bit for bit, and the ordinary step of a trainer in short.

    That is one optimizer whose gradients are all dense and of one device and format, unscaled
    before the step, and finite. Both flags of a step are read at once, where the drop-in reads
    two. All else, and the step of a fused optimizer that decides on the device, goes its way.
    """

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self._looks: dict[int, _Looks] = {}
        """By the id of the optimizer; all flags are down between steps, whoever has the id next."""
        self._inverted, self._inverse = math.nan, torch.ones(())

    def scale(self, outputs: Any) -> Any:
        """Multiply by the scale, and note whether the loss was finite before."""
        scale = self._scale
        if type(outputs) is not Tensor or scale is None or outputs.device != scale.device:
            return super().scale(outputs)
        require_kept("GradScaler", outputs=outputs)
        self._watch.note(outputs)
        return outputs * scale

    def unscale_(self, optimizer: Optimizer) -> None:
        """Divide gradients by the scale, in place, and note whether all are finite."""
        state, scale = self._per_optimizer_states[id(optimizer)], self._scale
        pending = alike(optimizer)
        if (
            not pending
            or scale is None
            or state["stage"] is not OptState.READY
            or pending[0].dtype is torch.float16  # torch's error
            or pending[0].device != scale.device
            or scale.device.type not in _DEVICES
        ):
            super().unscale_(optimizer)
            return
        require_kept("GradScaler", optimizer=optimizer)
        looks = self._looks.get(id(optimizer))
        if looks is None:
            looks = self._looks[id(optimizer)] = _Looks(scale.device)
        torch._amp_foreach_non_finite_check_and_unscale_(
            pending, looks.first, self._inverse_of(scale)
        )
        state["found_inf_per_device"] = looks.found
        state["stage"] = OptState.UNSCALED

    def _inverse_of(self, scale: Tensor) -> Tensor:
        """Return 1 / scale; on a CPU the one of the step before, if the scale is still the same."""
        if not scale.is_cpu:
            return scale.double().reciprocal().float()
        value = scale.item()
        if value != self._inverted:
            self._inverted, self._inverse = value, scale.double().reciprocal().float()
        return self._inverse

    def step(self, optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
        """Step unless a gradient is not finite; returns what the drop-in's returns."""
        looks = self._looks.get(id(optimizer))
        state = self._per_optimizer_states[id(optimizer)]
        is_ordinary = (
            looks is not None
            and state["found_inf_per_device"] is looks.found
            and state["stage"] is OptState.UNSCALED
            and "closure" not in kwargs
            and not getattr(optimizer, "_step_supports_amp_scaling", False)
        )
        pending = alike(optimizer) if is_ordinary else None
        if looks is None or not pending or pending[0].device != looks.one.device:
            return super().step(optimizer, *args, **kwargs)
        require_kept("GradScaler", optimizer=optimizer)
        torch._amp_foreach_non_finite_check_and_unscale_(pending, looks.second, looks.one)
        skip = None
        if any(looks.both.tolist()):
            state["seen_again"] = {looks.one.device: looks.second}
            skip = self._judge(optimizer, state)
        self._ledger.record(optimizer, skip)
        returned = optimizer.step(*args, **kwargs) if skip is None else None
        state["stage"] = OptState.STEPPED
        return self._ledger.last if returned is None else returned

    def update(self, new_scale: float | Tensor | None = None) -> None:
        """Move the scale and count the step; raises PrecisionError for a hopeless row of skips."""
        looks = self._looks_of_the_step() if new_scale is None else None
        if looks is None:
            self._looks.clear()  # flags may be up, and they do not go down
            super().update(new_scale)
            return
        torch._amp_update_scale_(
            *self._check_scale_growth_tracker("update"),
            looks.first,
            self._growth_factor,
            self._backoff_factor,
            self._growth_interval,
        )
        self._per_optimizer_states = defaultdict(_refresh_per_optimizer_state)
        self._close_step()

    def _looks_of_the_step(self) -> _Looks | None:
        """Return the looks of the only optimizer that the step was of; None if not ordinary."""
        ledger, rule = self._ledger, self._rule
        if not ledger.is_plain or len(self._per_optimizer_states) != 1:
            return None
        if not rule.is_torch_rule or rule.ceiling < DynamicScale.ceiling:
            return None
        ((name, state),) = self._per_optimizer_states.items()
        looks = self._looks.get(name)
        is_of_ours = looks is not None and state["found_inf_per_device"] is looks.found
        return looks if is_of_ours else None

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_looks": {}}


class _Looks:
    """The flags of one optimizer: of its gradients as they come, and once they are unscaled."""

    def __init__(self, device: torch.device) -> None:
        self.both = torch.zeros(2, device=device)
        self.first, self.second = self.both.unbind()
        self.one = torch.ones((), device=device)
        """What the second look multiplies by."""
        self.found = {device: self.first}
        """As torch keeps a flag."""
