"""What an engine is built from, and whether the parts belong together.

A scheduler of another optimizer, an optimizer of another model, an EMA of half the parameters: in a
plain loop each of these trains something, quietly. They are found here, before the first step.
"""

from __future__ import annotations

import gc
import inspect
import math
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from narrowcast.engine.guard import ScheduleGuard
from narrowcast.engine.lanes import Followers, Lane
from narrowcast.errors import CheckpointError, UnknownName, UsageError
from narrowcast.parallel.peers import Peers
from narrowcast.plan import PLANS, Plan
from narrowcast.policy import Policy
from narrowcast.precision.cast import format_name, torch_dtype
from narrowcast.precision.device import device_at_hand, require, resolve_plan
from narrowcast.records.codec import to_json
from narrowcast.scaling.scales import DynamicScale, LossScale, NoScale, StaticScale
from narrowcast.scaling.skips import SkipLimit, require_skip_limit

__all__ = [
    "ONLY",
    "AskedScale",
    "build_lanes",
    "choose_device",
    "choose_plan_for",
    "claim",
    "follow_weights",
    "require_keys",
    "require_numbers",
    "require_prepared",
    "require_same_plan",
    "require_unclaimed",
    "weight_formats",
]

ONLY = "optimizer"
"""The lane's name where there is one optimizer."""

_OWNERS: weakref.WeakKeyDictionary[nn.Module, tuple[weakref.ref[Any], Plan]] = (
    weakref.WeakKeyDictionary()
)
"""The newest engine of each model, and the plan that it prepared the model for."""

AskedScale = LossScale | float | Mapping[str, LossScale | float] | None


def require_numbers(
    accumulate: int, clip_norm: float | None, max_consecutive_skips: SkipLimit
) -> None:
    """Raise UsageError unless all make sense."""
    if not isinstance(accumulate, int) or isinstance(accumulate, bool) or accumulate < 1:
        raise UsageError(
            f"accumulate={accumulate!r}: it is the number of micro-batches in a step",
            hint="1 makes a step of every backward pass",
        )
    is_number = isinstance(clip_norm, (int, float)) and not isinstance(clip_norm, bool)
    if clip_norm is not None and not (is_number and 0 < clip_norm < math.inf):
        raise UsageError(
            f"clip_norm={clip_norm!r}: it is the largest L2 norm of the gradients to step with",
            hint="leave it out to clip nothing; the norm is reported all the same",
        )
    require_skip_limit(max_consecutive_skips)


def claim(model: nn.Module, engine: object, plan: Plan) -> None:
    """Note that the model is prepared for this engine; neither is kept alive by it."""
    _OWNERS[model] = (weakref.ref(engine), plan)


def require_unclaimed(model: nn.Module, plan: Plan) -> None:
    """Raise UsageError if an engine that still lives prepared the model for another plan."""
    owner, owners_plan = _OWNERS.get(model, (None, plan))
    if owner is None or _preparation(owners_plan) == _preparation(plan) or owner() is None:
        return
    gc.collect()  # an engine holds itself in a cycle, so that it may be dropped and not yet gone
    if owner() is not None:
        raise UsageError(
            f"the model belongs to an engine with precision {owners_plan.name!r}, and a second one "
            f"with {plan.name!r} would change it under the first",
            hint="use the engine that there is, build a model for each precision, or let go of the "
            "first engine (del engine) before",
        )


def _preparation(plan: Plan) -> tuple[object, ...]:
    """Return what a plan changes in a model itself; autocast lives in the engine's contexts."""
    return (
        plan.policy.param,
        plan.policy.keep_fp32,
        plan.policy.linears,
        plan.gradients,
        plan.activations,
        plan.loss,
    )


