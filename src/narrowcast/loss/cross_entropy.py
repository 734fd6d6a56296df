"""Cross-entropy of a linear head whose logits never exist as one tensor.

With hidden states h (N x D), weight W (V x D) and bias b, the logits z = h W^T + b take N x V
numbers, and torch keeps several of their size: for a small language model most of the peak. Here

    forward    z tile by tile; of each token only log sum exp(z) and the logit of its target stay
    backward   z again, tile by tile; p = exp(z - lse), dz = g (p - onehot(target))
               dh += dz W[block],  dW[block] += dz^T h

so that four products are computed where the whole version computes three. Numbers are fp32 inside
(fp64 for fp64 inputs): on a CPU 16-bit factors are widened block by block, on CUDA products take
them as they are and give fp32, and dz is rounded to 16 bits for the two products of backward.

``tiles`` decides the cut. Beside the tiles live a few numbers a token and two a class.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor  # has no public name

from narrowcast.errors import UnknownName, UsageError
from narrowcast.loss.passes import (
    Coefficients,
    Endings,
    Head,
    Settings,
    Tally,
    Targets,
    gradients,
    log_sum_exp,
)

__all__ = ["CHUNK_BYTES", "compute_format", "cross_entropy_in_chunks", "linear_cross_entropy"]

CHUNK_BYTES = 32 * 2**20
"""Tiles of 2,896 x 2,896 in fp32: products stay large, and an H100's L2 cache (50 MB) holds one."""

_REDUCTIONS = ("mean", "sum", "none")


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    chunk_bytes: int = CHUNK_BYTES,
) -> Tensor:
    """Return ``F.cross_entropy(F.linear(hidden, weight, bias), target, ...)``, tile by tile.

    hidden (..., D), weight (V, D), bias (V), class_weight (V), target (...) of class numbers.
    Under autocast both factors are rounded to autocast's format, as F.linear would, but logits and
    loss are fp32 whatever the inputs; gradients come in the formats of the inputs. Temporaries take
    at most `chunk_bytes`, plus one fp32 copy of the smaller gradient where both are 16-bit.
    Cannot be differentiated twice.
    """
    for name, given in (("hidden", hidden), ("weight", weight), ("target", target)):
        if not isinstance(given, Tensor):
            raise UsageError(f"{name} is a {type(given).__name__}", hint="pass a tensor")
    return cross_entropy_in_chunks(
        hidden,
        weight,
        target,
        bias=bias,
        class_weight=class_weight,
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
        chunk_bytes=chunk_bytes,
        compute=compute_format(hidden, weight),
        tally=Tally(),
    )


def compute_format(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """Return the format in which F.linear would multiply these, here and now."""
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind) and torch.float64 not in (hidden.dtype, weight.dtype):
        return torch.get_autocast_dtype(kind)
    if hidden.dtype != weight.dtype:
        raise UsageError(
            f"hidden is {hidden.dtype} and weight is {weight.dtype}, outside of autocast",
            hint="cast one of them, or call under torch.autocast as you would F.linear",
        )
    return hidden.dtype


def cross_entropy_in_chunks(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None,
    class_weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    chunk_bytes: int,
    compute: torch.dtype,
    tally: Tally,
) -> Tensor:
    """Do the work of linear_cross_entropy with factors rounded to `compute`, counting products."""
    if torch._C._are_functorch_transforms_active():  # has no public name
        raise UsageError(
            "linear_cross_entropy inside a transform of torch.func (grad, vmap, jvp, ...), which "
            "its own backward pass cannot follow",
            hint="differentiate by loss.backward() or torch.autograd.grad, or compute whole logits",
        )
    _require_shapes(hidden, weight, target, bias=bias, class_weight=class_weight)
    if reduction not in _REDUCTIONS:
        raise UnknownName.of("reduction", reduction, _REDUCTIONS)
    if not 0.0 <= label_smoothing <= 1.0:
        raise UsageError(f"label_smoothing is {label_smoothing}", hint="between 0 and 1")
    labels = target.reshape(-1).long()
    counted = labels != ignore_index
    _require_classes(labels, counted, weight.shape[0])
    labels = labels.where(counted, 0)
    accumulate = torch.float64 if compute == torch.float64 else torch.float32
    share = None if class_weight is None else class_weight.detach().to(accumulate)
    settings = Settings(
        compute=compute,
        accumulate=accumulate,
        smoothing=label_smoothing,
        chunk_bytes=chunk_bytes,
        tally=tally,
    )
    targets = Targets(labels=labels, counted=counted, share=share)
    losses: Tensor = _TokenLosses.apply(  # type: ignore[no-untyped-call]
        hidden.reshape(target.numel(), hidden.shape[-1]), weight, bias, (targets, settings)
    )
    if reduction == "none":
        return losses.reshape(target.shape)
    if reduction == "sum":
        return losses.sum()
    counts = counted.to(accumulate) if share is None else share[labels] * counted
    return losses.sum() / counts.sum()


