"""A model's weights and buffers as a checkpoint holds them, whatever a forward pass made of them.

It may register a buffer, let one grow, drop it, or put one of another dtype in its place (a cache,
a table of positions). A model that is built anew has none of that, so before weights are loaded its
buffers are made to be those that were saved.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from narrowcast.errors import CheckpointError

__all__ = [
    "adopt_buffers",
    "load_model_state",
    "made_buffers",
    "model_state",
    "persistent_buffers",
    "shapes_of_buffers",
]


def model_state(model: nn.Module) -> dict[str, Any]:
    """Return all that `load_model_state` needs; tensors are the model's own, not copies."""
    weights = model.state_dict()
    return {
        "model": weights,
        "buffers": {name: b for name, b in _buffers(model) if b is None or name not in weights},
        "persistent": persistent_buffers(model, weights),
    }


def persistent_buffers(model: nn.Module, weights: Mapping[str, Any]) -> list[str]:
    """List the buffers that the model's state dict, `weights`, holds."""
    return [name for name, buffer in _buffers(model) if buffer is not None and name in weights]


def shapes_of_buffers(model: nn.Module) -> dict[str, torch.Size]:
    """Return the shape of every buffer that is not None."""
    return {name: buffer.shape for name, buffer in _buffers(model) if buffer is not None}


def made_buffers(
    model: nn.Module, weights: Mapping[str, Any], built: Mapping[str, torch.Size]
) -> list[str]:
    """List the buffers of `weights` that a model as it was built lacks or has in another shape."""
    names = persistent_buffers(model, weights)
    return [name for name in names if built.get(name) != weights[name].shape]


def load_model_state(model: nn.Module, saved: Mapping[str, Any], device: torch.device) -> None:
    """Make weights and buffers those that `model_state` returned.

    Raises CheckpointError for what the model has no place for.
    """
    weights, buffers, persistent = saved["model"], saved["buffers"], saved["persistent"]
    for name, _ in list(_buffers(model)):
        if name not in buffers and name not in persistent:
            delattr(_owner(model, name), _leaf(name))
    for name in persistent:
        _place(model, name, weights[name], device, persistent=True)
    for name, value in buffers.items():
        _place(model, name, value, device, persistent=False)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise CheckpointError(
            f"the saved weights do not fit the model as it is built: {error}",
            hint="make all parameters in model(options), so that a resumed run has them too",
        ) from None


def adopt_buffers(
    model: nn.Module,
    weights: Mapping[str, Any],
    persistent: Collection[str],
    device: torch.device,
) -> tuple[str, ...]:
    """Give the model those of the `persistent` buffers that it lacks or has in another shape.

    Their dtype stays the model's own. Returns their names. `weights` is to be loaded afterwards.
    """
    there = dict(_buffers(model))
    adopted = []
    for name in persistent:
        value, own = weights[name], there.get(name)
        if own is None or own.shape != value.shape:
            fitting = value if own is None else value.to(own.dtype)
            _place(model, name, fitting, device, persistent=True)
            adopted.append(name)
    return tuple(adopted)


def _buffers(model: nn.Module) -> Iterator[tuple[str, Tensor | None]]:
    """Yield every buffer under each of its names, those that are None as well."""
    for path, module in model.named_modules():
        for name, buffer in module._buffers.items():
            yield (f"{path}.{name}" if path else name), buffer


def _place(
    model: nn.Module, name: str, value: Tensor | None, device: torch.device, *, persistent: bool
) -> None:
    """Write a value into the buffer that is there, or put it in its place, or register one."""
    owner, leaf = _owner(model, name), _leaf(name)
    own = owner._buffers.get(leaf)
    if own is not None and value is not None and _alike(own, value):
        own.data.copy_(value)
        return
    placed = None if value is None else value.to(device)
    if leaf in owner._buffers:
        owner._buffers[leaf] = placed
    elif hasattr(owner, leaf):
        raise CheckpointError(
            f"the saved state has a buffer {name}, and the model has something else there",
            hint="register buffers in the module's __init__, where a resumed run finds them",
        )
    else:
        owner.register_buffer(leaf, placed, persistent=persistent)


def _alike(a: Tensor, b: Tensor) -> bool:
    return (a.shape, a.dtype) == (b.shape, b.dtype)


def _owner(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name.rpartition(".")[0])
    except AttributeError as error:
        raise CheckpointError(
            f"the saved state has a buffer {name}, and the model as it is built has none: {error}",
            hint="make all modules in model(options), so that a resumed run has them too",
        ) from None


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]
