"""The order of a training step in every precision: forward, backward, unscale, check, clip, step.

The order is the whole point. Clipping before unscaling clips to a limit 65,536 times too small; a
scheduler that steps with the loop, not with the weights, runs ahead whenever a step is skipped; a
scale that moves between two micro-batches adds gradients of different units. Nothing of that raises
in a plain ``torch.amp`` loop. Here the engine owns the order and tells what it did:

    engine = Engine(model, optimizer, "fp16", scheduler=scheduler, clip_norm=1.0)
    for inputs, targets in batches:
        with engine.forward():
            loss = loss_function(model(inputs), targets)
        engine.backward(loss)
        report = engine.step()

One step, in pseudo-code, for losses l with scales s[l] (Micikevicius et al. 2018, section 3):

    gradients  <- sum over micro-batches of  d(s * loss / accumulate)      in backward
    gradients  <- gradients / s
    norm       <- L2 norm over all gradients, in fp32                      one read of the device
    if finite:    clip; optimizer, scheduler, EMA; s <- s.after(finite=True)
    else:         nothing moves but s, and that only if the loss itself was finite
    gradients  <- None
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from narrowcast.activations.rules import load_rounding_state, rounding_state
from narrowcast.engine import gradients
from narrowcast.engine.compiled import compiled, levers_beside
from narrowcast.engine.evaluation import evaluation, evaluation_in_fp32
from narrowcast.engine.lanes import Lane, StepReport
from narrowcast.engine.levers import apply_levers
from narrowcast.engine.losses import Seeds, unusable_loss
from narrowcast.engine.parts import (
    ONLY,
    AskedScale,
    build_lanes,
    choose_device,
    choose_plan_for,
    claim,
    follow_weights,
    require_keys,
    require_numbers,
    require_prepared,
    require_same_plan,
    require_unclaimed,
    weight_formats,
)
from narrowcast.engine.sharding import put_in_parts
from narrowcast.engine.state import load_lanes, load_optimizers, require_boundary
from narrowcast.engine.stores import Masters, fit_stores, narrow_averages, require_release_fits
from narrowcast.engine.surroundings import Forward, Surroundings
from narrowcast.errors import UnknownName, UsageError
from narrowcast.parallel.peers import ALONE, Peers
from narrowcast.parallel.shards import Shards
from narrowcast.plan import Plan
from narrowcast.policy import Policy
from narrowcast.precision.cast import backward_context, forward_context, prepare_model
from narrowcast.records.codec import from_json, to_json
from narrowcast.records.run import SkippedStep
from narrowcast.scaling.skips import SkipLimit, SkipRow, stuck_error

__all__ = ["Engine", "StepReport"]

_LOSS = "loss"
"""The name of a loss that has none."""


class Engine:
    """Trains `model` with `optimizer` in the precision `policy`: a Policy, Plan, name or 'auto'.

    The model is prepared in place (`cast.prepare_model`) on `device`, by default the one it is on.
    The optimizer must hold parameters of the model. `accumulate` micro-batches make one step: each
    loss is divided by it, so that equal micro-batches give the gradient of their union's mean.
    `clip_norm` limits the L2 norm of the unscaled gradients. `scheduler` and `ema` (AveragedModel,
    or a function of the model) follow applied steps only. `scale` replaces the policy's own way of
    scaling: a value of ``scaling``, a number to keep, or a mapping of loss names to these.

    `optimizer` may be a mapping of names to optimizers, with mappings of `scheduler` and `ema`:
    ``engine.backward(loss, "g")`` then writes gradients into parameters of optimizer "g" alone.

    `peers` are the other ranks that train the same weights: their losses are averaged as those of
    micro-batches are, and a step is applied on all or on none. `compile` compiles the model's
    calls with inductor, or with the backend of this name (``compiling``).

    Raises UsageError for parts that do not belong together, UnsupportedPrecision for a policy that
    the device cannot compute in.
    """

    _shards: Shards | None = None
    """This rank's part of the weights, where they are shared out."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | Mapping[str, Optimizer],
        policy: Policy | Plan | str,
        *,
        scheduler: Any = None,
        accumulate: int = 1,
        clip_norm: float | None = None,
        ema: Any = None,
        device: torch.device | str | None = None,
        scale: AskedScale = None,
        max_consecutive_skips: SkipLimit = "auto",
        peers: Peers = ALONE,
        compile: bool | str = False,  # noqa: A002 -- torch's own word
    ) -> None:
        require_numbers(accumulate, clip_norm, max_consecutive_skips)
        self.model = model
        self.device = choose_device(model, device)
        self.plan, self.policy_reason = choose_plan_for(self.device, policy)
        self.policy = self.plan.policy
        require_unclaimed(model, self.plan)
        self._accumulate = accumulate * self.plan.micro_batches
        self._shares = self._accumulate * peers.size
        self._clip_norm, self._limit = clip_norm, max_consecutive_skips
        self._skips: list[SkippedStep] = []
        self._inside: str | None = None
        self._seeds = Seeds()
        optimizers = optimizer if isinstance(optimizer, Mapping) else {ONLY: optimizer}
        fit_stores(model, self.plan, optimizers)
        require_release_fits(self.plan, self._accumulate, clip_norm, scale, peers)
        self._masters = Masters(optimizers.values())
        before = weight_formats(optimizers.values())
        self.restored: list[str] = []
        """Weights and buffers that the model itself wrote in an evaluation in fp32; see there."""
        self.notes = (
            *prepare_model(model, self.policy, self.device),
            *follow_weights(optimizers, before),
            *narrow_averages(ema),
        )
        self.levers = apply_levers(model, levers_beside(self.plan, compile))
        self._lanes = build_lanes(
            model,
            self.plan,
            optimizer,
            scheduler=scheduler,
            ema=ema,
            accumulate=self._accumulate,
            scale=scale,
            peers=peers,
        )
        self._only = None if isinstance(optimizer, Mapping) else self._lanes[ONLY]
        kind = self.device.type
        self._around_forward = Surroundings(self.policy, kind, forward_context(self.policy, kind))
        self._forward = Forward(self, self._around_forward)
        self._around_backward = Surroundings(self.policy, kind, backward_context(self.policy, kind))
        self._around_step = Surroundings(self.policy, kind)
        self.compiled, said = compiled(model, self.plan, compile, self.device, peers)
        self.notes += said
        claim(model, self, self.plan)

    def forward(self) -> AbstractContextManager[None]:
        """Return the context for the forward pass and the loss: autocast as the policy says."""
        return self._forward

    def backward(
        self,
        loss: Tensor,
        name: str | None = None,
        *,
        optimizer: str | None = None,
        retain_graph: bool = False,
    ) -> None:
        """Add the gradients of ``scale * loss / accumulate`` to those pending.

        `name` is the loss's, and with several optimizers the optimizer's too, unless `optimizer`
        says which; every loss has its own scale. A pass that raises drops what was pending.
        """
        if self._inside is not None or torch.is_autocast_enabled(self.device.type):
            raise self._refusal("engine.backward", self._inside or "autocast")
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
            raise unusable_loss(loss)
        lane, source = self._route(name, optimizer)
        lane.require_ready(self.policy.name)
        scale = lane.scale_of(source)
        if lane.source != source:
            lane.take_over(source, scale)
        try:
            with self._around_backward:
                gradients.run_backward(
                    loss,
                    self._seeds.of(scale / self._shares, loss),
                    retain_graph=retain_graph,
                    inputs=None if self._only is not None else lane.parameters(),
                )
                lane.note(source, loss)
        except BaseException:
            lane.discard()
            raise

    def step(self, name: str | None = None, *, flush: bool = False) -> StepReport:
        """Close a micro-batch; with the last one of an accumulation, or `flush`, make the step.

        Gradients are None afterwards. `flush` makes the step from the micro-batches that there are,
        normalised to their number. One read of the device a step, a few more when it is skipped.

        Raises PrecisionError after too many skipped steps in a row (`SkipRow.is_too_long`);
        UsageError when there was no backward pass, or none that reached the optimizer.
        """
        if self._inside is not None:
            raise self._refusal("engine.step", self._inside)
        lane = self._lane(name)
        if lane.backwards:
            lane.micro_batches += 1
            lane.backwards = 0
        elif not flush:
            raise UsageError(
                f"engine.step() without engine.backward() before it (optimizer {lane.name!r})",
                hint="call engine.backward(loss), and engine.step() once per micro-batch",
            )
        if lane.micro_batches == 0 or (lane.micro_batches < self._accumulate and not flush):
            return StepReport(complete=False, step=lane.progress.tried + 1, loss_scale=lane.scale)
        try:
            with self._around_step:
                report = lane.close(self._accumulate, self._clip_norm)
        finally:
            lane.discard()
            lane.has_forwarded = False
        return report if report.applied else self._record(lane, report)

    def adopt(self, shards: Shards) -> None:
        """Go on with this rank's part of each weight, before the first step.

        Raises UsageError for an optimizer that needs whole parameters.
        """
        self._shards = shards
        self._masters = put_in_parts(shards, self._lanes)

    def meets_next(self) -> bool:
        """Whether ranks add up gradients in the backward pass to come: it ends a step."""
        return all(lane.meets_next(self._accumulate) for lane in self._lanes.values())

    def begins_next(self) -> bool:
        """Whether the forward pass to come is the first of a step."""
        return all(lane.micro_batches == 0 for lane in self._lanes.values())

    def zero_grad(self, name: str | None = None) -> None:
        """Drop pending gradients and the micro-batches counted so far, of one optimizer or all."""
        for lane in self._lanes.values() if name is None else (self._lane(name),):
            lane.discard()

    @contextmanager
    def evaluating(
        self,
        precision: Literal["fp32", "training"] = "fp32",
        *,
        model: nn.Module | None = None,
    ) -> Iterator[str]:
        """Evaluate the model (or `model`, such as an EMA) without gradients, in evaluation mode.

        In full precision from the stored weights, with autocast and TF32 off, or under the
        policy's own forward context. Yields the label for the figures: 'fp32' or the policy's name.
        What the model's own forward pass writes in fp32 ends with it, and is named in `restored`.
        """
        if precision not in ("fp32", "training"):
            raise UnknownName.of("evaluation precision", precision, ("fp32", "training"))
        target = self.model if model is None else model
        if precision == "training":
            require_prepared(target, self.model, self.policy)
        if self._inside is not None:
            raise self._refusal("engine.evaluating()", self._inside)
        self._inside = "engine.evaluating()"
        try:
            if precision == "fp32":
                widen = self._masters.widen
                cut = nullcontext() if self._shards is None else self._shards.widened(widen)
                with cut, evaluation_in_fp32(target, widen) as rewritten:
                    yield "fp32"
                self.restored += [name for name in rewritten if name not in self.restored]
            else:
                with evaluation(target, self._around_forward):
                    yield self.policy.name
        finally:
            self._inside = None

    @property
    def optimizers(self) -> dict[str, Optimizer]:
        """The optimizers by name."""
        return {name: lane.optimizer for name, lane in self._lanes.items()}

    @property
    def skips(self) -> tuple[SkippedStep, ...]:
        """All steps that were skipped, in order, also those before a resumed checkpoint."""
        return tuple(self._skips)

    def tried_steps(self, name: str | None = None) -> int:
        """Count an optimizer's steps, applied and skipped."""
        return self._lane(name).progress.tried

    def applied_steps(self, name: str | None = None) -> int:
        """Count an optimizer's applied steps."""
        return self._lane(name).progress.applied

    def loss_scales(self, name: str | None = None) -> dict[str, float]:
        """Return the current scale of each loss that an optimizer has seen."""
        return {loss: s.scale for loss, s in self._lane(name).scales.items()}

    def weights(self) -> dict[str, Any]:
        """Return the model's state dict, with the fp32 masters of an optimizer that stores them.

        Of shards every rank has to ask, and rank 0 gets the whole.
        """
        if self._shards is not None:
            return self._masters.whole_state(self.model, self._shards)
        return self._masters.state_of(self.model)

    def load_weights(self, state: Mapping[str, Any]) -> None:
        """Load what `weights` returned, or any state dict of the model, and into the stores too.

        Raises CheckpointError for names or shapes that are not the model's.
        """
        require_boundary(self._lanes, self._accumulate, "load_weights")
        self._masters.load(self.model, state)

    def state_dict(self) -> dict[str, Any]:
        """Return all that is needed to continue, but for the model's weights and random states.

        Raises UsageError inside an accumulation: pending gradients are not saved.
        """
        require_boundary(self._lanes, self._accumulate, "state_dict")
        return {
            "plan": to_json(self.plan),
            "lanes": {name: lane.state_dict() for name, lane in self._lanes.items()},
            "skips": to_json(self._skips),
            "roundings": rounding_state(self.model),
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` returned.

        Raises CheckpointError when policy, optimizers, schedulers or EMAs differ from the saved.
        """
        require_boundary(self._lanes, self._accumulate, "load_state_dict")
        require_keys("state of the engine", saved, set(self.state_dict()))
        require_same_plan(self.plan, saved["plan"])
        load_lanes(self._lanes, saved["lanes"])
        self._skips = [from_json(SkippedStep, skip) for skip in saved["skips"]]
        load_rounding_state(self.model, saved["roundings"])

    def load_optimizer(self, saved: Mapping[str, Any]) -> None:
        """Load only the optimizers' states of what `state_dict` returned: their masters are there.

        For an engine that is to evaluate, without the scheduler that the training had.
        """
        load_optimizers(self._lanes, saved["lanes"])

    def _record(self, lane: Lane, report: StepReport) -> StepReport:
        """Write a skipped step into the ledger, and give up when there were too many in a row."""
        skip = SkippedStep(
            step=report.step,
            reason=report.reason,
            loss_scale=report.loss_scale,
            parameters=report.parameters,
        )
        self._skips.append(skip)
        row = lane.progress.row
        if row.is_too_long(self._limit):
            lane.progress.row = SkipRow()  # whoever catches the error gets as many tries again
            raise stuck_error(row, skip)
        return report

    @staticmethod
    def _refusal(what: str, where: str) -> UsageError:
        return UsageError(
            f"{what} was called inside {where}",
            hint="close the with block first: only the forward pass and the loss belong inside it",
        )

    def _lane(self, name: str | None) -> Lane:
        if name is None and self._only is not None:
            return self._only
        if name is None:
            raise UsageError(
                "which optimizer?", hint=f"name one of {', '.join(map(repr, self._lanes))}"
            )
        if callable(name):
            raise UsageError(
                "engine.step takes no closure, as each call of it would need a scale of its own",
                hint="compute the loss before, under engine.forward(), and call engine.backward",
            )
        if name not in self._lanes:
            raise UnknownName.of("optimizer", name, self._lanes)
        return self._lanes[name]

    def _route(self, name: str | None, optimizer: str | None) -> tuple[Lane, str]:
        """Return the lane that a loss writes into, and the loss's name."""
        if self._only is not None and optimizer is None:
            return self._only, name or _LOSS
        lane = self._lane(name if optimizer is None else optimizer)
        return lane, name or lane.name
