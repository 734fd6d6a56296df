"""Lightning: our precisions as its precision plugins, for the Trainer and for Fabric.

    trainer = Trainer(plugins=[trainer_precision("bf16-split")], gradient_clip_val=1.0)
    fabric = Fabric(plugins=[fabric_precision("16-mixed", device="cpu")])

The trainer keeps its order of a step: forward, backward, the user's hooks, clipping, optimizer,
scheduler. A plugin is asked at each of these places, and here

- fp16 stays fp16 on a CPU, where the Trainer's own ``precision="16-mixed"`` becomes bf16;
- gradients are unscaled before anybody sees or clips them, fused optimizers included;
- a step on gradients that are not finite is skipped in every precision, counted and told:
  ``plugin.skips``, ``plugin.last_outcome``, and the StepOutcome that ``optimizer.step()`` returns;
- a scheduler that steps with the optimizer waits when the optimizer does (Trainer, automatic
  optimization);
- the optimizer of ``configure_optimizers`` gets the plan's stores.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from narrowcast.dropin.grad_scaler import GradScaler
from narrowcast.engine import gradients
from narrowcast.engine.surroundings import Surroundings
from narrowcast.integrations.host_plan import HostPlan, Precision
from narrowcast.integrations.hosts import first_host, mixed_class
from narrowcast.policy import Policy
from narrowcast.precision.cast import (
    backward_context,
    forward_context,
    numeric_settings,
    torch_dtype,
)
from narrowcast.precision.islands import CastInputs, CastOutputs, EnterIsland, cast_nest
from narrowcast.records.run import SkippedStep
from narrowcast.scaling.skips import SkipLimit, StepOutcome

__all__ = ["fabric_precision", "trainer_precision"]

_NEVER = sys.maxsize
"""A scheduler whose turn comes every so many batches does not step after this one."""


def trainer_precision(
    precision: Precision,
    *,
    device: str | None = None,
    scaler: GradScaler | None = None,
    max_consecutive_skips: SkipLimit = "auto",
) -> Any:
    """Return a precision plugin for ``Trainer(plugins=[...])``; see the module.

    `precision` is a Plan, a Policy, a JSON file or a name, Lightning's own among them. `device` is
    what the Trainer's accelerator is ("cpu", "cuda"), by default the best at hand.
    """
    plan = HostPlan(
        precision, device=device, scaler=scaler, max_consecutive_skips=max_consecutive_skips
    )
    names = ("lightning.pytorch.plugins.precision", "pytorch_lightning.plugins.precision")
    base = first_host(names, package="lightning").Precision
    return mixed_class("NarrowcastPrecision", _TrainerHooks, base)(plan)


def fabric_precision(
    precision: Precision,
    *,
    device: str | None = None,
    scaler: GradScaler | None = None,
    max_consecutive_skips: SkipLimit = "auto",
) -> Any:
    """Return a precision plugin for ``Fabric(plugins=[...])``; see `trainer_precision`.

    With a plan that has stores, ``optimizer = plugin.adopt(optimizer, model)`` comes before
    ``fabric.setup(model, optimizer)``. ``fabric.save`` takes the plugin as a part of the state.
    """
    plan = HostPlan(
        precision, device=device, scaler=scaler, max_consecutive_skips=max_consecutive_skips
    )
    names = ("lightning.fabric.plugins.precision", "lightning_fabric.plugins.precision")
    base = first_host(names, package="lightning").Precision
    return mixed_class("NarrowcastPrecision", _FabricHooks, base)(plan)


class _Hooks:
    """What the Trainer and Fabric ask of a plugin in the same words."""

    def __init__(self, plan: HostPlan) -> None:
        self.host_plan = plan
        self.precision = _lightnings_name(plan.policy)
        self.scaler = plan.scaler
        self._scales = plan.policy.scaling != "none"
        self._has_stepped = False
        self._unscaled: set[int] = set()

    @property
    def skips(self) -> tuple[SkippedStep, ...]:
        """All steps that were skipped, also those before a resumed checkpoint."""
        return self.host_plan.skips

    @property
    def last_outcome(self) -> StepOutcome | None:
        """What became of the newest step; None before the first."""
        return self.host_plan.last_outcome

    @property
    def notes(self) -> tuple[str, ...]:
        """What the plan did beside the obvious, and what executed otherwise than asked."""
        return (*self.host_plan.notes, *self.host_plan.first_pass.notes)

    def unscale_gradients(self, optimizer: Optimizer) -> None:
        """Bring gradients to their own scale; a second call before the step does nothing."""
        if not self._scales:
            return
        own = _without_wrapper(optimizer)
        if id(own) not in self._unscaled:
            self._unscaled.add(id(own))
            self.scaler.unscale_(own)

    def _scaled(self, loss: Tensor) -> Tensor:
        self._end_step()
        return self.scaler.scale(loss)  # type: ignore[no-any-return]

    def _step(self, optimizer: Optimizer, **kwargs: Any) -> Any:
        outcome = self.scaler.step(optimizer, **kwargs)
        self._has_stepped = True
        if self._scales:
            self._unscaled.discard(id(optimizer))
        return outcome

    def _end_step(self) -> None:
        """Let the scale move, before it is used again.

        Not at once after a step: another optimizer's gradients may wait at the scale of now.
        """
        if self._has_stepped:
            self._has_stepped = False
            self.scaler.update()

    def state_dict(self) -> dict[str, Any]:
        self._end_step()
        return self.host_plan.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.host_plan.load_state_dict(state_dict)


class _FabricHooks(_Hooks):
    """A plugin of Fabric that carries out a Narrowcast plan."""

    def convert_module(self, module: nn.Module) -> nn.Module:
        self.host_plan.prepare(module)
        self.host_plan.first_pass.on_first_call(module)
        return module

    def forward_context(self) -> Surroundings:
        return self.host_plan.forward

    def convert_output(self, data: Any) -> Any:
        """Cast outputs to the policy's format: the loss is computed outside of autocast."""
        policy = self.host_plan.policy
        return cast_nest(data, torch_dtype(policy.output)) if policy.autocasts else data

    def adopt(self, optimizer: Optimizer, model: nn.Module) -> Optimizer:
        """Return the optimizer with the plan's stores, for ``fabric.setup``."""
        return self.host_plan.adopt(optimizer, model)

    def backward(self, tensor: Tensor, model: nn.Module | None, *args: Any, **kwargs: Any) -> None:
        scaled = self._scaled(tensor)
        with self.host_plan.backward:
            if args or kwargs or scaled.numel() != 1 or not scaled.requires_grad:
                scaled.backward(*args, **kwargs)  # type: ignore[no-untyped-call]
            else:
                gradients.run_backward(
                    scaled, torch.ones_like(scaled), retain_graph=False, inputs=None
                )

    def optimizer_step(self, optimizer: Optimizer, **kwargs: Any) -> Any:
        self.host_plan.require_fit(optimizer)
        if not self.host_plan.first_pass.is_done:
            self.host_plan.first_pass.miss()
        return self._step(optimizer, **kwargs)


