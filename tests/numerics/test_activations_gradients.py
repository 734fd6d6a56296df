"""Facts about gradients under compression: right in the mean, and within derived bounds.

A product keeps X and its weight gradient is G^T X: linear in X, so with roundings X + E that are
right in the mean the gradient is right in the mean, and off by G^T E. With |E| < s (a step) and
variance at most s^2 / 4, independent for each number, an element of the gradient is off by less
than sum |G| s, and its variance is at most sum G^2 s^2 / 4.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from narrowcast.activations.packing import GROUP
from narrowcast.activations.rules import apply_rules
from narrowcast.plan import ActivationRule
from narrowcast.policy import POLICIES

ROWS, WIDTH, OUT = 64, 128, 16
TRIALS = 512
DTYPES = [torch.float32, torch.bfloat16]


class Body(nn.Module):
    """A function of one tensor, for the lever to be put on."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def levered(function: Callable[[Tensor], Tensor], lever: str) -> nn.Module:
    body = Body(function)
    model = nn.ModuleDict({"body": body})
    apply_rules(model, [ActivationRule(modules="body", lever=lever)], POLICIES["fp32"])  # type: ignore[arg-type]
    return body


def int8_steps(x: Tensor) -> Tensor:
    """Return s for each number, in fp64: a power of two for each 128 of them."""
    groups = x.double().abs().view(-1, GROUP)
    s = torch.exp2((groups.amax(1, keepdim=True) / 127).log2().ceil())
    return s.expand_as(groups).reshape(x.shape)


def e4m3_steps(x: Tensor) -> Tensor:
    """Return the distance of neighbouring values at each number, in fp64."""
    groups = x.double().abs().view(-1, GROUP)
    s = torch.exp2((groups.amax(1, keepdim=True) / 448).log2().ceil())
    return (s * torch.exp2((groups / s).log2().floor().clamp(min=-6) - 3)).view(x.shape)


STEPS = {"int8": int8_steps, "e4m3": e4m3_steps}


@pytest.mark.parametrize("lever", STEPS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gradient_of_a_weight_is_right_in_the_mean_and_within_its_bounds(
    dtype: torch.dtype, lever: str
) -> None:
    """512 roundings of one product: every gradient within sum |G| s, the mean within 6 errors.

    The bound on the mean is 6 standard errors of the derived deviation: 2e-9 for each of the 2,048
    elements, 4e-6 a test. For bf16 the gradient is rounded once more, to nearest: the bound on each
    gradient has half an ulp, 2^-8 of the gradient, beside it, and so has the mean. fp32 sums of 64
    products are off by at most 64 * 2^-24 of sum |G X|.
    """
    x = torch.randn(ROWS, WIDTH).to(dtype)
    weight = torch.randn(OUT, WIDTH).to(dtype).requires_grad_()
    g = torch.randn(ROWS, OUT).to(dtype)
    body = levered(lambda y: F.linear(y, weight), lever)
    exact = g.double().T @ x.double()
    step = STEPS[lever](x)
    most = g.double().abs().T @ step
    deviation = (g.double().square().T @ step.square() / 4).sqrt()
    slack = (g.double().abs().T @ (x.double().abs() + step)) * (ROWS * 2.0**-24)
    if dtype == torch.bfloat16:
        slack += (exact.abs() + most) * 2.0**-8

    total = torch.zeros_like(exact)
    for _ in range(TRIALS):
        weight.grad = None
        body(x.detach().requires_grad_() * 1.0).backward(g)
        assert weight.grad is not None
        off = (weight.grad.double() - exact).abs()
        assert bool((off <= most + slack).all())
        total += weight.grad.double()

    bound = 6 * deviation / math.sqrt(TRIALS) + slack
    assert bool(((total / TRIALS - exact).abs() <= bound).all())


@pytest.mark.parametrize(
    ("function", "third"),
    [(F.gelu, 0.78), (F.silu, 0.31), (torch.tanh, None), (torch.sigmoid, None)],
    ids=["gelu", "silu", "tanh", "sigmoid"],
)
def test_a_smooth_function_is_biased_by_no_more_than_its_curvature(
    function: Callable[[Tensor], Tensor], third: float | None
) -> None:
    """The mean of f'(x + e) is off by at most max|f'''| s^2 / 8, plus 6 errors of the mean.

    Taylor: f'(x + e) = f'(x) + f'' e + f''' e^2 / 2 with E e = 0 and E e^2 <= s^2 / 4. |f'''| is at
    most 0.78 for GELU and 0.31 for SiLU (of x Phi(x) and x sigmoid(x), on a grid in fp64). tanh and
    sigmoid keep their result y, whose slope is 1 - y^2 or y - y^2: with a second derivative of 2
    it is off by at most s^2 / 4 in the mean. The deviation of one slope is at most max|f''| s / 2,
    or max|slope'| s / 2, where these are 0.8, 0.5, 2 and 1: s is taken for all.
    """
    x = torch.linspace(-4, 4, 32 * GROUP).requires_grad_()
    body = levered(function, "int8")
    exact = torch.autograd.grad(function(x.double()).sum(), x)[0].double()
    kept = x if third is not None else function(x)
    step = int8_steps(kept.detach())
    bias = (third / 8 if third is not None else 1 / 4) * step.square()

    total = torch.zeros_like(exact)
    for _ in range(TRIALS):
        (gradient,) = torch.autograd.grad(body(x * 1.0).sum(), x)
        total += gradient.double()

    errors = 6 * step / math.sqrt(TRIALS)
    assert bool(((total / TRIALS - exact).abs() <= bias + errors + 2.0**-22).all())
