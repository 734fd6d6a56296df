"""Narrow norms: 16 bits in and out of a norm, fp32 inside, and little kept for backward.

What a norm keeps decides a good part of a transformer's memory. CUDA's autocast runs layer and
group norms in fp32, keeps an fp32 copy of the input and hands on an fp32 result; torch's rms_norm
without a fused kernel keeps two fp32 tensors of the input's size; a norm with bf16 weights keeps
its statistics in bf16 on a CPU. A narrow norm keeps its input as it came and two fp32 numbers a row
(one for RMSNorm), and its result has the 16-bit format that is computed in:

    statistics, x^, dx, dw, db    in fp32, by torch's own fp32 kernels, a million numbers at a time
    y, dx                         rounded once, to the format that they leave in
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm  # the class of all batch norms
from torch.overrides import handle_torch_function, has_torch_function

from narrowcast.activations.forward import Forward
from narrowcast.activations.norm_rules import NORMS, NormRule, rule_of, wide
from narrowcast.errors import UsageError
from narrowcast.plan import EVERYWHERE, ActivationRule
from narrowcast.policy import Policy
from narrowcast.precision.islands import restore_autocast, switch_autocast_off

__all__ = ["NarrowNorm", "narrow_norm", "narrow_norms", "outside_islands", "require_narrow"]

_NARROW = (torch.bfloat16, torch.float16)
_OWN = tuple(kind.forward for kind in NORMS)
_CHUNK = 2**20  # numbers widened at a time: 4 MiB for each fp32 temporary


class _Narrow(torch.autograd.Function):
    """Any of the norms, some rows at a time."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w: Tensor | None, b: Tensor | None, how: tuple[NormRule, torch.dtype]
    ) -> Tensor:
        rule, dtype = how
        y = torch.empty_like(x, dtype=dtype, memory_format=rule.result_format)
        x_rows, y_rows = rule.rows(x), rule.rows(y)
        statistics = []
        for part in _parts(x_rows):
            y_part, *of_part = rule.forward(x_rows[part].float(), wide(w), wide(b))
            y_rows[part] = y_part
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
            dx_part, *of_part = ctx.rule.backward(
                dy_rows[part].float(),
                x_rows[part].float(),
                tuple(each[part] for each in statistics),
                wide(w),
                wide(b),
            )
            dx_rows[part] = dx_part
            sums = [_sum(total, one) for total, one in zip(sums, of_part, strict=True)]
        dw, db = (
            total if total is None else total.to(weight.dtype)
            for total, weight in zip(sums, (w, b), strict=True)
        )
        return dx, dw, db, None


@dataclass(frozen=True)
class NarrowNorm:
    """Lever: the norm computes in fp32, and keeps and returns 16 bits; in evaluation as well.

    An fp32 input outside of autocast (an evaluation in full precision) goes the norm's own way; so
    does a 16-bit one where torch's own kernel is as narrow, as CUDA's layer norm is.
    """

    rule: NormRule
    name: str = "narrow_norm"
    computes: bool = True
    natively: dict[tuple[torch.device, torch.dtype], bool] = field(
        default_factory=dict, compare=False, repr=False
    )
    """What `_is_native` found."""

    def run(self, module: nn.Module, inner: Forward, args: Any, kwargs: dict[str, Any]) -> Any:
        x = args[0] if args else next(iter(kwargs.values()))
        kind = x.device.type
        if torch.is_autocast_enabled(kind) and x.dtype in (torch.float32, *_NARROW):
            return narrow_norm(x, module, self.rule, torch.get_autocast_dtype(kind))
        if torch.compiler.is_compiling() and x.dtype in _NARROW:
            return narrow_norm(x, module, self.rule, x.dtype)
        if x.dtype in _NARROW and not self._is_native(module, inner, x):
            return narrow_norm(x, module, self.rule, x.dtype)
        return inner(*args, **kwargs)

    def _is_native(self, module: nn.Module, inner: Forward, x: Tensor) -> bool:
        """Whether torch's own kernel for these formats keeps as little, and that in fp32."""
        weights = list(module.parameters(recurse=False))
        if type(module).forward not in _OWN or any(w.dtype != x.dtype for w in weights):
            return False
        key = x.device, x.dtype
        if key not in self.natively:
            sample = x.new_zeros(self.rule.sample, requires_grad=True)
            self.natively[key] = _keeps_little(inner, sample, weights)
        return self.natively[key]


