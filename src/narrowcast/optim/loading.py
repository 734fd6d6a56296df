"""Fits a saved optimizer state to the stores at hand: converted where exact, refused where not.

    saved -> held     fp32, any states -> fp32 states; bf16 -> bf16; int8 -> int8; int4 -> int4
                      split8 -> split16; stochastic -> split16, split8; split -> fp32 weights
                      fp32 weights -> split: no weights in a state, so the remainders stay

Anything else would round. `rounding=True` (``convert.rounded_state``) does that on purpose.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from narrowcast.errors import UsageError
from narrowcast.optim.layout import Layout, flat_range, layout_of
from narrowcast.optim.parts import whole_numel
from narrowcast.optim.rule import Rule
from narrowcast.optim.states import (
    FP32,
    Blocks,
    Moment,
    Plain,
    StateStore,
    fitted,
    state_store,
)
from narrowcast.optim.weights import REMAINDER, WeightStore, weight_store

__all__ = [
    "KEEP_FP32",
    "LAYOUT",
    "STEP",
    "Pair",
    "Shielded",
    "adapted",
    "adapted_entry",
    "in_order",
    "merged_group",
    "shield",
    "store_of",
]

STEP = "step"
"""Key of the number of steps that a parameter has taken, a plain integer."""
KEEP_FP32 = "keep_fp32"
"""Key of the positions of those parameters of a group that stay fp32, whatever its weight store."""
LAYOUT = "layout"
"""Key of the order of dimensions in which block-wise codes run, where it is not row-major."""

_SHIELD = "shielded"

# Of torch's own groups: how a step is carried out, which is ours to choose.
_FOREIGN_KEYS = ("amsgrad", "capturable", "differentiable", "foreach", "fused")


@dataclass(frozen=True)
class Shielded:
    """A parameter's saved state, hidden from torch, which would cast all of it to bf16."""

    entry: dict[str, Any]


