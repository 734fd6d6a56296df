"""Narrow norms: 16 bits in and out of a norm, fp32 inside, and little kept for backward.

What a norm keeps decides a good part of a transformer's memory. CUDA's autocast runs layer and
group norms in fp32, keeps an fp32 copy of the input and hands on an fp32 result; torch's rms_norm
without a fused kernel keeps two fp32 tensors of the input's size; a norm with bf16 weights keeps
its statistics in bf16 on a CPU. A narrow norm keeps its input as it came and two fp32 numbers a row
(one for RMSNorm), and its result has the 16-bit format that is computed in:

    statistics, x^, dx, dw, db    in fp32, by torch's own fp32 kernels, a million numbers at a time
    y, dx                         rounded once, to the format that they leave in

Reference: Ba, Kiros and Hinton 2016; Zhang and Sennrich 2019 (RMSNorm); Wu and He 2018 (GroupNorm).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.overrides import handle_torch_function, has_torch_function

from narrowcast.activations.forward import Forward
from narrowcast.errors import UsageError
from narrowcast.plan import ActivationRule
from narrowcast.policy import Policy
from narrowcast.precision.islands import restore_autocast, switch_autocast_off

__all__ = ["NarrowNorm", "narrow_norm", "narrow_norms", "require_narrow"]

NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)
_NARROW = (torch.bfloat16, torch.float16)
_CHUNK = 2**20  # numbers widened at a time: 4 MiB for each fp32 temporary

_aten = torch.ops.aten
_Statistics = tuple[Tensor, ...]
_Gradients = tuple[Tensor, Tensor | None, Tensor | None]


@dataclass(frozen=True)
class NarrowNorm:
    """Lever: the norm computes in fp32, and keeps and returns 16 bits; in evaluation as well.

    An fp32 input outside of autocast (an evaluation in full precision) goes the norm's own way.
    """

    name: str = "narrow_norm"
    computes: bool = True

    def run(self, module: nn.Module, inner: Forward, args: Any, kwargs: dict[str, Any]) -> Any:
        x = args[0] if args else kwargs["input"]
        kind = x.device.type
        if torch.is_autocast_enabled(kind) and x.dtype in (torch.float32, *_NARROW):
            return narrow_norm(x, module, torch.get_autocast_dtype(kind))
        return narrow_norm(x, module, x.dtype) if x.dtype in _NARROW else inner(*args, **kwargs)


def narrow_norm(x: Tensor, module: nn.Module, dtype: torch.dtype) -> Tensor:
    """Return what the norm `module` makes of x, rounded to `dtype`."""
    if has_torch_function((x,)):  # by name, levers and other modes learn what is running
        result: Tensor = handle_torch_function(narrow_norm, (x,), x, module, dtype)
        return result
    autocast = switch_autocast_off()
    try:
        bias = getattr(module, "bias", None)
        narrowed: Tensor = _Narrow.apply(x, module.weight, bias, _rule(module), dtype)  # type: ignore[no-untyped-call]
        return narrowed
    finally:
        restore_autocast(autocast)


@dataclass(frozen=True)
class _Layer:
    """Layer norm of fp32 rows: mean and 1/deviation of each row."""

    shape: tuple[int, ...]
    eps: float
    result_format: torch.memory_format = torch.contiguous_format

    def rows(self, x: Tensor) -> Tensor:
        return _rows(x, self.shape)

    def forward(self, x: Tensor, w: Tensor | None, b: Tensor | None) -> tuple[Tensor, ...]:
        return tuple(_aten.native_layer_norm(x, self.shape, w, b, self.eps))

    def backward(
        self, dy: Tensor, x: Tensor, statistics: _Statistics, w: Tensor | None, b: Tensor | None
    ) -> _Gradients:
        mask = [True, w is not None, b is not None]
        mean, rstd = statistics
        return tuple(_aten.native_layer_norm_backward(dy, x, self.shape, mean, rstd, w, b, mask))


@dataclass(frozen=True)
class _Rms:
    """RMS norm of fp32 rows: y = x r w with r = 1 / sqrt(mean(x^2) + eps)."""

    shape: tuple[int, ...]
    eps: float
    result_format: torch.memory_format = torch.contiguous_format

    def rows(self, x: Tensor) -> Tensor:
        return _rows(x, self.shape)

    def forward(self, x: Tensor, w: Tensor | None, b: Tensor | None) -> tuple[Tensor, ...]:
        r = x.square().mean(self._dims(), keepdim=True).add_(self.eps).rsqrt_()
        y = x * r
        return (y if w is None else y.mul_(w)), r

    def backward(
        self, dy: Tensor, x: Tensor, statistics: _Statistics, w: Tensor | None, b: Tensor | None
    ) -> _Gradients:
        """With x^ = x r and g = dy w: dx = r (g - x^ mean(g x^)), dw = sum over rows of dy x^."""
        (r,) = statistics
        normal = x * r
        dw = None if w is None else (dy * normal).sum(0)
        g = dy if w is None else dy * w
        dx = (g - normal * (g * normal).mean(self._dims(), keepdim=True)).mul_(r)
        return dx, dw, None

    def _dims(self) -> tuple[int, ...]:
        return tuple(range(-len(self.shape), 0))


@dataclass(frozen=True)
class _Group:
    """Group norm of fp32 samples: mean and 1/deviation of each group of channels of each sample."""

    groups: int
    eps: float
    result_format: torch.memory_format = torch.preserve_format

    def rows(self, x: Tensor) -> Tensor:
        return x

    def forward(self, x: Tensor, w: Tensor | None, b: Tensor | None) -> tuple[Tensor, ...]:
        x = x.contiguous()
        return tuple(_aten.native_group_norm(x, w, b, *_sizes(x), self.groups, self.eps))

    def backward(
        self, dy: Tensor, x: Tensor, statistics: _Statistics, w: Tensor | None, b: Tensor | None
    ) -> _Gradients:
        dy, x = dy.contiguous(), x.contiguous()
        mask = [True, w is not None, b is not None]
        return tuple(
            _aten.native_group_norm_backward(dy, x, *statistics, w, *_sizes(x), self.groups, mask)
        )


_Rule = _Layer | _Rms | _Group


def _rows(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """View what is contiguous, as results are, with all leading dimensions as one; copy others."""
    leading = x.dim() - len(shape)
    return x.flatten(0, leading - 1) if leading else x.unsqueeze(0)


def _sizes(x: Tensor) -> tuple[int, int, int]:
    samples, channels = x.shape[:2]
    return samples, channels, x.shape[2:].numel()


def _rule(module: nn.Module) -> _Rule:
    if isinstance(module, nn.LayerNorm):
        return _Layer(module.normalized_shape, module.eps)
    if isinstance(module, nn.RMSNorm):
        # As torch's rms_norm, which squares in fp32, has it where none is given.
        eps = torch.finfo(torch.float32).eps if module.eps is None else module.eps
        return _Rms(module.normalized_shape, eps)
    assert isinstance(module, nn.GroupNorm)
    return _Group(module.num_groups, module.eps)


class _Narrow(torch.autograd.Function):
    """Any of the norms, some rows at a time."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w: Tensor | None, b: Tensor | None, rule: _Rule, dtype: torch.dtype
    ) -> Tensor:
        y = torch.empty_like(x, dtype=dtype, memory_format=rule.result_format)
        x_rows, y_rows = rule.rows(x), rule.rows(y)
        statistics = []
        for part in _parts(x_rows):
            wide, *of_part = rule.forward(x_rows[part].float(), _wide(w), _wide(b))
            y_rows[part] = wide
            statistics.append(of_part)
        ctx.rule = rule
        ctx.save_for_backward(x, w, b, *map(torch.cat, zip(*statistics, strict=True)))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, w, b, *statistics = ctx.saved_tensors
        dx = torch.empty_like(x, memory_format=ctx.rule.result_format)
        x_rows, dx_rows, dy_rows = map(ctx.rule.rows, (x, dx, dy))
        sums: list[Tensor | None] = [None, None]
        for part in _parts(x_rows):
            wide, *of_part = ctx.rule.backward(
                dy_rows[part].float(),
                x_rows[part].float(),
                tuple(each[part] for each in statistics),
                _wide(w),
                _wide(b),
            )
            dx_rows[part] = wide
            sums = [_sum(total, one) for total, one in zip(sums, of_part, strict=True)]
        dw, db = (
            total if total is None else total.to(weight.dtype)
            for total, weight in zip(sums, (w, b), strict=True)
        )
        return dx, dw, db, None, None


