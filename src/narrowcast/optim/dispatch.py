"""Which code carries out a step: our kernels on CUDA where Triton is installed, torch elsewhere.

Both round in the same places. The results differ where torch's own operations do: its square root
on the CPU is not correctly rounded, and which products are fused with sums is its choice. What a
kernel cannot read, a tensor with holes or a gradient laid out unlike its parameter, goes to torch.

Looking at every tensor costs the host more time than a small model costs the GPU. So a step by
kernels leaves a `Routine`, and the next one only makes sure that everything is where it was.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor  # has no public name

from narrowcast.kernels.launch import HAS_TRITON, RULES, Launch, Row, Table, launch, table_of
from narrowcast.optim.layout import is_dense, layout_of
from narrowcast.optim.loading import STEP
from narrowcast.optim.parts import part_of
from narrowcast.optim.rule import Rule
from narrowcast.optim.step import Item, Numbers, update
from narrowcast.optim.weights import REMAINDER
from narrowcast.rounding import mix, step_key

__all__ = [
    "Kind",
    "Routine",
    "advance",
    "advance_by_kernels",
    "can_defer",
    "repeat",
    "runs_by_kernels",
]


@dataclass(slots=True)
class Kind:
    """Tensors of one launch, and what has to be as it was for the launch to be repeated."""

    numbers: Numbers
    group: dict[str, Any]
    dtype: torch.dtype
    """Of the gradients."""
    table: Table
    entries: list[tuple[Tensor, int, dict[str, Any], tuple[tuple[str, Tensor], ...]]]
    """Parameter, its pointer, its state, and the tensors in it."""


@dataclass(frozen=True)
class Routine:
    """A step that can be repeated while groups, stores and parameters are what they were."""

    kinds: list[Kind]
    shapes: list[tuple[Any, ...]]
    idle: list[Tensor]
    """Parameters without a gradient."""

    @classmethod
    def of(cls, groups: list[dict[str, Any]], kinds: list[Kind]) -> Routine:
        idle = [p for group in groups for p in group["params"] if p.grad is None]
        return cls(kinds, [_shape(group) for group in groups], idle)

    def holds(self, groups: list[dict[str, Any]]) -> bool:
        return self.shapes == [_shape(group) for group in groups] and all(
            parameter.grad is None for parameter in self.idle
        )


def _shape(group: dict[str, Any]) -> tuple[Any, ...]:
    """Return what of a group decides how its parameters are stored and which they are."""
    moments = group.get("momentum", 0) != 0
    return id(group["params"]), len(group["params"]), group["weights"], group["states"], moments


def runs_by_kernels(rule: Rule, parameter: Tensor, gradient: Tensor) -> bool:
    """Whether the kernel can step this parameter with this gradient."""
    return _has_kernel(rule, parameter) and _is_flat(parameter, gradient)


def can_defer(rule: Rule, parameter: Tensor) -> bool:
    """Whether the code for this parameter can leave a decision to the device."""
    gradient = parameter.grad
    return gradient is not None and runs_by_kernels(rule, parameter, gradient)


def advance(
    rule: Rule, items: Sequence[Item], if_finite: Tensor | None = None
) -> list[Kind] | None:
    """Take one step of `rule` with every item, in place, on the device's word if it is asked.

    Returns what can be repeated, None if not all of it can.
    """
    fit: list[Item] = []
    rest: list[Item] = []
    for item in items:
        (fit if runs_by_kernels(rule, item.parameter, item.gradient) else rest).append(item)
    assert if_finite is None or not rest
    kinds = advance_by_kernels(rule, fit, if_finite)
    update(rule, rest)
    is_repeatable = bool(fit) and not rest and not any(item.layout for item in fit)
    return kinds if is_repeatable else None


def advance_by_kernels(
    rule: Rule, items: Sequence[Item], if_finite: Tensor | None = None
) -> list[Kind]:
    """Take one step with one launch for each kind of item."""
    found: dict[tuple[int, torch.dtype, torch.device], list[Item]] = {}
    for item in items:
        if item.parameter.numel():
            key = id(item.numbers), item.gradient.dtype, item.parameter.device
            found.setdefault(key, []).append(item)
    kinds = []
    for alike in found.values():
        first = alike[0]
        rows = tuple(_row(item) for item in alike)
        kind = Kind(
            first.numbers,
            first.group,
            first.gradient.dtype,
            table_of(rows, first.parameter.device),
            [_entry(item) for item in alike],
        )
        _launch(rule, kind, [item.gradient.data_ptr() for item in alike], if_finite)
        kinds.append(kind)
    return kinds


def repeat(rule: Rule, kinds: Sequence[Kind], states: Mapping[Any, dict[str, Any]]) -> bool:
    """Take the step after the one that left `kinds`; False, with nothing done, if it is another.

    Every pointer is looked at again, and every state tensor, layout, dtype and step count.
    """
    gradients: list[list[int]] = []
    for kind in kinds:
        pointers: list[int] = []
        dtype, step = kind.dtype, kind.numbers.step
        for parameter, pointer, state, parts in kind.entries:
            gradient = parameter.grad
            if (
                gradient is None
                or gradient.dtype is not dtype
                or parameter.dtype is not kind.numbers.weights.dtype
                or not gradient.is_contiguous()
                or parameter.data_ptr() != pointer
                or not parameter.is_contiguous()
                or states.get(parameter) is not state
                or state.get(STEP) != step
            ):
                return False
            for key, part in parts:
                if state.get(key) is not part:
                    return False
            pointers.append(gradient.data_ptr())
        gradients.append(pointers)
    for kind, pointers in zip(kinds, gradients, strict=True):
        kind.numbers = kind.numbers.next(rule, kind.group)
        for _, _, state, _ in kind.entries:
            state[STEP] = kind.numbers.step
        _launch(rule, kind, pointers, None)
    return True


def _launch(rule: Rule, kind: Kind, gradients: list[int], if_finite: Tensor | None) -> None:
    numbers, device = kind.numbers, kind.table.rows.device
    common = Launch(
        rule=rule.name,
        weights=numbers.weights.name,
        states=numbers.states.name,
        has_moment=bool(numbers.moments),
        is_gradient_bf16=kind.dtype is torch.bfloat16,
        maximize=numbers.maximize,
        coefficients=numbers.coefficients,
        step_key=step_key(numbers.seed, numbers.step),
    )
    on_cuda = device.type == "cuda"
    with torch.cuda.device(device) if on_cuda else contextlib.nullcontext():
        launch(kind.table, gradients, common, if_finite)


def _row(item: Item) -> Row:
    state, numbers = item.state, item.numbers
    remainder = 0 if numbers.weights.remainder is None else state[REMAINDER].data_ptr()
    parts = [0, 0, 0, 0]
    for index, moment in enumerate(numbers.moments):
        for offset, key in enumerate(numbers.states.part_keys(moment)):
            parts[2 * index + offset] = state[key].data_ptr()
    parameter = item.parameter
    m, m_scales, v, v_scales = parts
    numel = parameter.numel()
    return parameter.data_ptr(), remainder, m, m_scales, v, v_scales, numel, _ordinal(item)


def _ordinal(item: Item) -> int:
    """Return what makes an item's noise its own: of parts of one parameter, each another.

    The kernel counts elements from the beginning of what it is given, where the reference counts
    them from that of the whole: their noise for parts differs.
    """
    part = part_of(item.parameter)
    if part is None or part.start == 0:
        return item.ordinal
    return (item.ordinal + mix(part.start)) & 0x7FFFFFFF


def _entry(item: Item) -> tuple[Tensor, int, dict[str, Any], tuple[tuple[str, Tensor], ...]]:
    parts = tuple((k, t) for k, t in item.state.items() if isinstance(t, Tensor))
    return item.parameter, item.parameter.data_ptr(), item.state, parts


def _has_kernel(rule: Rule, parameter: Tensor) -> bool:
    # A fake tensor has no memory for a kernel to read, wherever it says that it lies.
    is_real = not isinstance(parameter, FakeTensor)
    return HAS_TRITON and is_real and parameter.is_cuda and rule.name in RULES


def _is_flat(parameter: Tensor, gradient: Tensor) -> bool:
    """Whether both run through one piece of memory in the same order, in a dtype that is known."""
    if gradient.dtype not in (torch.float32, torch.bfloat16):
        return False
    if parameter.is_contiguous() and gradient.is_contiguous():
        return True
    layout = layout_of(parameter)
    if layout_of(gradient) != layout:
        return False
    return all(is_dense(tensor, layout) for tensor in (parameter, gradient))