def _require_shapes(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None,
    class_weight: Tensor | None,
) -> None:
    shapes = f"hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)}"
    if not (hidden.is_floating_point() and weight.is_floating_point()):
        raise UsageError(
            f"hidden is {hidden.dtype} and weight is {weight.dtype}", hint="floating-point tensors"
        )
    if hidden.dim() < 1 or weight.dim() != 2 or hidden.shape[-1] != weight.shape[1]:
        raise UsageError(f"{shapes} do not multiply", hint="(..., D) and (V, D)")
    if target.dtype.is_floating_point or target.is_complex() or target.dtype is torch.bool:
        raise UsageError(
            f"target is {target.dtype}: probabilities cannot be chunked",
            hint="give class numbers, or use F.cross_entropy on the logits",
        )
    if target.shape != hidden.shape[:-1]:
        raise UsageError(
            f"target {tuple(target.shape)} does not fit {shapes}",
            hint="one class number for each hidden state: the shape of hidden without its last",
        )
    for name, tensor in (("bias", bias), ("class_weight", class_weight)):
        if tensor is not None and tensor.shape != weight.shape[:1]:
            raise UsageError(
                f"{name} {tuple(tensor.shape)} does not fit {shapes}", hint="one number a class"
            )


def _require_classes(labels: Tensor, counted: Tensor, classes: int) -> None:
    """Refuse class numbers outside 0..V-1; on CUDA as torch does, without waiting for it."""
    if isinstance(labels, FakeTensor) or labels.is_meta:
        return
    outside = counted & ((labels < 0) | (labels >= classes))
    if labels.device.type != "cpu":
        torch._assert_async(~outside.any(), f"a target lies outside of 0..{classes - 1}")
    elif outside.any():
        raise UsageError(
            f"target {int(labels[outside][0])} is no class: the head has {classes}",
            hint=f"classes are 0..{classes - 1}; mark what is not to count with ignore_index",
        )


class _TokenLosses(torch.autograd.Function):
    """The loss of each token, 0 where it does not count; gradients for hidden, weight and bias."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        given: tuple[Targets, Settings],
    ) -> Tensor:
        targets, settings = given
        share = targets.share
        with torch.autocast(hidden.device.type, enabled=False):
            rounded = hidden.detach().to(settings.compute)
            head = Head(rounded, weight.detach(), bias, settings)
            lse, logit, weighted = log_sum_exp(head, targets)
            losses = (lse - logit) * (1 - settings.smoothing)
            if share is not None:
                losses *= share[targets.labels]
            if weighted is not None:
                total = head.classes if share is None else share.sum()
                losses += (total * lse - weighted) * (settings.smoothing / head.classes)
            losses = losses.where(targets.counted, 0.0)
        ctx.save_for_backward(rounded, weight, bias, targets.labels, targets.counted, share, lse)
        ctx.settings = settings
        ctx.hidden_dtype = hidden.dtype
        return losses

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise UsageError(
                "the gradient of linear_cross_entropy was asked for with create_graph=True, and "
                "it cannot be differentiated again",
                hint="use F.cross_entropy(F.linear(...)) where a gradient of a gradient is needed",
            )
        rounded, weight, bias, labels, counted, share, lse = ctx.saved_tensors
        for_hidden, for_weight, for_bias = ctx.needs_input_grad[:3]
        with torch.autocast(rounded.device.type, enabled=False):
            head = Head(rounded, weight, bias, ctx.settings)
            targets = Targets(labels=labels, counted=counted, share=share)
            each = Coefficients.of(gradient, head, targets)
            endings = Endings(
                hidden=ctx.hidden_dtype if for_hidden else None,
                weight=weight.dtype if for_weight else None,
                bias=bias.dtype if for_bias else None,
            )
            return (*gradients(head, each, lse, endings), None)
