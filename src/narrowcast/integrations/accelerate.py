"""Accelerate: one of our precisions on an Accelerator, whose loop stays as it is.

    accelerator = Accelerator(mixed_precision="fp16")
    precision = attach(accelerator, "fp16")
    model, optimizer, loader, scheduler = precision.prepare(model, optimizer, loader, scheduler)
    for batch in loader:
        loss = compute_loss(model, batch)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        precision.last_outcome.applied

The Accelerator's own autocast does the casting where the policy autocasts; the scaler, the stores
of the optimizer and what the plan puts on the model are ours. fp16 on a CPU, which an Accelerator
quietly computes in fp32, is fp16. A step on gradients that are not finite is skipped in every
precision, and the Accelerator's scheduler waits with it. ``accelerator.save_state`` saves all of
it.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from torch import nn
from torch.optim import Optimizer

from narrowcast.dropin.grad_scaler import GradScaler
from narrowcast.errors import UnsupportedPrecision, UsageError
from narrowcast.integrations.finite_check import FiniteCheck
from narrowcast.integrations.host_plan import HostPlan, Precision
from narrowcast.integrations.hosts import host_module
from narrowcast.policy import Policy
from narrowcast.precision.cast import numeric_settings
from narrowcast.records.run import SkippedStep
from narrowcast.scaling.skips import SkipLimit, StepOutcome

__all__ = ["AttachedPrecision", "attach"]

_OWN_ENGINES = ("DEEPSPEED", "FSDP", "MEGATRON_LM")
"""Ways to distribute that bring a scaler and a loop of their own."""


def attach(
    accelerator: Any,
    precision: Precision,
    *,
    scaler: GradScaler | None = None,
    max_consecutive_skips: SkipLimit = "auto",
) -> AttachedPrecision:
    """Put a precision on an Accelerator, before anything is prepared.

    `precision` is a Plan, a Policy, a name or a JSON file. The Accelerator's `mixed_precision` says
    the same: "fp16" or "bf16" where the policy autocasts, else "no". Raises UsageError where it
    does not.
    """
    host = host_module("accelerate", package="accelerate")
    if not isinstance(accelerator, host.Accelerator):
        raise UsageError(
            f"attach() was given a {type(accelerator).__name__}",
            hint="pass the accelerate.Accelerator, before its prepare()",
        )
    if str(accelerator.distributed_type).rpartition(".")[2] in _OWN_ENGINES:
        raise UnsupportedPrecision(
            f"{accelerator.distributed_type} has a mixed precision of its own",
            hint="use `torchrun -m narrowcast train --parallel fsdp2`, or DDP under Accelerate",
        )
    compiler = str(accelerator.state.dynamo_plugin.backend).rpartition(".")[2]
    if compiler != "NO":
        raise UnsupportedPrecision(
            f"the Accelerator compiles the whole model (torch_compile, dynamo_backend: {compiler})"
            ", and what such a model executes and holds cannot be seen",
            hint="leave that out; narrowcast.Engine(..., compile=True) compiles and counts it",
        )
    if isinstance(accelerator.scaler, FiniteCheck | GradScaler):
        raise UsageError(
            "the Accelerator has a precision of ours already", hint="detach() the first one"
        )
    if accelerator._models or accelerator._optimizers:
        raise UsageError(
            "the Accelerator has prepared a model or an optimizer already",
            hint="call attach(accelerator, ...) first, and its prepare() in place of the "
            "Accelerator's",
        )
    plan = HostPlan(
        precision,
        device=str(accelerator.device),
        scaler=scaler,
        max_consecutive_skips=max_consecutive_skips,
    )
    return AttachedPrecision(accelerator, plan)


class AttachedPrecision:
    """A precision on an Accelerator; `detach` takes it off again."""

    def __init__(self, accelerator: Any, plan: HostPlan) -> None:
        _require_same_words(accelerator, plan.policy)
        plan.require_narrow_sums(
            accelerator.gradient_accumulation_steps, setting="gradient_accumulation_steps"
        )
        self.accelerator = accelerator
        self.host_plan = plan
        self.scaler = plan.scaler
        self._before = (accelerator.native_amp, accelerator.scaler)
        # What the Accelerator decides by the device: with these two it runs fp16 on a CPU as well.
        accelerator.native_amp = plan.policy.autocasts
        accelerator.scaler = plan.scaler
        accelerator.register_for_checkpointing(self)
        self._settings = ExitStack()
        self._settings.enter_context(numeric_settings(plan.policy))

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

    def prepare(self, *objects: Any) -> Any:
        """Prepare models and optimizers for the plan, and then all of it by the Accelerator.

        A scheduler built from an optimizer that got stores goes on to set its learning rates.
        """
        adopted = self.prepare_own(*objects)
        return self.accelerator.prepare(*adopted)

    def prepare_own(self, *objects: Any) -> list[Any]:
        """Do what `prepare` does before it calls the Accelerator's; returns what to pass on."""
        models = [each for each in objects if isinstance(each, nn.Module)]
        for model in models:
            model.to(self.accelerator.device)
        adopted = [self._adopted(each, models) for each in objects]
        for model in models:
            self.host_plan.prepare(model)
            self.host_plan.first_pass.on_first_call(model)
        for each in adopted:
            if isinstance(each, Optimizer):
                self.host_plan.require_fit(each)
        return adopted

    def _adopted(self, given: Any, models: list[nn.Module]) -> Any:
        if not isinstance(given, Optimizer):
            return given
        held = {id(p) for group in given.param_groups for p in group["params"]}
        for model in models:
            if any(id(p) in held for p in model.parameters()):
                return _told_on_the_host(self.host_plan.adopt(given, model))
        raise UsageError(
            f"the {type(given).__name__} holds no parameter of a model that is prepared with it",
            hint="pass model and optimizer to one call of prepare()",
        )

    def detach(self) -> None:
        """Give the Accelerator its own settings back, and the process its numeric ones."""
        self._settings.close()
        self.accelerator.native_amp, self.accelerator.scaler = self._before
        # Each that is registered is saved, and has to be there when the state is loaded.
        registered = self.accelerator._custom_objects
        registered[:] = [each for each in registered if each is not self]

    def state_dict(self) -> dict[str, Any]:
        """Return what ``accelerator.save_state`` does not save itself."""
        return self.host_plan.plan_state()

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Check that the saved precision is this one, and go on from it."""
        self.host_plan.load_plan_state(saved)


def _told_on_the_host(optimizer: Optimizer) -> Optimizer:
    """Have a fused optimizer called only when it is to step, as the Accelerator takes it.

    It would otherwise get the verdict on the device, be called in any case, and count as stepped:
    the scheduler would run ahead. What that costs is the read of the verdict.
    """
    if getattr(optimizer, "_step_supports_amp_scaling", False):
        optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]
    return optimizer


def _require_same_words(accelerator: Any, policy: Policy) -> None:
    """See that the Accelerator was asked for what the policy does."""
    wanted = policy.compute if policy.autocasts else "no"
    if accelerator.mixed_precision != wanted:
        raise UsageError(
            f"policy {policy.name!r} goes with mixed_precision={wanted!r}, and the Accelerator was "
            f"made with {accelerator.mixed_precision!r}",
            hint=f"Accelerator(mixed_precision={wanted!r}); in TrainingArguments "
            + (f"{wanted}=True" if policy.autocasts else "neither fp16 nor bf16"),
        )
    if policy.autocast_rules == "cuda" and accelerator.device.type == "cpu":
        raise UsageError(
            "CUDA's cast rules on a CPU are rehearsed by our own autocast, and an Accelerator "
            "brings its own",
            hint="rehearse with narrowcast.Engine or `narrowcast train --autocast-rules cuda`",
        )
