"""A plan carried out in somebody else's training loop: the parts that all trainers have in common.

The engine owns the order of a step; a trainer has an order of its own, and calls others at fixed
places. What the plan puts on the model, the contexts of forward and backward, the scaler, the
optimizer's stores and the state to save are the same wherever these places are.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from narrowcast.activations.rules import load_rounding_state, rounding_state
from narrowcast.dropin.grad_scaler import GradScaler
from narrowcast.engine.levers import Levers, apply_levers
from narrowcast.engine.parts import (
    choose_plan_for,
    claim,
    require_keys,
    require_same_plan,
    require_unclaimed,
)
from narrowcast.engine.stores import fit_stores, planned_optimizer
from narrowcast.engine.surroundings import Surroundings
from narrowcast.errors import CheckpointError, UsageError
from narrowcast.integrations.finite_check import FiniteCheck
from narrowcast.integrations.first_pass import FirstPass
from narrowcast.integrations.host_scaler import HostScaler
from narrowcast.optim.narrow import NarrowOptimizer
from narrowcast.plan import OWN, Plan
from narrowcast.plan_files import read_plan
from narrowcast.policy import Policy
from narrowcast.precision.cast import backward_context, forward_context, prepare_model
from narrowcast.precision.device import device_at_hand
from narrowcast.randomness import random_state, restore_random_state
from narrowcast.records.codec import to_json
from narrowcast.records.run import SkippedStep
from narrowcast.scaling.skips import SkipLimit, StepOutcome
from narrowcast.training.state_tree import pack, unpack

__all__ = ["HostPlan", "Precision", "is_one_of_many", "plan_for"]

Precision = Plan | Policy | str | Path
"""A plan, a policy, the name of one, or the JSON file that holds one."""


def plan_for(device: torch.device, precision: Precision) -> tuple[Plan, str]:
    """Return the plan and why it is this one; a name ends in .json where it is that of a file."""
    is_file = isinstance(precision, Path) or str(precision).endswith(".json")
    if is_file and isinstance(precision, Path | str):
        return choose_plan_for(device, read_plan(Path(precision)))
    return choose_plan_for(device, precision)  # type: ignore[arg-type]


class HostPlan:
    """One plan in one trainer. `precision` is what an Engine takes, or a file that holds it.

    `device` is the one that the trainer trains on, by default the best at hand. Raises UsageError
    for what only an engine can do, UnsupportedPrecision for what the device cannot.
    """

    def __init__(
        self,
        precision: Precision,
        *,
        device: str | None = None,
        scaler: GradScaler | None = None,
        max_consecutive_skips: SkipLimit = "auto",
    ) -> None:
        self.device = device_at_hand(device)
        self.plan, self.reason = plan_for(self.device, precision)
        self.policy = self.plan.policy
        _require_hostable(self.plan)
        self.scaler = self._scaler(scaler, max_consecutive_skips)
        self.first_pass = FirstPass(self.policy, self._widened)
        self.notes: tuple[str, ...] = ()
        """What the plan did to the model beside the obvious."""
        kind = self.device.type
        self.forward = Surroundings(self.policy, kind, forward_context(self.policy, kind))
        self.backward = Surroundings(self.policy, kind, backward_context(self.policy, kind))
        self._models: list[nn.Module] = []
        self._levers: dict[nn.Module, Levers] = {}
        self._masters: dict[Tensor, Tensor] = {}
        self._checked: WeakSet[Optimizer] = WeakSet()

    def _scaler(self, asked: GradScaler | None, limit: SkipLimit) -> GradScaler | FiniteCheck:
        scales = self.policy.scaling == "dynamic"
        if asked is not None and not (scales and isinstance(asked, GradScaler)):
            raise UsageError(
                f"policy {self.policy.name!r} was given a {type(asked).__module__}."
                f"{type(asked).__name__}",
                hint="fp16 takes a narrowcast.GradScaler, which says what became of each step"
                if scales
                else "leave scaler out: this precision needs none",
            )
        if not scales:
            return FiniteCheck(max_consecutive_skips=limit)
        return asked or HostScaler(self.device.type, max_consecutive_skips=limit)

    @property
    def skips(self) -> tuple[SkippedStep, ...]:
        """All steps that were skipped, also those before a resumed checkpoint."""
        return self.scaler.skips

    @property
    def last_outcome(self) -> StepOutcome | None:
        """What became of the newest step; None before the first."""
        return self.scaler.last_outcome

    def prepare(self, model: nn.Module, *, keep_masters: bool = False) -> None:
        """Make a model obey the plan, in place, on the device where it is.

        With `keep_masters` its fp32 weights are held until `adopt` gives them to an optimizer.
        """
        require_unclaimed(model, self.plan)
        wide = [p for p in model.parameters() if p.dtype is torch.float32]
        if keep_masters and self.plan.weights != OWN:
            self._masters |= {p: p.detach().clone() for p in wide}
        first = next(model.parameters(), None)
        notes = prepare_model(model, self.policy, self.device if first is None else first.device)
        self._levers[model] = apply_levers(model, self.plan)
        self.notes += (*notes, *self._levers[model].notes)
        claim(model, self, self.plan)
        self.scaler._names |= {id(p): name for name, p in model.named_parameters()}
        if model not in self._models:
            self._models.append(model)

    def forget_models(self) -> None:
        """Let go of all models: the trainer is about to train another one, or the same again."""
        self._models.clear()
        self._levers.clear()
        self.notes = ()

    def adopt(self, optimizer: Optimizer, model: nn.Module) -> Optimizer:
        """Return the optimizer with the plan's stores; itself where it has them or none are asked.

        A scheduler that was built for the old one goes on to set the learning rates of the new.
        """
        adopted = planned_optimizer(optimizer, model, self.plan)
        fit_stores(model, self.plan, {"optimizer": adopted})
        if isinstance(adopted, NarrowOptimizer):
            for group in adopted.param_groups:
                for parameter in group["params"]:
                    master = self._masters.pop(parameter, None)
                    if master is not None and parameter.element_size() < 4:
                        adopted.set_master(parameter, master)
        if adopted is not optimizer:
            # A scheduler asks the optimizer it was built for whether it has stepped, and warns.
            optimizer._opt_called = True  # type: ignore[attr-defined]
        return adopted

    def without_effect(self) -> tuple[str, ...]:
        """Say which parts of the plan did nothing in the steps so far; after a step."""
        return tuple(said for each in self._levers.values() for said in each.without_effect())

    def _widened(self) -> int:
        return sum(each.widened_products() for each in self._levers.values())

    def forget_masters(self) -> None:
        """Let go of weights that no optimizer took: there is none, or it keeps them itself."""
        self._masters.clear()

    def require_fit(self, optimizer: Optimizer) -> None:
        """See once that an optimizer is one that this plan can step; raises UsageError if not."""
        if optimizer in self._checked:
            return
        if isinstance(optimizer, torch.optim.LBFGS):
            raise UsageError(
                "LBFGS calls the model several times a step, and each call would need its own "
                "scale, check and clipping",
                hint="train with an optimizer whose step() takes nothing",
            )
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        elsewhere = {p.device.type for p in parameters} - {self.device.type}
        if elsewhere:
            raise UsageError(
                f"the precision was set up for {self.device.type}, and the training is on "
                f"{', '.join(sorted(elsewhere))}",
                hint=f"pass device={min(elsewhere)!r} to it",
            )
        owner = self._owner_of(parameters)
        if owner is not None:
            fit_stores(owner, self.plan, {"optimizer": optimizer})
        self._checked.add(optimizer)

    def _owner_of(self, parameters: list[Tensor]) -> nn.Module | None:
        held = {id(p) for p in parameters}
        for model in self._models:
            if any(id(p) in held for p in model.parameters()):
                return model
        return None

    def require_narrow_sums(self, accumulate: int, *, setting: str) -> None:
        """Refuse to sum micro-batches in 16 bits, as trainers do, where the policy says fp32."""
        if accumulate > 1 and self.policy.param == "bf16" and self.policy.reduce != "bf16":
            raise UsageError(
                f"{setting}={accumulate} sums gradients in the weights' bf16, and policy "
                f"{self.policy.name!r} sums them in {self.policy.reduce}",
                hint="take larger batches, train with narrowcast.Engine, or accept the rounding: "
                "a policy with reduce='bf16'",
            )

    def plan_state(self) -> dict[str, Any]:
        """Return the plan, and where the roundings of lossy levers stand."""
        roundings = [rounding_state(model) for model in self._models]
        return {"plan": to_json(self.plan), "roundings": roundings}

    def load_plan_state(self, saved: Mapping[str, Any]) -> None:
        """Go on from what `plan_state` returned; raises CheckpointError for another plan."""
        require_keys("state of the precision", saved, {"plan", "roundings"})
        require_same_plan(self.plan, saved["plan"])
        if len(saved["roundings"]) != len(self._models):
            raise CheckpointError(
                f"the saved state is of {len(saved['roundings'])} models, and "
                f"{len(self._models)} are prepared",
                hint="prepare the same models before the state is loaded",
            )
        for model, roundings in zip(self._models, saved["roundings"], strict=True):
            load_rounding_state(model, roundings)

    def state_dict(self) -> dict[str, Any]:
        """Return all of the precision that a resumed training needs, and its random states.

        Random states are this process's, so they are left out where it is one of several.
        """
        random: dict[str, Any] = {}
        if not is_one_of_many():
            values, tensors = pack(random_state())
            random = {"values": values, "tensors": tensors}
        state = {"scaler": self.scaler.state_dict(), "random": random}
        return {**self.plan_state(), **state}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` returned; raises CheckpointError for another plan."""
        keys = {"plan", "roundings", "scaler", "random"}
        require_keys("state of the precision", saved, keys)
        self.load_plan_state({key: saved[key] for key in ("plan", "roundings")})
        self.scaler.load_state_dict(saved["scaler"])
        random = saved["random"]
        if random and not is_one_of_many():
            restore_random_state(unpack(random["values"], random["tensors"]))


def _require_hostable(plan: Plan) -> None:
    """Raise UsageError for what a plan asks of the loop itself."""
    if plan.gradients == "release":
        raise UsageError(
            f"plan {plan.name!r} releases gradients, and a trainer looks at them after backward",
            hint="gradients='keep', or train with narrowcast.Engine",
        )
    if plan.micro_batches > 1:
        raise UsageError(
            f"plan {plan.name!r} splits a batch into {plan.micro_batches} micro-batches, which is "
            "the trainer's to do",
            hint="micro_batches=1, with smaller batches and the trainer's own accumulation",
        )


def is_one_of_many() -> bool:
    """Whether this process trains together with others."""
    distributed = torch.distributed
    return (
        distributed.is_available()
        and distributed.is_initialized()
        and distributed.get_world_size() > 1
    )
