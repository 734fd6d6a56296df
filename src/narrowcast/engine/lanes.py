"""One optimizer and what is pending in its gradients: which losses, at which scale, how many.

Gradients in ``.grad`` mean nothing without the scale at which they stand, and a loss scale is found
per loss. A lane keeps the two together from the first backward pass of an effective batch (its
*window*) to the step that closes it, so that gradients of unknown scale never reach an optimizer.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from narrowcast.engine import gradients
from narrowcast.engine.guard import ScheduleGuard, StepGuard, changed_gradient
from narrowcast.engine.views import InParts, View, Whole
from narrowcast.errors import PrecisionError, UsageError
from narrowcast.optim.narrow import NarrowOptimizer
from narrowcast.optim.release import GradientRelease
from narrowcast.parallel.peers import ALONE, Peers
from narrowcast.records.run import SkipReason
from narrowcast.scaling.scales import (
    DynamicScale,
    LossScale,
    NoScale,
    loss_scale_from_dict,
    loss_scale_to_dict,
)
from narrowcast.scaling.skips import SkipRow

__all__ = ["Followers", "Lane", "Progress", "StepReport"]

Followers = dict[str, tuple[Any, Callable[[], Any]]]
"""What follows applied steps, by name: the object, and the call to make."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepReport:
    """What one call of `Engine.step` did."""

    complete: bool = True
    """False in the middle of an accumulation: nothing was done, nothing below is meant."""
    applied: bool = False
    reason: SkipReason = ""
    """Why the step was skipped; empty when it was applied."""
    step: int
    """Number of the step, from 1; skipped ones count."""
    loss_scale: float
    """The scale of this step's gradients, before it moved."""
    gradient_norm: float = math.nan
    """L2 norm over all unscaled gradients, before clipping; NaN where they were released."""
    parameters: tuple[str, ...] = ()
    """Of a skipped step: whose gradients were not finite, nearest the loss first, at most 8."""
    loss: str = ""
    """Of a skipped step: the loss whose backward pass was the first to leave such gradients."""


@dataclass(kw_only=True)
class Progress:
    """How far a lane has come; all of it is saved."""

    tried: int = 0
    """Closed windows: steps applied and steps skipped."""
    applied: int = 0
    row: SkipRow = field(default_factory=SkipRow)
    """Skipped steps since the last applied one."""


def _released(lane: Lane, optimizer: Optimizer) -> GradientRelease:
    """Step the optimizer's parameters during backward for as long as the lane lives."""
    assert isinstance(optimizer, NarrowOptimizer), "a plan that releases gradients has stores"
    release = GradientRelease(optimizer)
    weakref.finalize(lane, release.detach)
    return release