def _keeps_little(norm: Forward, sample: Tensor, weights: list[nn.Parameter]) -> bool:
    """Whether a norm saves fp32 numbers, fewer than its input has, beside input and weights."""
    saved: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda kept: kept):
        norm(sample)
    there = {id(sample), *map(id, weights)}
    return all(
        each.dtype is torch.float32 and each.numel() < sample.numel()
        for each in saved
        if id(each) not in there
    )


def narrow_norm(x: Tensor, module: nn.Module, rule: NormRule, dtype: torch.dtype) -> Tensor:
    """Return what the norm `module`, which computes by `rule`, makes of x, rounded to `dtype`."""
    if has_torch_function((x,)):  # by name, levers and other modes learn what is running
        result: Tensor = handle_torch_function(narrow_norm, (x,), x, module, rule, dtype)
        return result
    autocast = switch_autocast_off()
    try:
        w, b = getattr(module, "weight", None), getattr(module, "bias", None)
        if torch.compiler.is_compiling():
            return _in_one_graph(x, w, b, rule).to(dtype)
        narrowed: Tensor = _Narrow.apply(x, w, b, (rule, dtype))  # type: ignore[no-untyped-call]
        return narrowed
    finally:
        restore_autocast(autocast)


def _in_one_graph(x: Tensor, w: Tensor | None, b: Tensor | None, rule: NormRule) -> Tensor:
    """Return the norm of x in fp32, for a compiler, which chooses itself what is kept of it."""
    normal, *_ = rule.forward(rule.rows(x).float(), wide(w), wide(b))
    return normal.view(x.shape)


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
    found = [module for module in model.modules() if module in inside and rule_of(module)]
    if not found:
        raise _no_norms(rule, len(wanted), {module for module in inside if _is_called_norm(module)})
    return found


def _is_called_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower()


def _no_norms(rule: ActivationRule, count: int, others: set[nn.Module]) -> UsageError:
    names = ", ".join(sorted({type(module).__name__ for module in others}))
    message = (
        f"the rule {rule.modules!r} (lever 'narrow_norm') matches {count} modules, and none of "
        "them is or holds a norm that it knows"
    )
    if rule.modules == EVERYWHERE:
        message = "none of the model's modules is a norm that it knows"
    if others and all(isinstance(module, _BatchNorm) for module in others):
        return UsageError(
            f"{message}, but {names}",
            hint="batch norms keep a 16-bit input and fp32 statistics by themselves where their "
            "weights are fp32: drop the rule",
        )
    return UsageError(
        f"{message}; {names} compute in a way of their own" if names else message,
        hint=f"it knows {', '.join(kind.__name__ for kind in NORMS)} of torch.nn, and what "
        "computes as one of these",
    )


def outside_islands(model: nn.Module, norms: list[nn.Module], policy: Policy) -> list[nn.Module]:
    """Return the norms that are in no fp32 island: what a rule for all norms stands for."""
    names = {module: name for name, module in model.named_modules()}
    return [norm for norm in norms if _island_of(model, names[norm], policy) is None]


def _island_of(model: nn.Module, name: str, policy: Policy) -> str | None:
    """Return the name of the outermost fp32 island that a module is in; None outside of islands."""
    for path in _with_parents(name):
        module = model.get_submodule(path)
        classes = tuple(f"{c.__module__}.{c.__qualname__}" for c in type(module).__mro__)
        if policy.keeps(path, classes):
            return path
    return None


def require_narrow(model: nn.Module, name: str, policy: Policy) -> None:
    """Raise UsageError for a norm in an fp32 island, where nothing is narrow."""
    island = _island_of(model, name, policy)
    if island is not None:
        raise UsageError(
            f"lever 'narrow_norm' and keep_fp32 exclude each other on {name!r}: policy "
            f"{policy.name!r} keeps {island or 'the whole model'!r} in fp32 "
            f"({', '.join(policy.keep_fp32)}), where its input and output are fp32",
            hint="leave the norm out of keep_fp32: a narrow norm has fp32 statistics anyway",
        )


def _with_parents(name: str) -> Iterable[str]:
    parts = name.split(".") if name else []
    return (".".join(parts[:count]) for count in range(len(parts) + 1))