def choose_device(model: nn.Module, asked: torch.device | str | None) -> torch.device:
    """Return the device asked for, or the one that the model is on."""
    if not isinstance(model, nn.Module):
        raise UsageError(
            f"a {type(model).__name__} stands where the model belongs",
            hint="Engine(model, optimizer, policy): the torch.nn.Module to be trained comes first",
        )
    if asked is not None:
        return device_at_hand(str(asked))
    found = {p.device for p in model.parameters()}
    if len(found) > 1:
        raise UsageError(
            f"the model's parameters are on {', '.join(sorted(map(str, found)))}",
            hint="an engine trains on one device: pass device=... to move them all there",
        )
    return found.pop() if found else device_at_hand()


def choose_plan_for(device: torch.device, asked: Plan | Policy | str) -> tuple[Plan, str]:
    """Return the plan and why it is this one; raises UnsupportedPrecision if it cannot be."""
    if isinstance(asked, str):
        return resolve_plan(asked, device)
    if not isinstance(asked, (Plan, Policy)):
        raise UsageError(
            f"the policy is {asked!r:.80}, a {type(asked).__name__}",
            hint=f"pass a Policy, a Plan or a name: auto, {', '.join(PLANS)}",
        )
    plan = asked if isinstance(asked, Plan) else Plan(name=asked.name, policy=asked)
    require(plan.policy, device)
    return plan, "as asked"


def require_prepared(model: nn.Module, trained: nn.Module, policy: Policy) -> None:
    """Raise UsageError for a copy that would not compute as the model that is trained does.

    Autocast works on any model; a policy with 16-bit weights only on one that has them.
    """
    param = torch_dtype(policy.param)
    formats, own = ({p.dtype for p in m.parameters()} for m in (model, trained))
    if not policy.keeps_master and param in own and param not in formats:
        raise UsageError(
            f"policy {policy.name!r} stores weights in {policy.param}, and this model has none: it "
            "was copied before the engine prepared the trained one, and would compute in "
            f"{', '.join(sorted(map(format_name, formats)))}",
            hint='evaluate it in full precision, engine.evaluating("fp32", model=...), or build '
            "the average from the model after the engine",
        )


Formats = dict[int, tuple[torch.dtype, torch.device]]


def weight_formats(optimizers: Iterable[Optimizer]) -> Formats:
    """Return dtype and device of every optimizer's parameters, by their id."""
    groups = (g for each in optimizers if isinstance(each, Optimizer) for g in each.param_groups)
    return {id(p): (p.dtype, p.device) for group in groups for p in group["params"]}


def follow_weights(optimizers: Mapping[str, Optimizer], before: Formats) -> tuple[str, ...]:
    """Cast and move the states of optimizers whose weights were; returns what is to be said of it.

    The rules are those by which torch loads a saved state. Only torch's own optimizers are known to
    keep them; what others hold is left to them.
    """
    notes = []
    for name, optimizer in optimizers.items():
        after = weight_formats([optimizer])
        changed = any(before[key] != now for key, now in after.items())
        if not changed or not _is_torchs_own(optimizer) or not optimizer.state:
            continue
        optimizer.load_state_dict(optimizer.state_dict())
        if narrow := {now[0] for key, now in after.items() if now[0] is not before[key][0]}:
            formats = ", ".join(sorted(map(format_name, narrow)))
            notes.append(f"the state that {name!r} brought was cast to {formats} with its weights")
    return tuple(notes)


def _is_torchs_own(optimizer: Optimizer) -> bool:
    return type(optimizer).step.__module__.startswith("torch.optim.")


