"""How norms compute, on fp32 rows: forward, backward, and which modules are such norms.

Reference: Ba, Kiros and Hinton 2016; Zhang and Sennrich 2019 (RMSNorm); Wu and He 2018 (GroupNorm).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules.batchnorm import _NormBase  # the class of all norms with running statistics

from narrowcast.activations.forward import levered

__all__ = ["NORMS", "GroupRule", "LayerRule", "NormRule", "RmsRule", "rule_of", "wide"]

NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)

_aten = torch.ops.aten
_Statistics = tuple[Tensor, ...]
_Gradients = tuple[Tensor, Tensor | None, Tensor | None]


@dataclass(frozen=True)
class LayerRule:
    """Layer norm of fp32 rows: mean and 1/deviation of each row."""

    shape: tuple[int, ...]
    eps: float

    @property
    def result_format(self) -> torch.memory_format:
        return torch.contiguous_format

    @property
    def sample(self) -> tuple[int, ...]:
        """The shape of a small input."""
        return (2, *self.shape)

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
class RmsRule:
    """RMS norm of fp32 rows: y = x r w with r = 1 / sqrt(mean(x^2) + eps)."""

    shape: tuple[int, ...]
    eps: float

    @property
    def result_format(self) -> torch.memory_format:
        return torch.contiguous_format

    @property
    def sample(self) -> tuple[int, ...]:
        """The shape of a small input."""
        return (2, *self.shape)

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
class GroupRule:
    """Group norm of fp32 samples: mean and 1/deviation of each group of channels of each sample."""

    channels: int
    groups: int
    eps: float

    @property
    def result_format(self) -> torch.memory_format:
        return torch.preserve_format

    @property
    def sample(self) -> tuple[int, ...]:
        """The shape of a small input, of two numbers a group at least."""
        return (2, self.channels, 2)

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


NormRule = LayerRule | RmsRule | GroupRule


def _rows(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """View what is contiguous, as results are, with all leading dimensions as one; copy others."""
    leading = x.dim() - len(shape)
    return x.flatten(0, leading - 1) if leading else x.unsqueeze(0)


def _sizes(x: Tensor) -> tuple[int, int, int]:
    samples, channels = x.shape[:2]
    return samples, channels, x.shape[2:].numel()


def rule_of(module: nn.Module) -> NormRule | None:
    """Return how a norm computes; None for what is no norm, or one that computes in its own way.

    Norms of torch.nn by their class; others, such as those of transformers and timm, if they are
    built like one and agree with it on an example. Fake tensors have no values to compare.
    """
    rule = _built_like(module)
    if rule is None or any(type(module).forward is kind.forward for kind in NORMS):
        return rule
    weight = getattr(module, "weight", None)
    return rule if isinstance(weight, FakeTensor) or _agrees(module, rule) else None


def _built_like(module: nn.Module) -> NormRule | None:
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if isinstance(module, nn.GroupNorm):
        return GroupRule(module.num_channels, module.num_groups, module.eps)
    if isinstance(module, nn.LayerNorm):
        return LayerRule(module.normalized_shape, module.eps)
    if isinstance(module, nn.RMSNorm):
        # As torch's rms_norm, which squares in fp32, has it where none is given.
        return RmsRule(
            module.normalized_shape, torch.finfo(torch.float32).eps if eps is None else eps
        )
    weight = getattr(module, "weight", None)
    is_norm = "norm" in type(module).__name__.lower() and not isinstance(module, _NormBase)
    if is_norm and isinstance(weight, Tensor) and weight.dim() == 1 and isinstance(eps, float):
        return RmsRule(tuple(weight.shape), eps)
    return None


# Two ways to compute the same differ by roundings, to 8 bits at the coarsest; another formula (a
# weight that is added to 1, a mean that is left) differs by a good part of the numbers.
_SAME = 2.0**-5


def _agrees(module: nn.Module, rule: NormRule) -> bool:
    """Whether a norm gives what the rule gives, for three rows whose means are not 0."""
    w, b = (getattr(module, name, None) for name in ("weight", "bias"))
    shape = (rule.channels, 2) if isinstance(rule, GroupRule) else rule.shape
    x = torch.linspace(-1, 2, 3 * math.prod(shape), device=None if w is None else w.device)
    x = x.view(3, *shape)
    own = found.own() if (found := levered(module)) is not None else module.forward
    try:
        with torch.no_grad():
            theirs = own(x)
            ours, *_ = rule.forward(x, wide(w), wide(b))
    except (RuntimeError, ValueError, TypeError):  # a norm of images, or of anything else
        return False
    if not isinstance(theirs, Tensor) or theirs.shape != ours.shape:
        return False
    return bool(((theirs.float() - ours).abs() <= _SAME * ours.abs().max()).all())


def wide(weight: Tensor | None) -> Tensor | None:
    """Return a weight in fp32."""
    return None if weight is None else weight.float()
