"""Making a narrow optimizer out of torch's, and a saved state fit for other stores."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from narrowcast.errors import UsageError
from narrowcast.optim.adamw import AdamW
from narrowcast.optim.loading import KEEP_FP32, Pair, adapted_entry
from narrowcast.optim.narrow import NarrowOptimizer
from narrowcast.optim.sgd import SGD
from narrowcast.optim.soundness import require_storable
from narrowcast.optim.states import state_store
from narrowcast.optim.weights import REMAINDER, weight_store

__all__ = ["narrowed", "rounded_state"]

_POSSIBLE = "torch.optim.AdamW, Adam without weight decay, and SGD can be; or build one of ours"
_DROPPED = (
    "amsgrad",
    "capturable",
    "decoupled_weight_decay",
    "differentiable",
    "foreach",
    "fused",
)


def _nothing(_: Tensor) -> bool:
    return False


def narrowed(
    optimizer: Optimizer,
    *,
    weights: str,
    states: str,
    keep_fp32: Callable[[Tensor], bool] = _nothing,
    generator: torch.Generator | None = None,
) -> NarrowOptimizer:
    """Return our optimizer with the groups and hyperparameters of torch's, before its first step.

    Parameters for which `keep_fp32` is true stay fp32, in the group that they are in. The group
    dictionaries are shared: a scheduler built for `optimizer` goes on to set learning rates, and
    `optimizer` itself must not be used any more. Raises UsageError for what has no rule here;
    nothing is changed then.
    """
    target = _target(optimizer)
    if any(optimizer.state.values()):
        raise UsageError(
            f"the {type(optimizer).__name__} has taken steps, and its states would be lost",
            hint="narrow it before the first step, or build ours and load its state_dict()",
        )
    store = weight_store(weights)
    state_store(states)
    for group in optimizer.param_groups:
        kept = tuple(i for i, p in enumerate(group["params"]) if keep_fp32(p))
        for position, parameter in enumerate(group["params"]):
            require_storable(parameter, weight_store("fp32") if position in kept else store)
        _require_rule(type(optimizer).__name__, group)
        target.rule.require_sound(group)
    for group in optimizer.param_groups:
        kept = tuple(i for i, p in enumerate(group["params"]) if keep_fp32(p))
        for key in _DROPPED:
            group.pop(key, None)
        group |= {"weights": weights, "states": states}
        if kept:
            group[KEEP_FP32] = kept
    return target(optimizer.param_groups, weights=weights, states=states, generator=generator)


def _target(optimizer: Optimizer) -> type[AdamW | SGD]:
    """Return our class for torch's; a subclass may do anything, so only these three are known."""
    targets: dict[type, type[AdamW | SGD]] = {
        torch.optim.AdamW: AdamW,
        torch.optim.Adam: AdamW,
        torch.optim.SGD: SGD,
    }
    kind = type(optimizer)
    if kind not in targets:
        what = "is one of ours already" if isinstance(optimizer, NarrowOptimizer) else "has no rule"
        is_torchs = kind.__module__.startswith("torch.")  # bitsandbytes has an AdamW as well
        name = kind.__name__ if is_torchs else f"{kind.__module__}.{kind.__name__}"
        raise UsageError(f"{name} cannot be narrowed: it {what}", hint=_POSSIBLE)
    return targets[kind]


def _require_rule(kind: str, group: dict[str, Any]) -> None:
    """Raise UsageError for hyperparameters that our rules do not have."""
    for key in ("amsgrad", "capturable", "differentiable"):
        if group.get(key):
            raise UsageError(f"{kind} with {key} cannot be narrowed", hint=_POSSIBLE)
    coupled = kind == "Adam" and not group.get("decoupled_weight_decay", False)
    if coupled and group["weight_decay"] != 0:
        raise UsageError(
            f"Adam with weight_decay={group['weight_decay']} adds the decay to the gradient (L2); "
            "our rule decays the weight itself, as AdamW does",
            hint="use torch.optim.AdamW, or Adam with weight_decay=0",
        )


def rounded_state(optimizer: NarrowOptimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Return a saved state as `optimizer` holds it, rounded to nearest where its stores need it.

    For ``optimizer.load_state_dict``, which refuses to round by itself. A remainder that has no
    place in the weight store is dropped; weights are not touched.
    """
    saved, groups = state_dict["state"], []
    entries: dict[Any, Any] = {}
    for group, saved_group in zip(optimizer.param_groups, state_dict["param_groups"], strict=True):
        moments = optimizer.rule.moments({**group, **saved_group})
        for position, parameter in enumerate(group["params"]):
            index = saved_group["params"][position]
            kept = optimizer.state.get(parameter, {}).get(REMAINDER)
            pair = Pair.of(saved_group, group, position)
            entry = adapted_entry(
                parameter, saved.get(index, {}), kept, pair, moments, rounding=True
            )
            if entry:
                entries[index] = entry
        own = {key: group[key] for key in ("weights", "states", KEEP_FP32) if key in group}
        groups.append({**saved_group, **own})
    return {**state_dict, "state": entries, "param_groups": groups}