def build_lanes(
    model: nn.Module,
    plan: Plan,
    optimizer: Optimizer | Mapping[str, Optimizer],
    *,
    scheduler: Any,
    ema: Any,
    accumulate: int,
    scale: AskedScale,
    peers: Peers,
) -> dict[str, Lane]:
    """Make a lane of each optimizer, with its scheduler and EMA."""
    for one in scale.values() if isinstance(scale, Mapping) else (scale,):
        if one is not None:
            _as_scale(one)  # a wrong one is refused now, not by the first loss
    several = isinstance(optimizer, Mapping)
    optimizers = optimizer if isinstance(optimizer, Mapping) else {ONLY: optimizer}
    schedulers, emas = (
        _by_name(what, part, optimizers) if several else {ONLY: part}
        for what, part in (("scheduler", scheduler), ("ema", ema))
    )
    if not optimizers:
        raise UsageError("an empty mapping of optimizers", hint="pass at least one")
    for name, candidate in optimizers.items():
        _require_plain_step(candidate, name)
    _require_membership(model, optimizers, several=several)
    policy = plan.policy
    reduce = torch_dtype(policy.reduce)
    narrow = any(p.element_size() < reduce.itemsize for p in model.parameters())
    return {
        name: Lane(
            name,
            each,
            followers=_followers(each, schedulers.get(name), emas.get(name), model),
            names=lambda: {id(p): name for name, p in model.named_parameters()},
            first_scale=lambda source: _first_scale(source, policy, scale),
            wide_sums=reduce if narrow and accumulate > 1 and not peers.cuts else None,
            releases=plan.gradients == "release",
            peers=peers,
        )
        for name, each in optimizers.items()
    }


def _by_name(what: str, part: Any, optimizers: Mapping[str, Optimizer]) -> Mapping[str, Any]:
    if part is None:
        return {}
    if not isinstance(part, Mapping):
        raise UsageError(
            f"{what} is one {type(part).__name__}, but there are several optimizers",
            hint=f"pass a mapping, such as {what}={{{next(iter(optimizers))!r}: ...}}",
        )
    for name in part:
        if name not in optimizers:
            raise UnknownName.of("optimizer", name, optimizers)
    return part


def _first_scale(source: str, policy: Policy, asked: AskedScale) -> LossScale:
    """Return what a loss begins with: what was asked for it, or what the policy says."""
    one = asked.get(source) if isinstance(asked, Mapping) else asked
    if one is None:
        return DynamicScale() if policy.scaling == "dynamic" else NoScale()
    return _as_scale(one)


def _as_scale(one: LossScale | float) -> LossScale:
    if isinstance(one, int | float):
        return StaticScale(scale=float(one))
    if not isinstance(one, NoScale | StaticScale | DynamicScale):
        raise UsageError(
            f"scale={one!r} is not a loss scale",
            hint="pass a number to keep, or a value such as scaling.DynamicScale(floor=128.0)",
        )
    return one


