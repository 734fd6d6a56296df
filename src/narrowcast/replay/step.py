"""Takes a moment of a training again, in its precision or in fp32, and tells what happened in it.

Forward, loss and backward run under the engine's own contexts and from its own loss scale, and the
engine does not notice: no gradient arrives in it, no scale moves, no step is counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from narrowcast.compiling import eagerly
from narrowcast.engine.engine import Engine
from narrowcast.engine.gradients import run_backward
from narrowcast.engine.losses import Seeds, unusable_loss
from narrowcast.engine.surroundings import Surroundings
from narrowcast.errors import UsageError
from narrowcast.policy import POLICIES
from narrowcast.precision.cast import backward_context, forward_context, numeric_settings
from narrowcast.precision.full_precision import full_precision, own_tensors
from narrowcast.ranges.histogram import count, read
from narrowcast.records.diagnosis import ExecutedOp
from narrowcast.records.ranges import TensorRange
from narrowcast.replay.moment import Moment
from narrowcast.replay.recorder import OpRecorder, Ranges
from narrowcast.replay.samples import sample

__all__ = ["SEED", "StepTrace", "reference_loss", "replay_step"]

SEED = "loss scale"
"""What events call the gradient that backward starts from, which holds the loss scale."""


@dataclass(frozen=True, kw_only=True, eq=False)
class StepTrace:
    """What one micro-batch did. Gradients are unscaled, as the optimizer would get them of it."""

    precision: str
    """The plan's name, or fp32 for the reference."""
    scale: float
    loss: float
    gradients: Mapping[str, TensorRange]
    """By parameter; those that backward did not reach are missing."""
    events: tuple[ExecutedOp, ...] = ()
    gradient_samples: Mapping[str, Tensor] = field(default_factory=dict)
    """Elements of the gradients, evenly spread."""

    @property
    def is_finite(self) -> bool:
        """Whether the step could be applied."""
        is_usual = self.loss - self.loss == 0  # neither infinite nor NaN
        return is_usual and all(values.is_finite for values in self.gradients.values())


def replay_step(
    engine: Engine,
    compute_loss: Callable[[nn.Module, Any], Tensor],
    moment: Moment,
    *,
    scale: float | None = None,
    policy_reference: bool = False,
    ranges: Ranges | None = "all",
    errors: bool = True,
    samples: int = 0,
) -> StepTrace:
    """Run ``compute_loss(engine.model, moment.batch)`` and its backward pass, leaving no trace.

    `scale` replaces the loss scale that was in force. With `policy_reference` the same happens in
    fp32, from the master weights where there are such, in the mode (training) that the modules are
    in; its scale is 1 unless one is given. `ranges` and `errors` are those of `OpRecorder`; without
    `ranges` (None) there are no events, and it costs little more than a step. Of each gradient
    `samples` elements are kept. What the engine compiled runs uncompiled, where it can be seen.

    Raises UsageError for a loss that backward cannot start from, and inside an autocast.
    """
    _require_outside(engine)
    if scale is None:
        scale = 1.0 if policy_reference else _scale_of(engine, moment)
    passes = _Passes(engine, compute_loss, moment, scale)
    around = _in_fp32(engine) if policy_reference else nullcontext()
    with eagerly(engine.model), moment.at(engine.model), around:
        recorder = None
        if ranges is not None:
            recorder = OpRecorder(engine.model, ranges=ranges, errors=errors, batch=moment.batch)
        with recorder or nullcontext():
            loss = passes.run(recorder, reference=policy_reference)
        gradients, gradient_samples = passes.gradients(samples)
        return StepTrace(
            precision="fp32" if policy_reference else engine.plan.name,
            scale=scale,
            loss=loss.item(),
            gradients=gradients,
            events=() if recorder is None else recorder.events,
            gradient_samples=gradient_samples,
        )