def _wide(weight: Tensor | None) -> Tensor | None:
    return None if weight is None else weight.float()


def _sum(total: Tensor | None, one: Tensor | None) -> Tensor | None:
    return one if total is None or one is None else total + one


def _parts(rows: Tensor) -> Iterator[slice]:
    """Cut rows into chunks; one empty chunk if there are no rows."""
    step = max(1, _CHUNK // max(1, rows[:1].numel()))
    yield from (slice(start, start + step) for start in range(0, max(1, len(rows)), step))


def narrow_norms(model: nn.Module, rule: ActivationRule, wanted: set[nn.Module]) -> list[nn.Module]:
    """Return the norms that a rule's modules are or hold, in the order of the model.

    Raises UsageError if there are none, or only such as compute in a way of their own.
    """
    inside = {inner for module in wanted for inner in module.modules()}
    found = [module for module in model.modules() if module in inside and _is_known(module)]
    if not found:
        others = sorted({type(m).__name__ for m in inside if "norm" in type(m).__name__.lower()})
        own = f"; {', '.join(others)} compute in a way of their own" if others else ""
        raise UsageError(
            f"the rule {rule.modules!r} (lever 'narrow_norm') matches {len(wanted)} modules, and "
            f"none of them is or holds a norm that it knows{own}",
            hint=f"it knows {', '.join(kind.__name__ for kind in NORMS)} of torch.nn",
        )
    return found


def _is_known(module: nn.Module) -> bool:
    """Whether a module computes as torch's class says; a subclass may have another forward."""
    return any(isinstance(module, k) and type(module).forward is k.forward for k in NORMS)


def require_narrow(model: nn.Module, name: str, policy: Policy) -> None:
    """Raise UsageError for a norm in an fp32 island, where nothing is narrow."""
    for path in _with_parents(name):
        module = model.get_submodule(path)
        classes = tuple(f"{c.__module__}.{c.__qualname__}" for c in type(module).__mro__)
        if policy.keeps(path, classes):
            raise UsageError(
                f"lever 'narrow_norm' and keep_fp32 exclude each other on {name!r}: policy "
                f"{policy.name!r} keeps {path or 'the whole model'!r} in fp32 "
                f"({', '.join(policy.keep_fp32)}), where its input and output are fp32",
                hint="leave the norm out of keep_fp32: a narrow norm has fp32 statistics anyway",
            )


def _with_parents(name: str) -> Iterable[str]:
    parts = name.split(".") if name else []
    return (".".join(parts[:count]) for count in range(len(parts) + 1))
