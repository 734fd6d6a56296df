"""linear_cross_entropy against fp64, within bounds that are worked out and not tuned.

With u = 2^-24 (fp32) and S = sum_k |h_k| |w_k| + |b| for each logit, to first order:

- a logit is a sum of D + 1 products and a bias:  |dz| <= (D + 2) u S =: delta (largest of the row)
- s = sum exp(z - m) adds V positive terms: relative error V u, plus that of each exp, whose
  argument was rounded, u (|z - m| + 2), plus a rescaling of three roundings for each of B class
  blocks: so lse = m + log s errs by  L := delta + (V + 6 B + X + 8) u + 2 u (|lse| + log V),
  X the range of the row's logits
- loss = lse - z:                        |d loss| <= L + delta + u (|lse| + |z|)
- p = exp(z - lse), relative:            R := delta + L + (X + log V + 4) u
- dz = g (p - onehot):                   |d dz| <= |g| p R + 4 u |g| (p + onehot)
- dh = sum_c dz w, dW = sum_i dz h:      sum |d dz| |w| + (n + B + 2) u sum |dz| |w|, n terms,
  then once rounded to the format of the gradient
- where products take 16-bit factors, dz is rounded to them: u16 |dz| more.

A margin of 2 covers the terms of second order. For fp64 inputs u = 2^-53, and the reference errs as
much: the bound is doubled.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from narrowcast.loss.cross_entropy import linear_cross_entropy

FP64, FP32, BF16, FP16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
UNIT = {FP64: 2**-53, FP32: 2**-24, BF16: 2**-9, FP16: 2**-11}
TINY = {FP64: 0.0, FP32: 2**-149, BF16: 2**-133, FP16: 2**-25}


@dataclass(frozen=True, kw_only=True)
class Case:
    tokens: int
    classes: int
    width: int
    dtype: torch.dtype
    chunk_bytes: int
    device: str = "cpu"
    rounds_dz: bool = False
    """Whether products take 16-bit factors, so that dz is rounded to them."""


@dataclass(frozen=True, kw_only=True)
class Result:
    loss: Tensor
    hidden: Tensor
    weight: Tensor
    bias: Tensor


def inputs(case: Case) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, weight, bias, targets of which some do not count, gradient of each loss."""
    hidden = torch.randn(case.tokens, case.width).to(case.dtype)
    weight = (torch.randn(case.classes, case.width) * 2 / case.width**0.5).to(case.dtype)
    bias = torch.randn(case.classes).to(case.dtype)
    target = torch.randint(0, case.classes, (case.tokens,))
    target[1::4] = -100
    return hidden, weight, bias, target, torch.rand(case.tokens) - 0.25


def found_by(case: Case, values: tuple[Tensor, ...]) -> Result:
    values = tuple(value.to(case.device) for value in values)
    hidden, weight, bias = (value.clone().requires_grad_() for value in values[:3])
    loss = linear_cross_entropy(
        hidden, weight, values[3], bias=bias, reduction="none", chunk_bytes=case.chunk_bytes
    )
    loss.backward(values[4].to(loss.dtype))
    assert hidden.grad is not None
    assert weight.grad is not None
    assert bias.grad is not None
    return Result(loss=loss.detach(), hidden=hidden.grad, weight=weight.grad, bias=bias.grad)


def expected_and_bounds(case: Case, values: tuple[Tensor, ...]) -> tuple[Result, Result]:
    """The whole computation in fp64, and by how much each number may be off."""
    hidden, weight, bias, _, gradient = (value.double() for value in values)
    target = values[3]
    unit = UNIT[FP64 if case.dtype == FP64 else FP32]
    n, v, d = case.tokens, case.classes, case.width
    blocks = v  # at most: a block has one class or more
    logits = hidden @ weight.T + bias
    counted = (target != -100).double()
    onehot = F.one_hot(target.clamp(min=0), v).double()
    lse = logits.logsumexp(1)
    picked = (logits * onehot).sum(1)
    p = (logits - lse[:, None]).exp()
    g = (gradient * counted)[:, None]
    dz = g * (p - onehot)

    size = hidden.abs() @ weight.abs().T + bias.abs()
    delta = (d + 2) * unit * size.amax(1)
    spread = logits.amax(1) - logits.amin(1)
    of_sum = (v + 6 * blocks + spread + 8) * unit + 2 * unit * (lse.abs() + math.log(v))
    of_lse = delta + of_sum
    of_loss = of_lse + delta + unit * (lse.abs() + picked.abs())
    relative = delta + of_lse + (spread + math.log(v) + 4) * unit
    of_dz = g.abs() * (p * relative[:, None] + 4 * unit * (p + onehot))
    if case.rounds_dz:
        of_dz = of_dz + UNIT[case.dtype] * dz.abs() + TINY[case.dtype]

    def rounded(value: Tensor, bound: Tensor) -> Tensor:
        return 2 * (bound + UNIT[case.dtype] * value.abs() + TINY[case.dtype])

    dh, dw, db = dz @ weight, dz.T @ hidden, dz.sum(0)
    of_dh = of_dz @ weight.abs() + (v + blocks + 2) * unit * (dz.abs() @ weight.abs())
    of_dw = of_dz.T @ hidden.abs() + (2 * n + 2) * unit * (dz.abs().T @ hidden.abs())
    of_db = of_dz.sum(0) + (2 * n + 2) * unit * dz.abs().sum(0)
    expected = Result(loss=(lse - picked) * counted, hidden=dh, weight=dw, bias=db)
    bounds = Result(
        loss=2 * of_loss,
        hidden=rounded(dh, of_dh),
        weight=rounded(dw, of_dw),
        bias=rounded(db, of_db),
    )
    return expected, bounds


def check(case: Case) -> None:
    values = inputs(case)
    found = found_by(case, values)
    expected, bounds = expected_and_bounds(case, values)

    assert found.loss.dtype == (FP64 if case.dtype == FP64 else FP32)
    assert {found.hidden.dtype, found.weight.dtype, found.bias.dtype} == {case.dtype}
    assert found.loss.device.type == torch.device(case.device).type
    for name in ("loss", "hidden", "weight", "bias"):
        got, want, bound = (getattr(of, name) for of in (found, expected, bounds))
        assert got.shape == want.shape
        excess = (got.double().cpu() - want).abs() - bound
        assert excess.numel() == 0 or float(excess.max()) <= 0, name
