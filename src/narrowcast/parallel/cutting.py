"""Where FSDP2 cuts a model: what is gathered at once, and what every rank holds whole.

`fully_shard` is put on the repeated blocks, on large modules whose weights have another format than
the model's (fp32 islands), and on the loss with the model inside of it: a loss may then call any
method of the model. Parameters without dimensions or elements cannot be cut, and small ones of
another format are not worth it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from narrowcast.errors import UsageError

# What torch has for this takes a second and 45 MB to import, which a process that is alone saves.
if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import FSDPModule

__all__ = ["OfModel", "cut_in_units", "require_shardable"]

OfModel = Callable[[nn.Module, Any], Any]
"""What is computed of a model and a batch: a loss, or metrics."""

# Elements of a parameter that is not worth a message of its own. It is also what ``optim.states``
# takes for small, for reasons of its own.
_SMALL = 4096


class _Call(nn.Module):
    """A function of model and batch as a module, so that FSDP2 sees where it begins and ends."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: OfModel, batch: Any) -> Any:
        return function(self.model, batch)


def cut_in_units(model: nn.Module, blocks: Collection[str], mesh: DeviceMesh) -> Any:
    """Put `fully_shard` on islands of another dtype, on blocks, and on the call round all.

    It gathers, and leaves whole gradients where they are: see ``scattering``.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    root = _Call(model)
    usual = _usual_dtype(model)
    uncut = _uncut(model, usual)
    shared_out = {name: _shared_with_outside(model, name) for name in blocks}
    policy = MixedPrecisionPolicy(cast_forward_inputs=False)

    def shard(modules: list[nn.Module], ignored: set[nn.Parameter]) -> FSDPModule:
        units: list[FSDPModule] = fully_shard(
            modules, mesh=mesh, mp_policy=policy, ignored_params=ignored | uncut
        )
        unit = units[0]  # they have one state
        unit.set_requires_gradient_sync(requires_gradient_sync=False)
        # Left alone it gathers the next block while this one computes: two blocks at the peak.
        unit.set_modules_to_backward_prefetch([unit])
        return unit

    for island in _islands(model, usual, uncut):
        shard(island, set())
    for name in blocks:
        shard([model.get_submodule(name)], shared_out[name])
    return shard([root], set())


def _usual_dtype(model: nn.Module) -> torch.dtype:
    sizes: dict[torch.dtype, int] = {}
    for parameter in model.parameters():
        sizes[parameter.dtype] = sizes.get(parameter.dtype, 0) + parameter.numel()
    return max(sizes, key=lambda dtype: sizes[dtype])


def _uncut(model: nn.Module, usual: torch.dtype) -> set[nn.Parameter]:
    """Return the parameters that every rank holds whole.

    Those without dimensions or elements, and those of norms and the like that have another dtype
    than most: cut, each such module would be gathered by itself, and what a plan makes again in
    backward from a norm's weights would find them let go of.
    """
    found = {p for p in model.parameters() if p.dim() == 0 or p.numel() == 0}
    for module in model.modules():
        own = [p for p in module.parameters(recurse=False) if p.dtype is not usual]
        if all(p.numel() < _SMALL for p in own):
            found.update(own)
    return found


def _islands(
    model: nn.Module, usual: torch.dtype, uncut: set[nn.Parameter]
) -> Iterator[list[nn.Module]]:
    """Yield the modules with parameters of another dtype, since a unit of FSDP2 has one only.

    Those that share a weight come together.
    """
    waiting = [
        module
        for module in model.modules()
        if any(p.dtype is not usual and p not in uncut for p in module.parameters(recurse=False))
    ]
    while waiting:
        together = [waiting.pop(0)]
        for module in together:  # grows on the way
            held = set(module.parameters(recurse=False))
            tied = [m for m in waiting if not held.isdisjoint(m.parameters(recurse=False))]
            together += tied
            waiting = [m for m in waiting if m not in tied]
        yield together


def _shared_with_outside(model: nn.Module, block: str) -> set[nn.Parameter]:
    """Return the parameters of a block that modules outside of it hold as well: the root's."""
    inside = set(model.get_submodule(block).modules())
    outside = {
        parameter
        for module in model.modules()
        if module not in inside
        for parameter in module.parameters(recurse=False)
    }
    return {p for p in model.get_submodule(block).parameters() if p in outside}


def require_shardable(model: nn.Module) -> None:
    """Raise UsageError for parameters that `fully_shard` cannot cut, or no checkpoint can hold."""
    for name, parameter in model.named_parameters():
        if parameter.is_complex():
            raise UsageError(
                f"parameter {name} of shape {tuple(parameter.shape)} is {parameter.dtype}, and "
                "fsdp2 trains real parameters",
                hint="hold real and imaginary parts in a real one: torch.view_as_complex reads it "
                "as complex; no checkpoint stores a complex one, of whatever kind of training",
            )
        if not parameter.is_contiguous():
            raise UsageError(
                f"parameter {name} of shape {tuple(parameter.shape)} is not contiguous, and fsdp2 "
                "cuts rows of memory",
                hint="build the model in torch's own memory format, or use --parallel ddp",
            )