class _TrainerHooks(_Hooks):
    """A plugin of the Trainer that carries out a Narrowcast plan."""

    _after_closure: Callable[..., None]
    """The host's own: calls the hooks before a step, and clips."""

    def __init__(self, plan: HostPlan) -> None:
        super().__init__(plan)
        self._module: Any = None
        self._settings = ExitStack()
        """Numeric switches of the process, as the policy has them, until `teardown`."""
        kind = plan.device.type
        self._forward = forward_context(plan.policy, kind)
        self._backward = backward_context(plan.policy, kind)
        self._is_watched = False
        """Whether the first pass has been looked at."""
        self._schedulers: tuple[Any, ...] = ()
        """The Trainer's settings of schedulers that step with the optimizer."""
        self._held: tuple[tuple[Any, int], ...] = ()
        """Those of them that sit out this batch, and how often their turn comes."""

    def convert_module(self, module: nn.Module) -> nn.Module:
        self.host_plan.forget_models()
        self.host_plan.prepare(module, keep_masters=True)
        if not self.host_plan.policy.keeps_master:
            for part in _entrances(module):
                _cast_at(part, self.host_plan.policy)
        self._module = module
        return module

    def connect(
        self, model: nn.Module, optimizers: list[Optimizer], lr_schedulers: list[Any]
    ) -> tuple[nn.Module, list[Optimizer], list[Any]]:
        """Give the optimizers their stores, and see that the Trainer's settings fit the plan."""
        self._settings.enter_context(numeric_settings(self.host_plan.policy))
        self.host_plan.require_narrow_sums(
            _most_accumulated(self._module.trainer), setting="accumulate_grad_batches"
        )
        adopted = [self.host_plan.adopt(each, self._module) for each in optimizers]
        self.host_plan.forget_masters()
        for optimizer in adopted:
            self.host_plan.require_fit(optimizer)
        steps = self._module.automatic_optimization
        self._schedulers = tuple(c for c in lr_schedulers if steps and c.interval == "step")
        return model, adopted, lr_schedulers

    def teardown(self) -> None:
        """Give the process its numeric switches back."""
        self._settings.close()

    def forward_context(self) -> AbstractContextManager[None]:
        return self._forward

    def pre_backward(self, tensor: Tensor, module: Any) -> Any:
        parent: Any = super()
        return parent.pre_backward(self._scaled(tensor), module)

    def backward(self, tensor: Tensor, model: Any, optimizer: Any, *args: Any, **kw: Any) -> None:
        with self._backward:
            model.backward(tensor, *args, **kw)

    def optimizer_step(
        self, optimizer: Optimizer, model: Any, closure: Callable[[], Any], **kwargs: Any
    ) -> Any:
        """Run forward and backward, then clip and step; returns the StepOutcome."""
        if self._held:
            self._release_schedulers()
        loss = closure() if self._is_watched else self._watched(closure, model)
        if loss is None and model.automatic_optimization:  # training_step chose to leave it out
            self._hold_schedulers()
            return None
        self.unscale_gradients(optimizer)
        self._after_closure(model, optimizer)
        outcome = self._step(optimizer, **kwargs)
        if self._schedulers and self.last_outcome is not None and not self.last_outcome.applied:
            self._hold_schedulers()
        return outcome

    def clip_gradients(
        self, optimizer: Optimizer, clip_val: float = 0.0, *args: Any, **kwargs: Any
    ) -> None:
        """Clip at the gradients' own scale, also when a manual optimization asks for it."""
        if clip_val > 0:
            parent: Any = super()
            self.unscale_gradients(optimizer)
            parent.clip_gradients(_without_wrapper(optimizer), clip_val, *args, **kwargs)

    def clip_grad_by_norm(self, optimizer: Optimizer, clip_val: float) -> None:
        """Clip by the norm over all gradients, summed in fp32 whatever they are in."""
        pending = gradients.collect(optimizer)
        if pending:
            norms = gradients.norms(pending, gradients.norm_dtype(optimizer))
            gradients.clip(pending, norms, clip_val)

    def _watched(self, closure: Callable[[], Any], model: nn.Module) -> Any:
        self._is_watched = True
        return self.host_plan.first_pass.watched(closure, model)

    def _release_schedulers(self) -> None:
        for settings, frequency in self._held:
            settings.frequency = frequency
        self._held = ()

    def _hold_schedulers(self) -> None:
        self._held = tuple((settings, settings.frequency) for settings in self._schedulers)
        for settings, _ in self._held:
            settings.frequency = _NEVER


