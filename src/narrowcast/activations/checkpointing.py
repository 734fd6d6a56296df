"""Checkpointing: a module keeps its inputs and runs again in backward, without a trace of it.

The recomputation must be the same computation, and must not happen twice to anybody else:

    autocast            as it was at the call, and the rehearsed rules of CUDA with it
    kept functions      in fp32 again, where the policy keeps single functions so
    random numbers      as they were at the call, and put back afterwards: torch's, Python's,
                        numpy's, and those of generators that are attributes of modules
    BatchNorm           its running statistics are written by the first forward alone
    ledgers, trackers   (global module hooks) see it as a call of the module

Non-reentrant: ``torch.utils.checkpoint`` (Chen et al. 2016, section 3, for the idea).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.nn.modules.batchnorm import _NormBase  # the class of all norms with running statistics
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint

from narrowcast.activations.forward import Forward
from narrowcast.errors import UsageError
from narrowcast.policy import Policy
from narrowcast.precision.cast import backward_context
from narrowcast.precision.functions import FunctionsInForce, functions_in_force
from narrowcast.randomness import random_state, restore_random_state

__all__ = ["Checkpoint"]


@dataclass(frozen=True)
class Checkpoint:
    """Lever: of what the module saves, only its inputs are kept."""

    policy: Policy
    name: str = "checkpoint"
    computes: bool = False

    def run(self, module: nn.Module, inner: Forward, args: Any, kwargs: dict[str, Any]) -> Any:
        if torch.compiler.is_compiling():
            # A graph holds no hidden state: casts, functions and random numbers are part of it.
            return checkpoint(inner, *args, use_reentrant=False, **kwargs)
        region = _Region(module, inner, args, kwargs)
        tensors = region.tensors()
        kind = tensors[0].device.type if tensors else "cpu"

        def contexts() -> tuple[Any, Any]:
            return nullcontext(), _Recomputing(module, self.policy, kind, functions_in_force())

        written = _Writes(module)
        result = checkpoint(region, *tensors, use_reentrant=False, context_fn=contexts)
        written.refuse()
        return result


class _Recomputing:
    """What a recomputation runs under; entered again for each backward pass through one graph."""

    def __init__(
        self, module: nn.Module, policy: Policy, device_type: str, functions: FunctionsInForce
    ) -> None:
        states = _RandomStates.of(module)
        self._enter = partial(_recomputing, module, policy, device_type, functions, states)
        self._entered: list[AbstractContextManager[None]] = []

    def __enter__(self) -> None:
        context = self._enter()
        context.__enter__()
        self._entered.append(context)

    def __exit__(self, *error: Any) -> None:
        self._entered.pop().__exit__(*error)


@contextmanager
def _recomputing(
    module: nn.Module,
    policy: Policy,
    device_type: str,
    functions: FunctionsInForce,
    states: _RandomStates,
) -> Iterator[None]:
    before = _RandomStates.of(module)
    with backward_context(policy, device_type), _scratch_statistics(module), functions.again():
        states.restore()
        try:
            yield
        finally:
            before.restore()


@dataclass(frozen=True)
class _RandomStates:
    """Where all random numbers stand that a module may draw."""

    general: dict[str, Any]
    own: tuple[tuple[torch.Generator, Tensor], ...]
    """Generators that are attributes of the module or of one below it."""

    @classmethod
    def of(cls, module: nn.Module) -> _RandomStates:
        attributes = (value for below in module.modules() for value in vars(below).values())
        found = {id(value): value for value in attributes if isinstance(value, torch.Generator)}
        own = tuple((generator, generator.get_state()) for generator in found.values())
        return cls(random_state(), own)

    def restore(self) -> None:
        restore_random_state(self.general)
        for generator, state in self.own:
            generator.set_state(state)


class _Region:
    """The module's call, as a function of the tensors in its arguments, however nested.

    Torch holds tensors that are passed by position like saved ones, so that they can be offloaded
    or recomputed themselves; what a closure or a keyword holds is simply kept.
    """

    def __init__(
        self, module: nn.Module, inner: Forward, args: Any, kwargs: dict[str, Any]
    ) -> None:
        self._module = module
        self._inner = inner
        self._first: tuple[Any, dict[str, Any]] | None = (args, kwargs)
        self._leaves, self._tree = tree_flatten((args, kwargs))

    def tensors(self) -> list[Tensor]:
        """Hand over the tensors, once: from here on they are passed in."""
        found = [leaf for leaf in self._leaves if isinstance(leaf, Tensor)]
        self._leaves = [_TENSOR if isinstance(leaf, Tensor) else leaf for leaf in self._leaves]
        return found

    def __call__(self, *tensors: Tensor) -> Any:
        if self._first is not None:
            # The first time with the caller's own lists and dicts, which a module may write to.
            (args, kwargs), self._first = self._first, None
            return self._inner(*args, **kwargs)
        rest = iter(tensors)
        leaves = [next(rest) if leaf is _TENSOR else leaf for leaf in self._leaves]
        args, kwargs = tree_unflatten(leaves, self._tree)
        with _announced(self._module, args):
            return self._inner(*args, **kwargs)


_TENSOR = object()
"""Where a tensor was among the arguments."""


@contextmanager
def _announced(module: nn.Module, args: Any) -> Iterator[None]:
    """Let the hooks of all modules see a call, as they do where checkpointing wraps the module.

    They are observers by torch's own rule, such as our ledger's; what they return is ignored.
    """
    for hook in list(torch_module._global_forward_pre_hooks.values()):
        hook(module, args)
    try:
        yield
    finally:
        for key, hook in list(torch_module._global_forward_hooks.items()):
            if key in torch_module._global_forward_hooks_with_kwargs:
                hook(module, args, {}, None)
            else:
                hook(module, args, None)


@contextmanager
def _scratch_statistics(module: nn.Module) -> Iterator[None]:
    """Let norms write their running statistics into copies, which are dropped.

    Copies and not None, as autograd saves them: the recomputation must save as many tensors.
    """
    kept = [
        (norm, name, buffer)
        for norm in module.modules()
        if isinstance(norm, _NormBase) and norm.training
        for name, buffer in norm._buffers.items()
        if buffer is not None
    ]
    try:
        for norm, name, buffer in kept:
            norm._buffers[name] = buffer.clone()
        yield
    finally:
        for norm, name, buffer in kept:
            norm._buffers[name] = buffer


class _Writes:
    """Which buffers a forward writes, other than running statistics: the next one writes again."""

    def __init__(self, module: nn.Module) -> None:
        self._before = [
            (owner, name, buffer, buffer._version)
            for owner in module.modules()
            if owner._buffers and not isinstance(owner, _NormBase)
            for name, buffer in owner._buffers.items()
            if buffer is not None and not buffer.is_inference()
        ]

    def refuse(self) -> None:
        """Raise UsageError if one was written: the recomputation would start from another state."""
        for owner, name, buffer, version in self._before:
            if owner._buffers.get(name) is not buffer or buffer._version != version:
                raise UsageError(
                    f"{type(owner).__name__} writes its buffer {name!r} in forward, and a "
                    "checkpointed module runs forward twice",
                    hint="leave this module out of the rule with lever='checkpoint'; only running "
                    "statistics of batch and instance norms are kept from being written twice",
                )