def _require_membership(
    model: nn.Module, optimizers: Mapping[str, Optimizer], *, several: bool
) -> None:
    """Each optimizer holds the model's parameters, and no two hold the same one.

    With several optimizers one may train a module that is not the model's, such as a discriminator.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    owner: dict[int, str] = {}
    for name, optimizer in optimizers.items():
        held = [p for group in optimizer.param_groups for p in group["params"]]
        foreign = [p for p in held if id(p) not in names]
        if foreign and not (several and len(foreign) == len(held)):
            raise UsageError(
                f"optimizer {name!r} holds {len(held)} parameters, of which {len(foreign)} are not "
                "the model's: they would not be moved or cast with it",
                hint="build the optimizer from the parameters of this very model, and put further "
                "trained modules into the model (nn.ModuleDict)",
            )
        if any(p.dtype is torch.float16 for p in foreign):
            raise UsageError(
                f"optimizer {name!r} holds fp16 parameters, whose gradients cannot be unscaled",
                hint="keep trained weights in fp32 (module.float()); autocast computes in fp16",
            )
        for p in held:
            if owner.setdefault(id(p), name) != name:
                raise UsageError(
                    f"the optimizers {owner[id(p)]!r} and {name!r} both hold parameter "
                    f"{names.get(id(p), tuple(p.shape))!r}",
                    hint="give it to one of them; several losses on one optimizer are told apart "
                    "by engine.backward(loss, name)",
                )


def _required(function: Callable[..., Any]) -> list[str]:
    """List the parameters that a call cannot leave out."""
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = inspect.signature(function).parameters.values()
    return [p.name for p in parameters if p.default is p.empty and p.kind not in variadic]


def _require_plain_step(optimizer: Optimizer, name: str) -> None:
    if not isinstance(optimizer, Optimizer):
        raise UsageError(
            f"{name!r} is a {type(optimizer).__name__}, not a torch.optim.Optimizer",
            hint="pass one optimizer, or a mapping of names to optimizers",
        )
    # The class's own, without self: schedulers wrap the instance's in a way that shows self again.
    if needed := _required(type(optimizer).step)[1:]:
        raise UsageError(
            f"{type(optimizer).__name__}.step needs {', '.join(needed)}: it calls the model "
            "several times a step, and each call would need its own scale, check and clipping",
            hint="train with an optimizer whose step() takes nothing, or without an engine",
        )


def _followers(optimizer: Optimizer, scheduler: Any, ema: Any, model: nn.Module) -> Followers:
    followers: Followers = {}
    if scheduler is not None:
        _require_own_scheduler(scheduler, optimizer)
        followers["scheduler"] = (scheduler, ScheduleGuard(scheduler))
    if ema is None:
        return followers
    if hasattr(ema, "update_parameters"):
        if isinstance(ema, nn.Module):
            _require_same_parameters(ema, model)
            ema.to(next(model.parameters()).device)
        followers["ema"] = (ema, lambda: ema.update_parameters(model))
    elif callable(ema) and not isinstance(ema, nn.Module):
        followers["ema"] = (ema, lambda: ema(model))
    else:
        raise UsageError(
            f"ema is a {type(ema).__name__}, which has no update_parameters(model)",
            hint="pass torch.optim.swa_utils.AveragedModel(model), or a function of the model",
        )
    return followers


def _require_own_scheduler(scheduler: Any, optimizer: Optimizer) -> None:
    kind = type(scheduler).__name__
    if getattr(scheduler, "optimizer", optimizer) is not optimizer:
        raise UsageError(
            f"the {kind} was built for another optimizer",
            hint="build the scheduler from the optimizer that you pass to the engine",
        )
    if needed := _required(scheduler.step):
        raise UsageError(
            f"{kind}.step needs {', '.join(needed)}, which an optimizer step does not know",
            hint="leave it out and call its step yourself, after evaluation",
        )


def _require_same_parameters(ema: nn.Module, model: nn.Module) -> None:
    """AveragedModel pairs parameters by position and would stop at the shorter list."""
    averaged = [tuple(p.shape) for p in ema.parameters()]
    own = [tuple(p.shape) for p in model.parameters()]
    if averaged != own:
        raise UsageError(
            f"the EMA averages {len(averaged)} parameters, the engine's model has {len(own)} or of "
            "other shapes",
            hint="for a part of the model pass a function: "
            "lambda model: average.update_parameters(model['generator'])",
        )


def require_keys(what: str, saved: Mapping[str, Any], expected: set[str]) -> None:
    """Raise CheckpointError unless a saved mapping has these keys and no others."""
    if set(saved) != expected:
        raise CheckpointError(
            f"the saved {what} holds {sorted(saved)}, expected {sorted(expected)}",
            hint="load the state of an engine that was built alike",
        )


def require_same_plan(plan: Plan, saved: Any) -> None:
    """Raise CheckpointError, naming what differs, unless a plan was saved from an equal one."""
    own = {**to_json(plan), **to_json(plan.policy)}
    saved = {**saved, **saved["policy"]}
    for axes in own, saved:
        del axes["policy"]
    differing = [key for key in {*own, *saved} if own.get(key) != saved.get(key)]
    if differing:
        changes = ", ".join(f"{k}: {saved.get(k)!r} -> {own.get(k)!r}" for k in sorted(differing))
        raise CheckpointError(
            f"the saved state is of another precision ({changes})",
            hint="to go on in another precision, load the weights alone and start a new engine",
        )
