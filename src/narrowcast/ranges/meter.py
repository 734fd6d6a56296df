"""Meters a live optimizer: which updates its 16-bit weights and states do not take.

Before a step, the step is taken on a copy in fp32, one parameter at a time, by the optimizer's own
class with the parameter's own state, so that weight decay, momentum and whatever else the rule does
are in it. After the real step the two are compared on a sample of elements:

    before   <- what is stored
    wanted   <- the rule's step from there, in fp32
    (the optimizer steps)
    lost     <- wanted != before, and what is stored is what was

The copy is one parameter with its state, and what is held during the step is the sample.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from narrowcast.errors import NarrowcastError, UsageError
from narrowcast.precision.cast import format_name
from narrowcast.ranges.updates import UpdateLoss, compare_updates

__all__ = ["SAMPLE", "UpdateMeter", "WeightUpdates"]

SAMPLE = 1 << 16
"""Elements of a parameter that are compared: a share then has a standard error of 0.2 points."""

# A copy is one tensor: nothing to fuse, and nothing to capture into a graph.
_WAYS = ("foreach", "fused", "capturable", "differentiable")

# What an optimizer raises that takes something that is not in its groups, or only 16-bit weights.
_NO_COPY = (TypeError, ValueError, KeyError, AttributeError, RuntimeError, NarrowcastError)


@dataclass(frozen=True, kw_only=True)
class WeightUpdates:
    """What one parameter, stored in 16 bits, took of one step."""

    name: str
    stored: str
    """The format of the parameter, and for a narrow optimizer its weight store."""
    weight: UpdateLoss
    states: Mapping[str, UpdateLoss] = field(default_factory=dict)
    """Of the 16-bit states of the parameter's shape, such as ``exp_avg_sq``."""
    rule_known: bool = True
    """False where the optimizer could not be copied: updated is what has a gradient."""


@dataclass(frozen=True)
class _Sample:
    """Elements of one parameter before a step, and what they should be after it."""

    parameter: Tensor
    name: str
    stored: str
    at: Tensor | None
    """Flat positions; None: all of them."""
    before: Tensor
    wanted: Tensor | None
    states: dict[str, tuple[Tensor, Tensor]]
    gradient: Tensor

    def of(self, tensor: Tensor) -> Tensor:
        return _taken(tensor, self.at)


class UpdateMeter:
    """Meters, while entered, each step of an optimizer whose weights are stored in 16 bits.

    `updates` tells of the last step; parameters that are stored in fp32 lose nothing and are left
    out, as are those without a gradient. `model` gives the parameters their names. Works on torch's
    optimizers, on narrow ones and on any other that can be built from its parameter groups.

    A metered step is taken twice, and reads the device a few times for each parameter. It leaves no
    trace: weights, states and random states are what they are without.
    """

    def __init__(
        self, optimizer: Optimizer, model: nn.Module | None = None, *, sample: int = SAMPLE
    ) -> None:
        if sample < 1:
            raise UsageError(f"a sample of {sample} elements", hint="take 1 or more")
        named = () if model is None else model.named_parameters()
        self._names = {id(parameter): name for name, parameter in named}
        self._optimizer = optimizer
        self._size = sample
        self._before: list[_Sample] = []
        self._hooks: list[Any] = []
        self.updates: tuple[WeightUpdates, ...] = ()

    def __enter__(self) -> Self:
        optimizer = self._optimizer
        self._hooks = [
            optimizer.register_step_pre_hook(lambda *_: self._look()),
            optimizer.register_step_post_hook(lambda *_: self._compare()),
        ]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for hook in self._hooks:
            hook.remove()
        self._before.clear()

    @torch.no_grad()
    def _look(self) -> None:
        self._before = [
            self._sampled(group, index, parameter)
            for group in self._optimizer.param_groups
            for index, parameter in enumerate(group["params"])
            if parameter.grad is not None and parameter.dtype.itemsize == 2
        ]

    def _sampled(self, group: dict[str, Any], index: int, parameter: Tensor) -> _Sample:
        optimizer = self._optimizer
        at = _positions(parameter.numel(), self._size, parameter.device)
        label = f"parameter {index} of shape {tuple(parameter.shape)}"
        store = f" ({group['weights']})" if _is_narrow(optimizer) else ""
        wanted, states = _stepped(optimizer, group, parameter) or (None, {})
        held = optimizer.state.get(parameter, {})
        return _Sample(
            parameter,
            self._names.get(id(parameter), label),
            f"{format_name(parameter.dtype)}{store}",
            at,
            _taken(_stored(optimizer, parameter), at),
            None if wanted is None else _taken(wanted, at),
            {
                key: (_taken(held[key].float(), at), _taken(value, at))
                for key, value in states.items()
            },
            _taken(_gradient(optimizer, parameter).to_dense(), at),
        )

    @torch.no_grad()
    def _compare(self) -> None:
        self.updates = tuple(map(self._result, self._before))
        self._before = []

    def _result(self, sample: _Sample) -> WeightUpdates:
        optimizer = self._optimizer
        after = sample.of(_stored(optimizer, sample.parameter))
        held = optimizer.state.get(sample.parameter, {})
        return WeightUpdates(
            name=sample.name,
            stored=sample.stored,
            weight=_without_rule(sample, after)
            if sample.wanted is None
            else compare_updates(sample.before, sample.wanted, after),
            states={
                key: compare_updates(before, wanted, sample.of(held[key].float()))
                for key, (before, wanted) in sample.states.items()
            },
            rule_known=sample.wanted is not None,
        )


