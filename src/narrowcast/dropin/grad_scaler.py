"""A drop-in for `torch.amp.GradScaler` whose scale cannot die and that says what it did.

Everything that torch's does is done by torch's code: this is a subclass, the scale and the growth
tracker are torch's tensors, and with default options they move by torch's kernel. Added are

- bounds: the scale stays in [floor, ceiling] and is never 0 or infinite;
- a second look at gradients that were unscaled before `step`, which torch does not look at again;
- a loss that was not finite before scaling is told apart from an overflow and leaves the scale
  alone. Losses are held, not read; reading waits until a step is skipped;
- `step` answers whether it stepped, `skips` is a ledger, and a row of skips that no scale can cure
  is an error that names parameters.

What costs a host synchronisation: as in torch, one read of the flag a step, and a second one for
gradients unscaled beforehand. With a fused optimizer on CUDA torch has none, and neither have we:
outcomes stay on the device, are read sixteen steps at a time or when asked for, and then lack
parameter names, since those gradients are gone.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, replace
from typing import Any, TypedDict, Unpack

import torch
from torch import Tensor
from torch.amp.grad_scaler import OptState, _refresh_per_optimizer_state
from torch.optim import Optimizer

from narrowcast.dropin.autocast import bind_positional, require_amp_device
from narrowcast.errors import CheckpointError, UsageError
from narrowcast.optim.release import require_kept
from narrowcast.precision.device import device_at_hand
from narrowcast.records.run import SkippedStep, SkipReason
from narrowcast.scaling.loss_watch import LossWatch
from narrowcast.scaling.scales import DynamicScale, NoScale, sound_saved_scale
from narrowcast.scaling.skips import (
    SkipLedger,
    SkipLimit,
    SkipRow,
    StepOutcome,
    nonfinite_parameters,
    require_skip_limit,
    skip_reason,
    stuck_error,
)

__all__ = ["GradScaler"]

_SETTINGS = (
    "device",
    "init_scale",
    "growth_factor",
    "backoff_factor",
    "growth_interval",
    "enabled",
)
_STATE_KEY = "narrowcast"


class _Settings(TypedDict, total=False):
    device: str | torch.device | None
    init_scale: float
    growth_factor: float
    backoff_factor: float
    growth_interval: int
    enabled: bool


class GradScaler(torch.amp.GradScaler):
    """`torch.amp.GradScaler` with bounds, causes, outcomes and an end to hopeless rows of skips.

    Called as `torch.amp.GradScaler(device, init_scale, growth_factor, backoff_factor,
    growth_interval, enabled)`, or as the deprecated `torch.cuda.amp.GradScaler(init_scale, ...)`;
    without a device, the one at hand. `floor` is 1, or `init_scale` where that is lower.
    `names=model.named_parameters()` lets messages name parameters. `max_consecutive_skips`: see
    `SkipRow.is_too_long`. The rule and its other options: see `DynamicScale`; those options decide
    on the host, which with a fused optimizer on CUDA costs the read that torch avoids.

    Raises UnsupportedPrecision when enabled for an absent device, UsageError for settings with
    which scaling makes no sense. `update` raises PrecisionError for a row of skips.
    """

    def __init__(
        self,
        *args: Any,
        floor: float | None = None,
        ceiling: float = DynamicScale.ceiling,
        hysteresis: int = 1,
        window_overflows: int = 0,
        calibration_interval: int | None = None,
        max_consecutive_skips: SkipLimit = "auto",
        names: Iterable[tuple[str, Tensor]] = (),
        **settings: Unpack[_Settings],
    ) -> None:
        require_skip_limit(max_consecutive_skips)
        starts_with_scale = bool(args) and isinstance(args[0], int | float)
        positional = _SETTINGS[1:] if starts_with_scale else _SETTINGS
        bound = bind_positional("GradScaler()", positional, args, dict(settings))
        asked = bound.pop("device", None)
        device_type = str(asked).partition(":")[0] if asked else device_at_hand().type
        if bound.get("enabled", True):
            require_amp_device("GradScaler", device_type)
        super().__init__(device_type, **bound)
        self._names = {id(parameter): name for name, parameter in names}
        self._limit = max_consecutive_skips
        self._watch = LossWatch()
        self._ledger = SkipLedger()
        if self._enabled:
            self._rule = DynamicScale(
                scale=self._init_scale,
                growth=self._growth_factor,
                backoff=self._backoff_factor,
                interval=self._growth_interval,
                floor=min(1.0, self._init_scale) if floor is None else floor,
                ceiling=ceiling,
                hysteresis=hysteresis,
                window_overflows=window_overflows,
                calibration_interval=calibration_interval,
            )

    @property
    def last_outcome(self) -> StepOutcome | None:
        """What became of the newest call of `step`; None before the first, or when disabled."""
        return self._ledger.last

    @property
    def skips(self) -> tuple[SkippedStep, ...]:
        """All steps skipped so far, also those before a resumed checkpoint; may read the device."""
        return self._ledger.skips

    @property
    def value(self) -> DynamicScale | NoScale:
        """The scale, its counters and its rule as a value; reads the device."""
        return self._value() if self._enabled else NoScale()

    def _value(self) -> DynamicScale:
        rule = self._rule
        return replace(
            rule,
            scale=min(max(self.get_scale(), rule.floor), rule.ceiling),
            growth=self._growth_factor,
            backoff=self._backoff_factor,
            interval=self._growth_interval,
            good_steps=self._get_growth_tracker(),
        )

    def scale(self, outputs: Any) -> Any:
        """Multiply by the scale as torch's does, and hold the unscaled losses to look at later."""
        if not self._enabled:
            return super().scale(outputs)
        require_kept("GradScaler", outputs=outputs)
        return super().scale(self._watch.passing(outputs))

    def unscale_(self, optimizer: Optimizer) -> None:
        """Divide gradients by the scale, in place, and note whether all are finite."""
        if self._enabled:
            require_kept("GradScaler", optimizer=optimizer)
        super().unscale_(optimizer)

    def step(self, optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
        """Step unless a gradient is not finite.

        Returns what `optimizer.step` returned, or a StepOutcome where that is None.
        """
        if not self._enabled or "closure" in kwargs:
            return super().step(optimizer, *args, **kwargs)
        require_kept("GradScaler", optimizer=optimizer)
        if self._hands_over_unscaled(optimizer):
            self._look_again(optimizer)
        if getattr(optimizer, "_step_supports_amp_scaling", False):
            returned = self._step_fused(optimizer, *args, **kwargs)
        else:
            returned = super().step(optimizer, *args, **kwargs)
        return self._ledger.last if returned is None else returned

    def update(self, new_scale: float | Tensor | None = None) -> None:
        """Move the scale and count the step; raises PrecisionError for a hopeless row of skips."""
        if not self._enabled:
            return
        if new_scale is not None:
            self._require_in_bounds(new_scale)
            super().update(float(new_scale) if isinstance(new_scale, int) else new_scale)
        elif self._ledger.is_plain and len(self._per_optimizer_states) == 1:
            self._move()
        elif not any(s["found_inf_per_device"] for s in self._per_optimizer_states.values()):
            super().update()  # raises torch's own error: nothing was checked since the last update
        elif self._can_advance_unread():
            self._advance_unread()
        else:
            self._advance()
        self._close_step()

    def state_dict(self) -> dict[str, Any]:
        """Return torch's five entries and one of ours, which torch's `load_state_dict` ignores."""
        if not self._enabled:
            return super().state_dict()
        self._ledger.count(floor=self._rule.floor)
        ours = {"rule": asdict(self._value()), "ledger": self._ledger.to_dict()}
        return {**super().state_dict(), _STATE_KEY: ours}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what this class or torch's saved.

        Raises CheckpointError for a scale of 0, infinity or NaN; one outside the bounds is moved
        into them with a warning.
        """
        if not self._enabled or not state_dict:
            super().load_state_dict(state_dict)
            return
        rule = replace(self._rule, overflows_in_row=0, overflows_in_window=0, calibrated=False)
        ledger = SkipLedger()
        if ours := state_dict.get(_STATE_KEY):
            try:
                rule, ledger = DynamicScale(**ours["rule"]), SkipLedger.from_dict(ours["ledger"])
            except (KeyError, TypeError, ValueError, UsageError) as error:
                raise CheckpointError(
                    f"entry {_STATE_KEY!r} of the saved GradScaler cannot be used: {error}",
                    hint=f"delete {_STATE_KEY!r} from the state to load torch's part alone",
                ) from error
        scale = sound_saved_scale(state_dict["scale"], floor=rule.floor, ceiling=rule.ceiling)
        super().load_state_dict({**state_dict, "scale": scale})
        self._rule, self._ledger = rule, ledger

    def __getstate__(self) -> dict[str, Any]:
        if self._enabled:
            self._ledger.count(floor=self._rule.floor)
        # Names are found by the identity of parameters, which another process does not share.
        return {**super().__getstate__(), "_names": {}, "_watch": LossWatch()}

    def _require_in_bounds(self, new_scale: float | Tensor) -> None:
        if isinstance(new_scale, Tensor) and new_scale.numel() != 1:
            return  # torch has an error for that
        wanted, rule = float(new_scale), self._rule
        if not rule.floor <= wanted <= rule.ceiling:
            raise UsageError(
                f"loss scale {wanted} was set by hand, outside [{rule.floor}, {rule.ceiling}]",
                hint="the bounds are options of GradScaler: floor=..., ceiling=...",
            )

    def _hands_over_unscaled(self, optimizer: Optimizer) -> bool:
        """Whether the gradients that torch's `step` is about to see are unscaled already.

        With a scale below 1 unscaling enlarges them, and they may overflow after torch's check; so
        that it can be repeated, unscaling is then done here.
        """
        state = self._per_optimizer_states.get(id(optimizer))
        stage = OptState.READY if state is None else state["stage"]
        if stage is OptState.READY and self._rule.floor < 1 and self._scale is not None:
            self.unscale_(optimizer)
            return True
        return stage is OptState.UNSCALED

    def _look_again(self, optimizer: Optimizer) -> None:
        """Check gradients as the optimizer will see them; torch checks before they can change."""
        assert self._scale is not None, "unscaled gradients have had a scale"
        one, found = torch.ones_like(self._scale), torch.zeros_like(self._scale)
        flags = self._unscale_grads_(optimizer, one, found, allow_fp16=True)
        self._per_optimizer_states[id(optimizer)]["seen_again"] = flags

    def _maybe_opt_step(
        self, optimizer: Optimizer, optimizer_state: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Torch's own place for this decision, with a reason."""
        skip = self._judge(optimizer, optimizer_state)
        self._ledger.record(optimizer, skip)
        return optimizer.step(*args, **kwargs) if skip is None else None

    def _judge(self, optimizer: Optimizer, state: dict[str, Any]) -> SkippedStep | None:
        """Read the flags and, when one is up, why."""
        reason = self._reason_in(state)
        if not reason:
            return None
        return SkippedStep(
            step=self._ledger.steps + 1,
            reason=reason,
            loss_scale=self.get_scale(),
            parameters=nonfinite_parameters(optimizer, self._names),
        )

    def _reason_in(self, state: dict[str, Any]) -> SkipReason:
        """Read an optimizer's flags; the losses are read only when one of them is up."""
        overflow = any(flag.item() for flag in state["found_inf_per_device"].values())
        broken = overflow or any(flag.item() for flag in state.get("seen_again", {}).values())
        if not broken:
            return ""
        scale, _ = self._check_scale_growth_tracker("step")
        bad_loss = bool(self._watch.was_bad(scale.device))
        return skip_reason(overflow=overflow, broken=broken, bad_loss=bad_loss)

    def _step_fused(self, optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
        """Step an optimizer that takes scale and flags on the device and decides there."""
        state = self._per_optimizer_states.get(id(optimizer), {})
        second_look = state.get("seen_again", {})
        first_look = state.get("found_inf_per_device", {})
        if second_look:
            scale, _ = self._check_scale_growth_tracker("step")
            flags = [f.to(scale.device) for f in (*first_look.values(), *second_look.values())]
            # Torch adds the flags up, and its fused kernels skip at exactly 1, so not at 1 + 1.
            state["found_inf_per_device"] = {scale.device: torch.stack(flags).amax()}
        try:
            returned = super().step(optimizer, *args, **kwargs)
        finally:
            if second_look:
                state["found_inf_per_device"] = first_look
        self._record_fused(optimizer, self._per_optimizer_states[id(optimizer)])
        return returned

    def _record_fused(self, optimizer: Optimizer, state: dict[str, Any]) -> None:
        """Record the flags unread; on a CPU, where reading costs nothing, read them at once."""
        if self._reads_are_free():
            self._ledger.record(optimizer, self._judge(optimizer, state))
            return
        scale, _ = self._check_scale_growth_tracker("step")
        looks = [
            torch.stack([torch.zeros_like(scale), *(f.to(scale.device) for f in look.values())])
            for look in (state["found_inf_per_device"], state.get("seen_again", {}))
        ]
        bad_loss = self._watch.was_bad(scale.device)
        flags = torch.stack([*(look.sum() for look in looks), bad_loss, scale])
        self._ledger.record_unread(optimizer, flags)

    def _reads_are_free(self) -> bool:
        scale, _ = self._check_scale_growth_tracker("step")
        return scale.device.type == "cpu"

    def _can_advance_unread(self) -> bool:
        """Whether the device knows all that moves the scale, and the host not yet."""
        states = self._per_optimizer_states.values()
        return (
            self._rule.is_torch_rule
            and bool(self._ledger.attempts)
            and all(outcome.flags is not None for _, outcome in self._ledger.attempts)
            and all(state["stage"] is OptState.STEPPED for state in states)
        )

    def _advance_unread(self) -> None:
        """Move the scale on the device; the same rule as `_advance`, in which nothing is read.

        Torch's kernel counts a finite step up; one that leaves the scale alone is counted down
        beforehand, so that the growth tracker stays where it was.
        """
        scale, tracker = self._check_scale_growth_tracker("update")
        pending = [o.flags for _, o in self._ledger.attempts if o.flags is not None]
        flags = torch.stack(pending)
        overflow = ((flags[:, 0] != 0) & (flags[:, 2] == 0)).any()
        leave = (flags[:, :2] != 0).any() & ~overflow
        tracker.sub_(leave.to(tracker.dtype))
        torch._amp_update_scale_(
            scale,
            tracker,
            overflow.float(),
            self._growth_factor,
            self._backoff_factor,
            self._growth_interval,
        )
        scale.clamp_(self._rule.floor, self._rule.ceiling)
        self._per_optimizer_states = defaultdict(_refresh_per_optimizer_state)

    def _advance(self) -> None:
        """Move the scale from what the host knows.

        Gradients that were unscaled and never stepped with count too, as in torch.
        """
        reasons = {outcome.reason for _, outcome in self._ledger.attempts}
        for state in self._per_optimizer_states.values():
            if state["stage"] is not OptState.STEPPED:
                reasons.add(self._reason_in(state))
        self._move(overflow="gradient overflow" in reasons, stays=not reasons <= {""})

    def _move(self, *, overflow: bool = False, stays: bool = False) -> None:
        """Let the scale follow a step; one that `stays` does so unless there was an overflow."""
        scale, tracker = self._check_scale_growth_tracker("update")
        if (overflow or not stays) and self._rule.is_torch_rule:
            super().update()
            if overflow or self._rule.ceiling < DynamicScale.ceiling:
                scale.clamp_(self._rule.floor, self._rule.ceiling)
            return
        if overflow or not stays:
            self._rule = self._value().after(finite=not overflow)
            scale.fill_(self._rule.scale)
            tracker.fill_(self._rule.good_steps)
        self._per_optimizer_states = defaultdict(_refresh_per_optimizer_state)

    def _close_step(self) -> None:
        attempts = self._ledger.attempts
        newest = self._ledger.close(floor=self._rule.floor)
        self._watch.clear()
        row = self._ledger.row
        if newest is None or not row.is_too_long(self._limit):
            return
        self._ledger.row = SkipRow()  # whoever catches the error gets as many tries again
        named = newest.parameters or tuple(
            name for o, _ in attempts for name in nonfinite_parameters(o, self._names)
        )
        raise stuck_error(row, replace(newest, parameters=named))
