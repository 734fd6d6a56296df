"""Gradient release: each parameter steps during backward, as soon as its gradient is complete.

    backward: ... gradient of layer 7 -> step layer 7 -> drop it -> gradient of layer 6 -> ...

So no two gradients need to be alive together. The result is that of the ordinary step, bit for
bit, since no parameter's update depends on another's. What does depend on all gradients at once
cannot be had: summing over micro-batches, clipping by the global norm, skipping the whole step
under loss scaling, averaging over processes. `require_compatible` refuses these.

A shared parameter steps once: autograd sums the gradients of all its uses and hands over the sum.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from narrowcast.errors import UsageError
from narrowcast.optim.narrow import NarrowOptimizer
from narrowcast.optim.ranks import are_several

__all__ = ["GradientRelease", "require_compatible", "require_kept"]

_ATTACHED: weakref.WeakSet[Optimizer] = weakref.WeakSet()


def require_compatible(
    *, accumulate: int = 1, clip_norm: float | None = None, is_loss_scaled: bool = False
) -> None:
    """Raise UsageError for what needs all gradients at once."""
    conflicts = {
        f"accumulate={accumulate}": (
            accumulate != 1,
            "a gradient that is used up cannot be summed",
        ),
        f"clip_norm={clip_norm}": (
            clip_norm is not None,
            "the norm over all gradients is known only when the first ones are used up",
        ),
        "loss scaling": (
            is_loss_scaled,
            "whether a step must be skipped is known only after backward",
        ),
    }
    for what, (is_asked, why) in conflicts.items():
        if is_asked:
            raise UsageError(
                f"gradient release and {what}: {why}", hint="keep the gradients (gradients='keep')"
            )


def require_kept(what: str, *, outputs: Any = (), optimizer: Optimizer | None = None) -> None:
    """Raise UsageError if an optimizer, or one that backward from `outputs` reaches, is released.

    Looks at the graph only where something is released. What a checkpoint of torch's older kind
    (``use_reentrant=True``) hides from the graph is seen with the optimizer alone.
    """
    if not _ATTACHED:  # a scaler asks three times a step
        return
    released = {id(p): o for o in _ATTACHED for p in _owned(o)}
    found = optimizer if optimizer in _ATTACHED else None
    if found is None and released:
        found = next((released[i] for i in _reached(outputs) if i in released), None)
    if found is not None:
        raise UsageError(
            f"{what} and GradientRelease on the same {type(found).__name__}: each parameter would "
            "step with its scaled gradient during backward, before anything can be unscaled or "
            "skipped",
            hint="keep the gradients (release.detach()), or train in bf16, which needs no scale",
        )


def _reached(outputs: Any) -> Iterator[int]:
    """Yield the ids of the leaves that backward from tensors, or lists of them, comes to."""
    pending = [x.grad_fn for x in tree_leaves(outputs) if isinstance(x, Tensor)]
    seen = set(pending)
    while pending:
        node: Any = pending.pop()
        if node is None:
            continue
        if hasattr(node, "variable"):
            yield id(node.variable)
        fresh = {parent for parent, _ in node.next_functions} - seen
        seen |= fresh
        pending += fresh


class GradientRelease:
    """Steps an optimizer's parameters during backward, from construction until `detach`.

    ``optimizer.step()`` ends the iteration, as ever: it steps what was not released, calls hooks,
    and leaves no gradient. Parameters that were frozen, or were added later, are released from then
    on. A gradient that is not finite never reaches a weight: its parameter is not stepped, and
    `skipped` lists it afterwards.
    """

    def __init__(self, optimizer: NarrowOptimizer) -> None:
        _require_releasable(optimizer)
        self.skipped: tuple[Tensor, ...] = ()
        """Parameters that did not step in the last ended iteration: a gradient was not finite."""
        # What hooks hold must not keep the optimizer alive: parameters hold the hooks.
        self._optimizer = weakref.ref(optimizer)
        self._arrived: set[Tensor] = set()
        self._flags: list[tuple[Tensor, Tensor]] = []
        """For each step whose decision was left to the device: parameter, and was it finite."""
        self._bad: list[Tensor] = []
        self._handles: list[Any] = [
            optimizer.register_step_pre_hook(self._end),
            optimizer.register_step_post_hook(_drop),
        ]
        self._hooked: set[int] = set()
        """Ids, which are the optimizer's parameters' for as long as it lives."""
        self._attach(optimizer)
        _ATTACHED.add(optimizer)

    @property
    def arrived(self) -> tuple[Tensor, ...]:
        """Parameters whose gradients have come since the last ended iteration, in no order."""
        return tuple(self._arrived)

    def end(self) -> None:
        """End an iteration that is given up: no hooks, and nothing else is stepped."""
        optimizer = self._optimizer()
        if optimizer is not None:
            self._end(optimizer, (), {})
            _drop(optimizer)

    def detach(self) -> None:
        """Stop releasing; what was stepped stays stepped."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._hooked.clear()
        optimizer = self._optimizer()
        if optimizer is not None:
            _ATTACHED.discard(optimizer)

    def _step(self, parameter: Tensor) -> None:
        optimizer, gradient = self._optimizer(), parameter.grad
        if optimizer is None or gradient is None:
            return
        if parameter in self._arrived:
            raise UsageError(
                f"a second gradient for a parameter of shape {tuple(parameter.shape)} came before "
                "optimizer.step(): the first one is used up, and they cannot be summed",
                hint="call optimizer.step() after each backward pass, or keep the gradients",
            )
        self._arrived.add(parameter)
        flag = _is_finite(gradient)
        if optimizer.defers(parameter):
            self._flags.append((parameter, flag))
            optimizer.step_parameters([parameter], if_finite=flag)
        elif _read(flag):
            optimizer.step_parameters([parameter])
        else:
            self._bad.append(parameter)
        parameter.grad = None

    def _end(self, optimizer: Optimizer, _args: object, _kwargs: object) -> None:
        """End the iteration before ``optimizer.step()``; reads the device if it decided."""
        self._arrived.clear()
        bad, self._bad = self._bad, []
        if self._flags:
            parameters, flags = zip(*self._flags, strict=True)
            self._flags = []
            assert isinstance(optimizer, NarrowOptimizer)
            for parameter, is_finite in zip(parameters, torch.stack(flags).tolist(), strict=True):
                if not is_finite:
                    optimizer.uncount_step(parameter)
                    bad.append(parameter)
        for parameter in _owned(optimizer):  # those that were not released, and step now
            if parameter.grad is not None and not _read(_is_finite(parameter.grad)):
                parameter.grad = None
                bad.append(parameter)
        self.skipped = tuple(bad)
        self._attach(optimizer)

    def _attach(self, optimizer: Optimizer) -> None:
        """Release all parameters that take gradients, from the next backward pass on."""
        for parameter in _owned(optimizer):
            if parameter.requires_grad and id(parameter) not in self._hooked:
                hook = parameter.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
                    partial(_arrive, self)
                )
                self._handles.append(hook)
                self._hooked.add(id(parameter))