def _most_accumulated(trainer: Any) -> int:
    """Return how many batches a step is of, at most: the setting, or a callback's schedule."""
    schedules = [getattr(callback, "scheduling", {}) for callback in trainer.callbacks]
    most: int = max([trainer.accumulate_grad_batches, *(n for s in schedules for n in s.values())])
    return most


def _without_wrapper(optimizer: Any) -> Optimizer:
    """Return the optimizer itself; loops hold wrappers of it, which are none."""
    return optimizer if isinstance(optimizer, Optimizer) else optimizer.optimizer


def _lightnings_name(policy: Policy) -> str:
    """Return Lightning's nearest name, by which it counts bits and strategies choose."""
    if policy.autocasts:
        return "16-mixed" if policy.compute == "fp16" else "bf16-mixed"
    return "32-true" if policy.keeps_master else "bf16-true"


def _entrances(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules with weights that a LightningModule's steps may call directly.

    Its own ``forward`` need not be called at all, so its borders are those of its children.
    """
    for child in module.children():
        if isinstance(child, nn.ModuleList | nn.ModuleDict):
            yield from _entrances(child)
        elif next(child.parameters(), None) is not None:
            yield child


def _cast_at(part: nn.Module, policy: Policy) -> None:
    """Cast what enters and leaves a module with 16-bit weights; an fp32 island casts its inputs."""
    if not any(isinstance(hook, EnterIsland) for hook in part._forward_pre_hooks.values()):
        cast = CastInputs(torch_dtype(policy.compute))
        part.register_forward_pre_hook(cast, with_kwargs=True, prepend=True)
    part.register_forward_hook(CastOutputs(torch_dtype(policy.output)))
