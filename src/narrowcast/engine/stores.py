"""Where the optimizer keeps weights and states otherwise than as fp32: who owns the masters.

An engine reads full-precision weights from the optimizer's stores, where there are such, and saves
and loads them through the stores. Whether optimizer, plan and model agree is settled here, before
the first step.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from narrowcast.errors import CheckpointError, UsageError
from narrowcast.optim.convert import narrowed
from narrowcast.optim.narrow import NarrowOptimizer
from narrowcast.optim.release import require_compatible
from narrowcast.parallel.peers import Peers
from narrowcast.parallel.shards import Shards
from narrowcast.plan import OWN, Plan
from narrowcast.precision.cast import kept_parameters

__all__ = [
    "Masters",
    "fit_stores",
    "narrow_averages",
    "planned_optimizer",
    "require_release_fits",
]


class Masters:
    """The fp32 weights behind a model: a store's where it has them, else the weights themselves."""

    def __init__(self, optimizers: Iterable[Optimizer]) -> None:
        self._owners: dict[int, NarrowOptimizer] = {
            id(parameter): optimizer
            for optimizer in optimizers
            if isinstance(optimizer, NarrowOptimizer)
            for group in optimizer.param_groups
            for parameter in group["params"]
        }

    def widen(self, tensor: Tensor) -> Tensor:
        """Return the fp32 values of a parameter or buffer; a new tensor."""
        owner = self._owners.get(id(tensor))
        return tensor.data.to(torch.float32) if owner is None else owner.master(tensor)

    def state_of(self, model: nn.Module) -> dict[str, Any]:
        """Return the model's state dict with masters in the place of the weights they stand for."""
        weights = model.state_dict()
        shared: dict[int, Tensor] = {}  # a tied weight stays one tensor under both its names
        for name, parameter in model.named_parameters(remove_duplicate=False):
            owner = self._owners.get(id(parameter))
            if owner is not None and name in weights and parameter.element_size() < 4:
                if id(parameter) not in shared:
                    shared[id(parameter)] = owner.master(parameter)
                weights[name] = shared[id(parameter)]
        return weights

    def whole_state(self, model: nn.Module, shards: Shards) -> dict[str, Any]:
        """Return what `state_of` would of a model that is not cut, on rank 0; {} on the others.

        Every rank has to ask. Parameters are gathered one at a time, and kept on the CPU.
        """
        found: dict[str, Any] = {}
        for name, value in model.state_dict(keep_vars=True).items():
            piece = shards.named.get(name)
            if piece is None:
                found[name] = self._uncut(value)
            elif piece.name in found:
                found[name] = found[piece.name]
            else:
                narrow = piece.own.element_size() < 4 and id(piece.own) in self._owners
                own = self.widen(piece.own) if narrow else piece.own.detach()
                whole = shards.whole(piece, own)
                found[name] = whole.cpu() if shards.is_main else whole.new_empty(0)
        return found if shards.is_main else {}

    def _uncut(self, value: Any) -> Any:
        """Return the master of a parameter, and whatever else a model's state holds as it is."""
        if not isinstance(value, Tensor):
            return value
        is_narrow = id(value) in self._owners and value.element_size() < 4
        return self.widen(value) if is_narrow else value.detach()

    def load(self, model: nn.Module, state: Mapping[str, Any]) -> None:
        """Load a state dict into the model, and its weights in full into the stores.

        Raises CheckpointError for names or shapes that are not the model's.
        """
        try:
            model.load_state_dict(state)
        except RuntimeError as error:
            raise CheckpointError(
                f"these weights do not fit the model: {error}",
                hint="build the model with the options that it was trained with",
            ) from None
        for name, parameter in model.named_parameters():
            owner = self._owners.get(id(parameter))
            if owner is not None and parameter.element_size() < 4:
                owner.set_master(parameter, state[name].to(parameter.device, torch.float32))


def planned_optimizer(optimizer: Optimizer, model: nn.Module, plan: Plan) -> Optimizer:
    """Return the same update rule with the plan's stores; `optimizer` itself if it is to stay.

    Weights become what their store holds, in place; those of fp32 islands stay fp32. Raises
    UsageError for a rule that has no stores.
    """
    if plan.weights == OWN or isinstance(optimizer, NarrowOptimizer):
        return optimizer
    islands = {id(parameter) for parameter in kept_parameters(model, plan.policy)}
    return narrowed(
        optimizer,
        weights=plan.weights,
        states=plan.states,
        keep_fp32=lambda parameter: id(parameter) in islands,
    )


