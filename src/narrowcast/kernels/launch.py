"""Hands a list of tensors to the kernel: the table of pointers, and one launch.

The table is built once for a list and found again by its pointers; from step to step only the
gradients' pointers change.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

import torch
from torch import Tensor

from narrowcast.kernels.steps import advance
from narrowcast.kernels.triton_names import HAS_TRITON

__all__ = ["BLOCK", "HAS_TRITON", "RULES", "Launch", "Row", "Table", "launch", "table_of"]

RULES = ("AdamW", "SGD", "Lion")
"""The rules that the kernel has."""
BLOCK = 2048
"""Elements of a program: a multiple of every block of codes, and a divisor of a tile of noise."""

_WARPS = 8
_COEFFICIENTS = 7
_COLUMNS = 9
_TABLES = 4096
"""Lists remembered: with gradient release every parameter is one. A kilobyte each, if short."""

Row = tuple[int, int, int, int, int, int, int, int]
"""Pointers of weight, remainder, two parts of two moments (0: none); then numel and ordinal."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """What the tensors of one launch have in common."""

    rule: str
    weights: str
    states: str
    has_moment: bool
    is_gradient_bf16: bool
    maximize: bool
    coefficients: tuple[float, ...]
    step_key: int


@dataclass(slots=True)
class Table:
    """The tensors of a list, on the device: rows, the row of each program, last gradients."""

    rows: Tensor
    owners: Tensor
    is_aligned: bool
    gradient_pointers: list[int] = field(default_factory=list)
    gradients: Tensor | None = None


_KNOWN: OrderedDict[tuple[torch.device, tuple[Row, ...]], Table] = OrderedDict()


def launch(
    table: Table, gradients: list[int], common: Launch, if_finite: Tensor | None = None
) -> None:
    """Step all tensors of the table; with `if_finite`, only where that bool is true.

    `gradients` are pointers, in the order of the rows.
    """
    numbers = (*common.coefficients, *(0.0,) * (_COEFFICIENTS - len(common.coefficients)))
    key = common.step_key
    advance[(table.owners.numel(),)](
        table.rows,
        table.owners,
        _upload_gradients(table, gradients),
        table.owners if if_finite is None else if_finite,
        key - (1 << 32) if key >> 31 else key,
        *numbers,
        RULE=common.rule,
        WEIGHTS=common.weights,
        STATES=common.states,
        HAS_MOMENT=common.has_moment,
        GRADIENT="bf16" if common.is_gradient_bf16 else "fp32",
        MAXIMIZE=common.maximize,
        HAS_FLAG=if_finite is not None,
        ALIGNED=table.is_aligned and all(pointer % 16 == 0 for pointer in gradients),
        COLUMNS=_COLUMNS,
        BLOCK=BLOCK,
        num_warps=_WARPS,
        # A contracted product would round differently from the CPU's.
        enable_fp_fusion=False,
    )


def table_of(rows: tuple[Row, ...], device: torch.device) -> Table:
    """Return the table of these rows, a known one if it can be."""
    key = device, rows
    table = _KNOWN.pop(key, None) or _made(rows, device)
    _KNOWN[key] = table
    if len(_KNOWN) > _TABLES:
        _KNOWN.popitem(last=False)
    return table


def _made(rows: tuple[Row, ...], device: torch.device) -> Table:
    programs = [-(-row[6] // BLOCK) for row in rows]
    firsts, first = [], 0
    for count in programs:
        firsts.append(first)
        first += count
    filled = [(*row, start) for row, start in zip(rows, firsts, strict=True)]
    owners = torch.repeat_interleave(torch.arange(len(rows)), torch.tensor(programs))
    return Table(
        _upload(torch.tensor(filled, dtype=torch.int64), device),
        _upload(owners.to(torch.int32), device),
        all(pointer % 16 == 0 for row in rows for pointer in row[:6]),
    )


def _upload_gradients(table: Table, gradients: list[int]) -> Tensor:
    if table.gradients is None or table.gradient_pointers != gradients:
        device = table.rows.device
        table.gradients = _upload(torch.tensor(gradients, dtype=torch.int64), device)
        table.gradient_pointers = gradients
    return table.gradients


def _upload(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy to the device without waiting; pinned memory is kept until the copy is done."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