class Lane:
    """One optimizer, what follows its applied steps, and the window that is open.

    `followers` run after each applied step, in order, and are saved where they can be.
    """

    def __init__(
        self,
        name: str,
        optimizer: Optimizer,
        *,
        followers: Followers,
        names: Callable[[], Mapping[int, str]],
        first_scale: Callable[[str], LossScale],
        wide_sums: torch.dtype | None,
        releases: bool = False,
        peers: Peers = ALONE,
    ) -> None:
        self.name = name
        self._peers = peers
        self.optimizer = optimizer
        self.followers = followers
        self._schedules = [f for _, f in followers.values() if isinstance(f, ScheduleGuard)]
        self.progress = Progress()
        self.scales: dict[str, LossScale] = {}
        """The scale of each loss seen so far."""
        self._names = names
        self._view: View = Whole()
        self.source: str | None = None
        """The loss that wrote last into the open window; None when none is open."""
        self.scale = 1.0
        """What the pending gradients stand multiplied by."""
        self._losses: list[tuple[str, Tensor]] = []
        self._checks: list[tuple[str, Tensor]] = []
        """For each change of loss within the window: who wrote before, and was all finite then."""
        self.backwards = 0
        """Backward passes since the last micro-batch was closed."""
        self.micro_batches = 0
        self.has_forwarded = False
        """Whether a forward pass was begun since the last complete step."""
        self._witness = gradients.Witness()
        self._first_scale = first_scale
        self._norm_dtype = gradients.norm_dtype(optimizer)
        self._sums = None if wide_sums is None else gradients.WideSums(wide_sums)
        self._guard = StepGuard(name)
        optimizer.register_step_pre_hook(self._guard)
        self._release = _released(self, optimizer) if releases else None

    def see(self, view: View, names: Callable[[], Mapping[int, str]]) -> None:
        """Go on with another view of the gradients, since the parameters have become others."""
        self._view = view
        self._names = names
        self._norm_dtype = gradients.norm_dtype(self.optimizer)

    def scale_of(self, source: str) -> float:
        """Return the scale of a loss, which begins with its first backward pass."""
        known = self.scales.get(source)
        if known is None:
            known = self.scales[source] = self._first_scale(source)
        return known.scale

    def parameters(self) -> list[Tensor]:
        """List the optimizer's parameters that take gradients now; raises UsageError for none."""
        groups = self.optimizer.param_groups
        found = [p for group in groups for p in group["params"] if p.requires_grad]
        if not found:
            raise UsageError(
                f"all parameters of optimizer {self.name!r} are frozen (requires_grad=False)",
                hint="unfreeze them before its backward pass",
            )
        return found

    def require_ready(self, policy: str) -> None:
        """Raise UsageError unless a forward pass came before, and what is pending is there."""
        if not self.has_forwarded:
            raise UsageError(
                "engine.backward(loss), but engine.forward() was never entered for this step: the "
                f"loss was not computed under policy {policy!r}",
                hint="with engine.forward(): loss = loss_function(model(inputs), targets)",
            )
        self._require_kept()

    def _require_kept(self) -> None:
        """Raise UsageError if what is pending was dropped or changed, or the schedule stepped."""
        for schedule in self._schedules:
            schedule.require_unmoved()
        changed = self._witness.changed(self.optimizer)
        if changed is not None:
            name = self._names().get(id(changed), "a parameter of another module")
            raise changed_gradient(name, self.name, self.scale)
        if self._witness.misses(self.optimizer):
            raise UsageError(
                f"the gradients pending in optimizer {self.name!r} were dropped: "
                f"{max(self.micro_batches, 1)} of the micro-batches of this step would be lost",
                hint="remove optimizer.zero_grad() from the loop, as engine.step() drops gradients "
                "when they are used up; engine.zero_grad() drops a step on purpose",
            )

    def take_over(self, source: str, scale: float) -> None:
        """Make the pending gradients ready for those of another loss: same scale, checked before.

        The check is not read here, so it costs no synchronisation. Rescaling is exact for powers
        of two, but for subnormal results.
        """
        if self.source is None:
            self._require_no_foreign_gradients()
        else:
            pending = self._pending()
            if pending:
                self._checks.append((self.source, gradients.all_finite(pending)))
                if scale != self.scale:
                    gradients.scale(pending, scale / self.scale)
        self.source = source
        self.scale = scale
        self._guard.is_armed = True

    def note(self, source: str, loss: Tensor) -> None:
        """Record a finished backward pass; `loss` is what it started from, before scaling."""
        self._losses.append((source, loss.detach()))
        self.backwards += 1
        self._view.take(self.optimizer)
        if self._sums is not None:
            self._sums.add(self.optimizer)
        self._witness.choose(self.optimizer)
        if self.scale != 1.0 or self._sums is not None or isinstance(self._view, InParts):
            self._witness.mark(self.optimizer)  # else a change is used as it is

    def meets_next(self, accumulate: int) -> bool:
        """Whether ranks add up their gradients in the backward pass to come: it is a step's last.

        Sums in a wider format meet when the step is closed.
        """
        return self._sums is None and self.micro_batches + 1 >= accumulate

    def close(self, accumulate: int, clip_norm: float | None) -> StepReport:
        """Unscale, check, clip and step; or skip. `discard` comes next in either case."""
        self._require_kept()
        if self._sums is not None:
            self._sums.meet(self.optimizer, self._peers)
        elif self._peers.size > 1 and self.micro_batches < accumulate:
            raise UsageError(
                "a step cannot be flushed on several ranks: its gradients meet in the backward "
                "pass of the last micro-batch",
                hint="give every step all of its micro-batches",
            )
        self._view.meet(self.optimizer)
        pending = self._pending()
        if self._release is not None and self._release.arrived:
            return self._close_released(self._release, pending)
        if not pending:
            raise UsageError(
                f"no backward pass reached a parameter of optimizer {self.name!r}",
                hint="does the loss depend on these parameters, and do they require gradients?",
            )
        factor = accumulate / (self.micro_batches * self.scale)
        if factor != 1.0:
            gradients.scale(pending, factor)
        norms = gradients.norms(pending, self._norm_dtype)
        norm = self._view.norm(self.optimizer, norms)
        # The same on every rank: the norm of the same sums, or what ranks told each other of parts.
        if not norm <= gradients.LARGEST_SURE_NORM:
            exact = gradients.exact_norms(pending)
            if self._peers.any(exact is None) or exact is None:
                return self._skip(norm)
            norms, norm = exact, self._view.norm(self.optimizer, exact)
        # Leaves room for rounding: where the coefficient comes out as 1, it changes nothing.
        if clip_norm is not None and norm + 1e-6 > 0.99 * clip_norm:
            self._view.clip(pending, norms, norm, clip_norm)
        self._hand_over()
        self._apply()
        return self._applied(norm)

    def _close_released(self, release: GradientRelease, pending: list[Tensor]) -> StepReport:
        """End a step whose parameters stepped during backward; what is pending steps now.

        Where every gradient was broken nothing has moved, and the step is skipped. Raises
        PrecisionError where only some were: the others have stepped already.
        """
        total = len(release.arrived) + len(pending)
        broken = pending if pending and not bool(gradients.all_finite(pending)) else []
        if broken:
            gradients.discard(self.optimizer)
        self._apply()
        skipped = [*release.skipped, *broken]
        if not skipped:
            return self._applied(math.nan)
        names = self._names()
        said = tuple(names.get(id(p), "a parameter of another module") for p in skipped)
        if len(skipped) < total:
            raise PrecisionError(
                f"step {self.progress.tried + 1}: gradients of {len(skipped)} of {total} "
                f"parameters were not finite ({', '.join(said[:3])}), and the others had stepped "
                "during backward",
                hint="keep the gradients until all are checked: gradients='keep' in the plan",
            )
        report = self._skip(math.nan)
        return replace(report, parameters=said[:8])

    def _pending(self) -> list[Tensor]:
        """List the pending gradients, or their wide sums, as dense tensors."""
        if self._sums is not None:
            return self._sums.collect(self.optimizer)
        return gradients.collect(self.optimizer)

    def _hand_over(self) -> None:
        """Put what `_pending` lists where the optimizer reads it."""
        if self._sums is not None:
            self._sums.round_into_gradients()

    def _apply(self) -> None:
        self._guard.is_armed = False
        self.optimizer.step()

    def _applied(self, norm: float) -> StepReport:
        for source in dict(self._losses):
            self.scales[source] = self.scales[source].after(finite=True)
        progress = self.progress
        progress.tried += 1
        progress.applied += 1
        if progress.row.skipped:
            progress.row = progress.row.after_applied()
        # Counted before: what raises here finds the weights moved, and the count must say so.
        for _, follow in self.followers.values():
            follow()
        return StepReport(
            applied=True, step=progress.tried, loss_scale=self.scale, gradient_norm=norm
        )

    def _skip(self, norm: float) -> StepReport:
        """Count a skipped step and move the scale of the loss at fault; reads the device."""
        self._hand_over()
        source = self._culprit()
        scale = self.scales[source]
        reason: SkipReason = "gradient overflow"
        if source in self._bad_losses():
            reason = "non-finite loss"
            self.scales[source] = scale.after_nonfinite_loss()
        elif isinstance(scale, NoScale):
            reason = "non-finite gradient"
        else:
            self.scales[source] = scale.after(finite=False)
        can_go_down = isinstance(scale, DynamicScale) and not scale.is_at_floor
        progress = self.progress
        progress.tried += 1
        progress.row = progress.row.after_skip(
            curable=can_go_down and reason == "gradient overflow"
        )
        return StepReport(
            reason=reason,
            step=progress.tried,
            loss_scale=scale.scale,
            gradient_norm=norm,
            parameters=self._view.nonfinite(self.optimizer, self._names()),
            loss=source,
        )

    def _culprit(self) -> str:
        """Name the loss whose backward pass was the first to leave a non-finite gradient."""
        assert self.source is not None, "only an open window fails"
        broken = self._peers.any_of_each([not bool(finite) for _, finite in self._checks])
        found = (name for (name, _), bad in zip(self._checks, broken, strict=True) if bad)
        return next(found, self.source)

    def _bad_losses(self) -> set[str]:
        """Name the losses of this window that were not finite themselves, on any rank."""
        values = torch.stack([loss.reshape(()).double() for _, loss in self._losses]).tolist()
        bad = self._peers.any_of_each([not math.isfinite(value) for value in values])
        return {name for (name, _), is_bad in zip(self._losses, bad, strict=True) if is_bad}

    def discard(self) -> None:
        """Drop the window: gradients become None, as after ``zero_grad(set_to_none=True)``."""
        gradients.discard(self.optimizer)
        self._view.discard()
        if self._sums is not None:
            self._sums.discard()
        if self._release is not None and self._release.arrived:
            self._release.end()
        self._witness.dismiss()
        self.source = None
        self._guard.is_armed = False
        self._losses.clear()
        self._checks.clear()
        self.backwards = 0
        self.micro_batches = 0

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the optimizer, of the followers that have one, and the progress."""
        stateful = {"optimizer": self.optimizer} | {
            name: follower
            for name, (follower, _) in self.followers.items()
            if hasattr(follower, "state_dict")
        }
        return {
            "progress": asdict(self.progress),
            "scales": {name: loss_scale_to_dict(scale) for name, scale in self.scales.items()},
        } | {name: part.state_dict() for name, part in stateful.items()}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Load what `state_dict` of a lane with the same parts returned."""
        progress = dict(saved["progress"])
        self.progress = Progress(**progress | {"row": SkipRow(**progress["row"])})
        self.scales = {n: loss_scale_from_dict(scale) for n, scale in saved["scales"].items()}
        self.optimizer.load_state_dict(saved["optimizer"])
        for name in self.followers.keys() & saved.keys():
            self.followers[name][0].load_state_dict(saved[name])
        for schedule in self._schedules:
            schedule.forget()

    def _require_no_foreign_gradients(self) -> None:
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    raise UsageError(
                        f"parameters of {self.name!r} hold gradients that engine.backward did not "
                        "write: at which scale they stand is unknown",
                        hint="call engine.backward(loss) instead of loss.backward() or "
                        "scaler.scale(loss).backward(); engine.zero_grad() drops old gradients",
                    )