def reference_loss(
    engine: Engine, compute_loss: Callable[[nn.Module, Any], Tensor], moment: Moment
) -> float:
    """Return the loss that fp32 gives on the same weights and batch, by a forward pass alone.

    Nothing is kept for backward, and nothing of the pass stays. Raises UsageError for a loss that
    is no number, and inside an autocast.
    """
    _require_outside(engine)
    policy, kind = POLICIES["fp32"], engine.device.type
    model = engine.model
    with eagerly(model), moment.at(model), _in_fp32(engine), torch.no_grad():
        with Surroundings(policy, kind, forward_context(policy, kind)):
            loss = compute_loss(model, moment.batch)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise unusable_loss(loss)
        return loss.item()


def _require_outside(engine: Engine) -> None:
    if torch.is_autocast_enabled(engine.device.type):
        raise UsageError(
            "a step was to be replayed inside autocast",
            hint="leave engine.forward() or torch.autocast first",
        )


def _scale_of(engine: Engine, moment: Moment) -> float:
    """Return the scale that was in force: the loss's, if there is one loss."""
    scales = moment.scales or engine.loss_scales()
    if len(scales) > 1:
        raise UsageError(
            f"the engine has {len(scales)} losses: {', '.join(sorted(scales))}",
            hint="say at which scale this one is to be replayed: scale=...",
        )
    if not scales:
        raise UsageError(
            "the engine has seen no loss yet, so that its loss scale is not known",
            hint="say at which scale the step is to be replayed: scale=...; a moment that "
            "Moment.of makes knows it",
        )
    return next(iter(scales.values()))


class _Passes:
    """The forward and backward pass of one micro-batch."""

    def __init__(
        self,
        engine: Engine,
        compute_loss: Callable[[nn.Module, Any], Tensor],
        moment: Moment,
        scale: float,
    ) -> None:
        self._engine = engine
        self._compute_loss = compute_loss
        self._batch = moment.batch
        # What engine.backward multiplies by, and engine.step divides by.
        self._factor = scale / engine._accumulate

    def run(self, recorder: OpRecorder | None, *, reference: bool) -> Tensor:
        """Make the gradients; returns the loss."""
        engine, kind = self._engine, self._engine.device.type
        policy = POLICIES["fp32"] if reference else engine.policy
        with Surroundings(policy, kind, forward_context(policy, kind)):
            loss = self._compute_loss(engine.model, self._batch)
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
            raise unusable_loss(loss)
        if recorder is not None:
            recorder.kept()
            recorder.mark(loss, "loss")
        with nullcontext() if recorder is None else recorder.pausing():
            seed = Seeds().of(self._factor, loss)
        if recorder is not None:
            recorder.name(seed, SEED)
        with Surroundings(policy, kind, backward_context(policy, kind)):
            run_backward(loss, seed, retain_graph=False, inputs=None)
        if recorder is not None:
            for name, gradient in self._named_gradients():
                recorder.mark(gradient, name)
        return loss.detach()

    def gradients(self, samples: int) -> tuple[dict[str, TensorRange], dict[str, Tensor]]:
        """Return the ranges of the unscaled gradients, and that many elements of each."""
        counts, kept = {}, {}
        for name, own in self._named_gradients():
            gradient = torch.view_as_real(own.resolve_conj()) if own.is_complex() else own
            unscaled = gradient if self._factor == 1 else gradient.float() / self._factor
            counts[name] = count(unscaled)
            if samples:
                kept[name] = sample(unscaled, samples)
        return dict(zip(counts, read(list(counts.values())), strict=True)), kept

    def _named_gradients(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self._engine.model.named_parameters():
            if parameter.grad is not None:
                yield name, parameter.grad


@contextmanager
def _in_fp32(engine: Engine) -> Iterator[None]:
    """Compute in fp32, from the masters; what a forward pass in training mode writes is dropped.

    To be entered inside `Moment.at`, which puts the buffers back.
    """
    wide: dict[int, Tensor] = {}
    for module in engine.model.modules():
        for name, tensor in own_tensors(module):
            # Without this, full_precision refuses to lose what is written into them.
            if name in module._buffers and tensor.element_size() < 4:
                module._buffers[name] = wide.setdefault(id(tensor), tensor.detach().float())
    with numeric_settings(POLICIES["fp32"]), full_precision(engine.model, engine._masters.widen):
        yield