def shield(_: object, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Wrap each entry of a state dict; also marks that a state is being loaded."""
    wrapped: dict[Any, Any] = {key: Shielded(entry) for key, entry in state_dict["state"].items()}
    return {**state_dict, "state": {**wrapped, _SHIELD: Shielded({})}}


@dataclass(frozen=True)
class Pair:
    """The stores of a saved group, and those of the group that it is loaded into."""

    saved_weights: WeightStore
    saved_states: StateStore
    weights: WeightStore
    states: StateStore

    @classmethod
    def of(cls, saved: Mapping[str, Any], group: Mapping[str, Any], position: int) -> Pair:
        """Read the names; a group of torch's own has fp32 weights and states."""
        return cls(
            store_of(saved, position),
            state_store(saved.get("states", "fp32")),
            store_of(group, position),
            state_store(group["states"]),
        )


def store_of(group: Mapping[str, Any], position: int) -> WeightStore:
    """Return the weight store of one parameter of a group, which may be saved or torch's."""
    is_kept = position in group.get(KEEP_FP32, ())
    return weight_store("fp32" if is_kept else group.get("weights", "fp32"))


def adapted(
    rule: Rule,
    groups: list[dict[str, Any]],
    before: Mapping[Any, dict[str, Any]],
    state: dict[str, Any],
) -> dict[str, Any]:
    """Return the shielded `state` as the optimizer with `groups` can hold it; as it is if unmarked.

    `before` is the state that it replaces, whose remainders stay where none were saved.
    """
    loaded = dict(state.get("state", {}))
    if loaded.pop(_SHIELD, None) is None:
        return state
    result: defaultdict[Any, dict[str, Any]] = defaultdict(dict)
    absorbing: list[tuple[Tensor, Tensor, Pair]] = []
    for group, saved_group in zip(groups, state["param_groups"], strict=True):
        moments = rule.moments({**group, **saved_group})
        for position, parameter in enumerate(group["params"]):
            pair = Pair.of(saved_group, group, position)
            saved = loaded.pop(parameter, Shielded({})).entry
            kept = before.get(parameter, {}).get(REMAINDER)
            entry = adapted_entry(parameter, saved, kept, pair, moments)
            if entry:
                result[parameter] = entry
            if pair.weights.remainder is None and REMAINDER in saved:
                absorbing.append((parameter, saved[REMAINDER].to(parameter.device), pair))
    result.update({key: value.entry for key, value in loaded.items()})
    merged = [merged_group(g, s) for g, s in zip(groups, state["param_groups"], strict=True)]
    for parameter, remainder, pair in absorbing:  # nothing is refused any more
        _absorb(parameter, remainder, pair)
    for group, new in zip(groups, merged, strict=True):
        # The same dictionaries as before: a scheduler of the optimizer that this one was made from
        # (``convert.narrowed``) holds them.
        group.clear()
        group.update(new)
    return {**state, "state": result, "param_groups": groups}


def in_order(state_dict: dict[str, Any]) -> dict[str, Any]:
    """Return a state dict with its entries in the order of the parameters, and each one's by name.

    The order in which they came into being would tell a resumed run from one that never stopped.
    """
    states = {
        key: dict(sorted(entry.items())) if isinstance(entry, dict) else entry
        for key, entry in state_dict["state"].items()
    }
    ordered = sorted(states, key=lambda key: (not isinstance(key, int), key))
    return {**state_dict, "state": {key: states[key] for key in ordered}}


def merged_group(group: Mapping[str, Any], saved: Mapping[str, Any]) -> dict[str, Any]:
    """Return the saved hyperparameters with the stores and parameters of the group at hand."""
    if saved.get("amsgrad"):
        raise UsageError(
            "the saved state is of an optimizer with amsgrad, which no rule here has",
            hint="start with fresh states: load the weights alone",
        )
    own = {key: group[key] for key in ("params", "weights", "states", KEEP_FP32) if key in group}
    rest = {key: value for key, value in saved.items() if key not in _FOREIGN_KEYS}
    return {**group, **rest, **own}


def adapted_entry(
    parameter: Tensor,
    saved: Mapping[str, Any],
    kept: Tensor | None,
    pair: Pair,
    moments: tuple[Moment, ...],
    *,
    rounding: bool = False,
) -> dict[str, Any]:
    """Return one parameter's state in the stores of `pair`, as new tensors on its device.

    Changes nothing: a remainder that fp32 weights have to absorb is left out.
    """
    entry: dict[str, Any] = {}
    remainder = _remainder(parameter, saved.get(REMAINDER), kept, pair, rounding=rounding)
    if remainder is not None:
        entry[REMAINDER] = remainder
    layout = layout_of(parameter)
    states = fitted(pair.states, whole_numel(parameter))
    source = fitted(pair.saved_states, whole_numel(parameter))
    found = False
    for moment in moments:
        value = _value(parameter, saved, source, moment)
        if value is None:
            continue
        found = True
        entry.update(_moment(parameter, value, source, states, moment, rounding=rounding))
    if found and isinstance(states, Blocks) and layout:
        entry[LAYOUT] = layout
    if found or STEP in saved:
        entry[STEP] = int(saved.get(STEP, 1))  # torch's SGD counts none; it has taken some
    return entry


def _remainder(
    parameter: Tensor, saved: Tensor | None, kept: Tensor | None, pair: Pair, *, rounding: bool
) -> Tensor | None:
    """Return the remainder to hold, None for a store without."""
    own = pair.weights
    if saved is not None and saved.shape != parameter.shape:
        raise _misshapen("remainder", tuple(saved.shape), parameter)
    if own.remainder is None:
        if saved is not None and not rounding:
            _require_absorbable(parameter, saved.to(parameter.device), pair)
        return None
    made = own.zeros(parameter)[REMAINDER]
    if saved is None:
        # fp32 weights come with the model, and what it lost when it became bf16 is at hand.
        return made if kept is None or pair.saved_weights.name == "stochastic" else kept.clone()
    if saved.dtype == own.remainder:
        return made.copy_(saved)
    wide = saved.to(parameter.device, torch.int32)
    if own.remainder is torch.int16:
        return made.copy_(wide << 8)
    if not rounding:
        raise _refused(f"a {saved.dtype} remainder", f"weights={own.name!r}")
    return made.copy_(((wide + 0x80) >> 8).clamp_(max=127))


@torch.no_grad()
def _absorb(parameter: Tensor, saved: Tensor, pair: Pair) -> None:
    """Add a remainder into fp32 weights that were loaded from bf16 ones; once is enough."""
    narrow = parameter.detach().to(torch.bfloat16)
    if torch.equal(narrow.float(), parameter):
        parameter.copy_(pair.saved_weights.read(narrow, saved))


@torch.no_grad()
def _require_absorbable(parameter: Tensor, saved: Tensor, pair: Pair) -> None:
    """Raise UsageError unless the weights lack a remainder, or have it already."""
    if pair.weights.dtype is not torch.float32:
        raise _refused(f"the remainder of weights={pair.saved_weights.name!r}", "bf16 weights")
    narrow = parameter.detach().to(torch.bfloat16)
    if torch.equal(narrow.float(), parameter):
        return
    again = torch.empty_like(narrow)
    remainder = torch.empty_like(saved)
    pair.saved_weights.write(parameter.detach(), again, remainder, None)
    if not torch.equal(remainder, saved):
        raise UsageError(
            f"the state holds remainders of bf16 (weights={pair.saved_weights.name!r}), and "
            "the fp32 weights at hand are not those bf16 weights",
            hint="load the model saved with the state first, or call convert.rounded_state, which "
            "drops the remainders",
        )


def _value(
    parameter: Tensor, saved: Mapping[str, Any], source: StateStore, moment: Moment
) -> dict[str, Tensor] | None:
    """Return the saved parts of a moment, None if there are none; raises where they do not fit."""
    keys = source.part_keys(moment)
    if any(saved.get(key) is None for key in keys):
        return None
    parts = {key: saved[key] for key in keys}
    expected = source.zeros(parameter.detach().to("meta"), moment)
    for key, part in parts.items():
        if part.shape != expected[key].shape:
            raise _misshapen(key, tuple(part.shape), parameter)
    if isinstance(source, Blocks):
        there, here = tuple(saved.get(LAYOUT, ())), layout_of(parameter)
        if there != here:
            raise UsageError(
                f"the saved {moment.name} runs through dimensions {there or 'row-major'}, the "
                f"parameter of shape {tuple(parameter.shape)} through {here or 'row-major'}",
                hint="bring the model into the memory format that it was saved in, then load",
            )
    return {key: part.detach().to(parameter.device) for key, part in parts.items()}


def _moment(
    parameter: Tensor,
    parts: dict[str, Tensor],
    source: StateStore,
    states: StateStore,
    moment: Moment,
    *,
    rounding: bool,
) -> dict[str, Tensor]:
    made = states.zeros(parameter, moment)
    # torch's own optimizers keep bf16 states for bf16 parameters without calling them so.
    is_plain = isinstance(source, Plain) and isinstance(states, Plain)
    is_alike = is_plain and all(made[key].dtype == part.dtype for key, part in parts.items())
    if source.name == states.name or is_alike:
        for key, part in parts.items():
            made[key].copy_(part)
        return made
    if states is not FP32 and not rounding:
        raise _refused(f"states={source.name!r}", f"states={states.name!r}")
    layout, numel = layout_of(parameter), parameter.numel()
    value = _flat(parts, source, moment, layout, numel)
    states.write(value, states.ranges(made, moment, 0, numel), moment, None)
    return made


def _flat(
    parts: dict[str, Tensor], source: StateStore, moment: Moment, layout: Layout, numel: int
) -> Tensor:
    """Return a saved moment as flat fp32, in the order of the parameter's storage."""
    if isinstance(source, Plain):
        return flat_range(parts[moment.name], layout, 0, numel)[0].to(torch.float32)
    return source.read(source.ranges(parts, moment, 0, numel), moment, numel)


def _misshapen(what: str, shape: tuple[int, ...], parameter: Tensor) -> UsageError:
    return UsageError(
        f"the saved {what} has shape {shape}, its parameter {tuple(parameter.shape)}",
        hint="load the state of an optimizer over the same parameters in the same order",
    )


def _refused(saved: str, held: str) -> UsageError:
    return UsageError(
        f"{saved} cannot be loaded into {held} without rounding",
        hint="to round on purpose: optimizer.load_state_dict("
        "narrowcast.optim.convert.rounded_state(optimizer, state_dict))",
    )