def _without_rule(sample: _Sample, after: Tensor) -> UpdateLoss:
    """Count where a gradient moved nothing; how far it should have is not known."""
    known = compare_updates(sample.before, after, after)
    has_gradient = sample.gradient != 0
    kept = has_gradient & (after == sample.before)
    return UpdateLoss(
        elements=known.elements,
        updated=int(has_gradient.sum()),
        lost=int(kept.sum()),
        ratio=known.ratio,
        carried=None,
    )


def _stepped(
    optimizer: Optimizer, group: dict[str, Any], parameter: Tensor
) -> tuple[Tensor, dict[str, Tensor]] | None:
    """Step a copy of one parameter in fp32; None if the optimizer cannot step one by itself.

    Returns the weight, and the states that are stored in 16 bits, as they should be afterwards.
    """
    options = {
        key: copy.deepcopy(value)
        for key, value in group.items()
        if key not in ("params", "param_names", "keep_fp32")
    }
    options.update(dict.fromkeys((way for way in _WAYS if way in options), False))
    narrow = _is_narrow(optimizer)
    held = {key: copy.deepcopy(value) for key, value in optimizer.state.get(parameter, {}).items()}
    twin = parameter.detach().clone() if narrow else parameter.detach().float()
    wide = nn.Parameter(twin)
    gradient = _gradient(optimizer, parameter)
    devices = [parameter.device] if parameter.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        try:
            make: Any = type(optimizer)
            shadow = make([{"params": [wide], **options}])
            if narrow:
                shadow.state[wide].update(held)
                shadow.keep_fp32([wide])
            else:
                shadow.state[wide].update({key: _widened(value) for key, value in held.items()})
            wide.grad = gradient
            shadow.step()
        except _NO_COPY:
            return None
    after = shadow.state[wide]
    kept = [] if narrow else [key for key in held if _is_metered(held[key], wide)]
    return wide.detach(), {key: after[key] for key in kept}


def _is_narrow(optimizer: Optimizer) -> bool:
    """Whether it stores weights as ``optim.NarrowOptimizer`` does, which is not imported here."""
    return hasattr(optimizer, "keep_fp32") and hasattr(optimizer, "master")


def _is_in_16_bits(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.dtype.itemsize == 2


def _is_metered(value: Any, parameter: Tensor) -> bool:
    return _is_in_16_bits(value) and value.shape == parameter.shape


def _widened(value: Any) -> Any:
    return value.float() if _is_in_16_bits(value) else value


def _stored(optimizer: Optimizer, parameter: Tensor) -> Tensor:
    """Return the fp32 numbers that a parameter stands for."""
    if _is_narrow(optimizer):
        master: Tensor = optimizer.master(parameter)  # type: ignore[attr-defined]
        return master
    return parameter.detach().float()


def _gradient(optimizer: Optimizer, parameter: Tensor) -> Tensor:
    """Return the gradient that the rule takes, in fp32: a fused step unscales it by itself."""
    assert parameter.grad is not None
    gradient = parameter.grad.detach().float()
    scale = getattr(optimizer, "grad_scale", None)
    return gradient if scale is None else gradient / scale


def _positions(numel: int, size: int, device: torch.device) -> Tensor | None:
    """Draw the elements to compare, the same at each step, from a generator of our own."""
    if numel <= size:
        return None
    generator = torch.Generator().manual_seed(numel)
    return torch.randint(numel, (size,), generator=generator).to(device)


def _taken(tensor: Tensor, at: Tensor | None) -> Tensor:
    flat = tensor.reshape(-1)
    return flat.clone() if at is None else flat[at]