def fit_stores(model: nn.Module, plan: Plan, optimizers: Mapping[str, Optimizer]) -> None:
    """See that the optimizers' stores are those of the plan, and fit its policy.

    Parameters of fp32 islands and batch norms move into the fp32 store, which is exact. Raises
    UsageError for every other difference.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    kept_fp32 = kept_parameters(model, plan.policy)
    islands = {id(parameter) for parameter in kept_fp32}
    for optimizer in optimizers.values():
        if not isinstance(optimizer, NarrowOptimizer):
            if plan.weights != OWN:
                raise UsageError(
                    f"precision {plan.name!r} keeps weights as {plan.weights} and states as "
                    f"{plan.states}, and {type(optimizer).__name__} has no such stores",
                    hint=_as_planned(plan),
                )
            continue
        optimizer.keep_fp32(kept_fp32)
        for parameter, weights, states in _stored(optimizer):
            name = names.get(id(parameter), "a parameter of another module")
            kept = id(parameter) in islands
            held = "fp32" if weights == "fp32" else "bf16"
            wanted = "fp32" if kept else plan.policy.param
            if held != wanted:
                raise _wrong_format(plan, name, weights, held=held, wanted=wanted)
            asked = "fp32" if kept else plan.weights
            if plan.weights != OWN and (weights, states) != (asked, plan.states):
                raise UsageError(
                    f"precision {plan.name!r} keeps {name} as {asked} with {plan.states} states, "
                    f"and the optimizer keeps it as {weights} with {states}",
                    hint=_as_planned(plan),
                )


def require_release_fits(
    plan: Plan, accumulate: int, clip_norm: float | None, scale: object, peers: Peers
) -> None:
    """Raise UsageError for what needs all gradients at once, if the plan releases them."""
    if plan.gradients == "release":
        if peers.kind:
            raise UsageError(
                f"plan {plan.name!r} releases gradients, and with {peers.kind} a parameter would "
                "step before the ranks have averaged its gradient",
                hint="gradients='keep' in the plan, or train in one process",
            )
        require_compatible(
            accumulate=accumulate, clip_norm=clip_norm, is_loss_scaled=scale is not None
        )


def narrow_averages(ema: Any) -> tuple[str, ...]:
    """Say so where moving averages are kept in 16 bits: they stop moving by small differences."""
    averages = ema.values() if isinstance(ema, Mapping) else (ema,)
    narrow = any(
        p.is_floating_point() and p.element_size() < 4
        for average in averages
        if isinstance(average, nn.Module)
        for p in average.parameters()
    )
    if not narrow:
        return ()
    said = (
        "the EMA averages 16-bit weights in 16 bits, and loses changes below a 512th: give the "
        "engine a function that averages engine.weights(), which are fp32"
    )
    return (said,)


def _stored(optimizer: NarrowOptimizer) -> Iterator[tuple[Tensor, str, str]]:
    """Yield each parameter, the store that it is in, and the one that was asked for its states."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for parameter, held in zip(parameters, optimizer.describe(), strict=True):
        yield parameter, held.weights, optimizer.param_groups[held.group]["states"]


def _wrong_format(plan: Plan, name: str, weights: str, *, held: str, wanted: str) -> UsageError:
    if plan.weights != OWN:
        hint = _as_planned(plan)
    elif wanted == "fp32":
        hint = "choose a precision with bf16 weights, such as bf16-split"
    else:
        hint = "build the optimizer with weights='split16', or choose a precision with fp32 ones"
    return UsageError(
        f"the optimizer stores {name} as {weights} ({held}), and policy {plan.policy.name!r} "
        f"keeps it in {wanted}",
        hint=hint,
    )


def _as_planned(plan: Plan) -> str:
    """Say how an optimizer is built with the stores of a plan."""
    return (
        f"narrowcast.AdamW(model.parameters(), lr=..., weights={plan.weights!r}, "
        f"states={plan.states!r}); SGD and Lion likewise"
    )