def _arrive(release: GradientRelease, parameter: Tensor) -> None:
    release._step(parameter)


def _owned(optimizer: Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _drop(optimizer: Optimizer, *_: object) -> None:
    """Leave no gradient, which the next backward pass would add to."""
    for parameter in _owned(optimizer):
        parameter.grad = None


def _read(flag: Tensor) -> bool:
    """Wait for the device's word; a fake gradient has no value to be bad."""
    return isinstance(flag, FakeTensor) or bool(flag)


def _is_finite(gradient: Tensor) -> Tensor:
    """Return, unread on the device, whether every element is finite; needs no temporaries."""
    values = gradient if gradient.layout is torch.strided else gradient.coalesce().values()
    if values.numel() == 0:
        return torch.ones((), dtype=torch.bool, device=values.device)
    # The largest magnitude is infinite if one is, and NaN if one is.
    is_finite: Tensor = torch.linalg.vector_norm(values, math.inf).isfinite()
    return is_finite


def _require_releasable(optimizer: NarrowOptimizer) -> None:
    if not isinstance(optimizer, NarrowOptimizer):
        raise UsageError(
            f"{type(optimizer).__name__} cannot step during backward",
            hint="use narrowcast.AdamW, SGD or Lion, or convert.narrowed",
        )
    if optimizer in _ATTACHED:
        raise UsageError(
            "the optimizer's gradients are released already", hint="detach the first one before"
        )
    if any(parameter.grad is not None for parameter in _owned(optimizer)):
        raise UsageError(
            "there are gradients from before gradient release: the next backward pass would add to "
            "them",
            hint="call optimizer.zero_grad() first",
        )
    if are_several():
        raise UsageError(
            f"gradient release on {torch.distributed.get_world_size()} processes: each would step "
            "with its own gradients, before they are averaged",
            hint="keep the gradients (gradients='keep')",
        )
