"""What a weight store can take, and whether parameter and state are still what a store made.

Stores speak of tensors by their dtypes and sizes. A store that is exchanged under a state, or a
model that is converted after its optimizer was built, would be read as something else; each step
looks before it reads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from narrowcast.errors import UsageError
from narrowcast.optim.states import STATE_STORES, Moment, StateStore
from narrowcast.optim.weights import REMAINDER, WeightStore

__all__ = [
    "dense_gradient",
    "require_distinct",
    "require_held",
    "require_storable",
    "write_mark",
]

_HINT = (
    "stores cannot be changed under a state: build another optimizer with these stores, and load "
    "narrowcast.optim.convert.rounded_state(new, old.state_dict()) into it"
)


def require_storable(parameter: Tensor, store: WeightStore) -> None:
    """Raise UsageError unless the store can hold the parameter."""
    shown = f"a parameter of shape {tuple(parameter.shape)}"
    if parameter.dtype is torch.float16:
        raise UsageError(
            f"{shown} is fp16: its gradients lose what is below 6e-8 before an optimizer sees "
            "them, and a remainder cannot bring that back",
            hint="keep fp32 weights and compute in fp16 by autocast, or use bf16 weights",
        )
    if parameter.dtype not in (torch.float32, torch.bfloat16):
        raise UsageError(
            f"{shown} is {parameter.dtype}: steps are computed in fp32",
            hint="train fp32 or bf16 parameters, or this one with an optimizer of torch.optim",
        )
    if parameter.dtype is torch.bfloat16 and store.dtype is torch.float32:
        raise UsageError(
            f"{shown} is bf16, and weights={store.name!r} holds fp32",
            hint="use weights='split16', or build the optimizer before the model becomes bf16",
        )
    if parameter.dtype is not store.dtype and parameter.grad is not None:
        raise UsageError(
            f"{shown} has a gradient, which would keep {parameter.dtype} while the parameter "
            f"becomes {store.dtype}",
            hint="build the optimizer before the first backward pass, or clear the gradients",
        )
    if parameter.layout is not torch.strided or _shares_memory_with_itself(parameter):
        raise UsageError(
            f"{shown} has elements that share memory or none of their own",
            hint="make it a dense tensor: parameter.data = parameter.data.clone()",
        )


def _shares_memory_with_itself(tensor: Tensor) -> bool:
    """Whether two elements lie in one place."""
    if tensor.numel() < 2:
        return False
    reach, is_nested = 0, True
    dimensions = sorted(zip(tensor.stride(), tensor.shape, strict=True))
    for stride, size in dimensions:
        is_nested &= size == 1 or stride > reach
        reach += (size - 1) * stride
    if is_nested:  # each dimension steps over all that smaller strides can reach
        return False
    places = {0}
    for stride, size in dimensions:
        places = {place + i * stride for place in places for i in range(size)}
    return len(places) < tensor.numel()


def write_mark(parameter: Tensor) -> tuple[int, int, int]:
    """Return what differs once a weight was written in place, or other memory put in its place.

    A write through ``parameter.data`` moves none of it. The storage's own address, not that of its
    bytes: a tensor without contents has one too.
    """
    storage: int = parameter.untyped_storage()._cdata
    return parameter._version, storage, int(parameter.storage_offset())


def require_distinct(parameters: Sequence[Tensor]) -> None:
    """Raise UsageError for a parameter that comes twice: it would step twice on one state."""
    if len({id(parameter) for parameter in parameters}) < len(parameters):
        raise UsageError(
            "a group has a parameter twice", hint="pass model.parameters(), which names each once"
        )


def dense_gradient(parameter: Tensor) -> Tensor:
    """Return the gradient of a parameter that has one; raises UsageError for a sparse one."""
    gradient = parameter.grad
    assert gradient is not None
    if gradient.layout is not torch.strided:
        raise UsageError(
            f"the gradient of a parameter of shape {tuple(parameter.shape)} is "
            f"{gradient.layout}".replace("torch.", ""),
            hint="build the embedding with sparse=False",
        )
    return gradient


def require_held(
    parameter: Tensor,
    state: Mapping[str, Any],
    weights: WeightStore,
    states: StateStore | None = None,
    moments: tuple[Moment, ...] = (),
) -> None:
    """Raise UsageError unless parameter and state are what these stores would have made."""
    shown = f"a parameter of shape {tuple(parameter.shape)}"
    if parameter.dtype is not weights.dtype:
        raise UsageError(
            f"{shown} is {parameter.dtype}, and weights={weights.name!r} holds {weights.dtype}: "
            "either was changed after the optimizer was built",
            hint="convert the model (model.bfloat16(), model.float()) before the optimizer is "
            "built; " + _HINT,
        )
    remainder = state.get(REMAINDER)
    found = None if remainder is None else remainder.dtype
    if found is not weights.remainder:
        raise UsageError(
            f"{shown} has {_remainder(found)}, and weights={weights.name!r} needs "
            f"{_remainder(weights.remainder)}: the store was changed, the state was cleared, or "
            "a later optimizer over the same parameter has taken the remainder over",
            hint="step the later optimizer; " + _HINT,
        )
    for moment in moments:
        if states is not None and not states.fits(state, moment, parameter.numel()):
            raise UsageError(
                f"the state of {shown} holds {_held(state, moment)}, which is not what "
                f"states={states.name!r} makes of {moment.name}",
                hint=_HINT,
            )


def _held(state: Mapping[str, Any], moment: Moment) -> str:
    """List what a state has of a moment, by the keys of all stores."""
    keys = {key for store in STATE_STORES.values() for key in store.part_keys(moment)}
    parts = {key: state[key] for key in sorted(keys & state.keys())}
    return " and ".join(f"{key} ({p.numel()} of {p.dtype})" for key, p in parts.items())


def _remainder(dtype: torch.dtype | None) -> str:
    return "no remainder" if dtype is None else f"a remainder of {dtype}"
