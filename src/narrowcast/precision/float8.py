"""Linear layers whose three products are computed in fp8, on hardware that has it or emulated.

Under autocast to bf16 a linear layer with input x, weight w and output gradient g computes
y = x w^T, dx = g w and dw = g^T x. Here the factors of each product are rounded to 8 bits first,
with one scale for a whole tensor, taken from its largest magnitude at that moment (Micikevicius et
al. 2022; torchao's recipe "tensorwise"):

    scale = max(format) / max|t|         q(t) = round(t * scale)         t ~ q(t) / scale

x and w become e4m3, g becomes e5m2, sums are fp32, results bf16. Weights, what backward keeps, and
gradients are as wide as before.

On a GPU the products are torchao's. Elsewhere they are computed here in fp32 from the rounded
factors, which gives the values of fp8 and none of its speed. A layer does so exactly where it would
multiply in bf16: inside an fp32 island, and in an evaluation in full precision, it is an ordinary
linear layer. Its class is changed, and no module is replaced: hooks, names, parameters and what
others have put on the module stay where they are.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Collection, Iterable, Iterator
from importlib.util import find_spec
from types import TracebackType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from narrowcast.errors import UnsupportedPrecision, UsageError
from narrowcast.formats import float_format
from narrowcast.policy import Policy
from narrowcast.precision.cast import kept_parameters, torch_dtype

__all__ = [
    "CAPABILITY",
    "FORWARD",
    "GRADIENT",
    "convert_linears",
    "emulated_product",
    "product_label",
    "require_torchao",
    "restore_linears",
    "what_it_saves",
]

CAPABILITY = (8, 9)
"""The compute capability from which on NVIDIA's tensor cores multiply fp8 (Ada, Hopper)."""
FORWARD = "e4m3"
GRADIENT = "e5m2"
_MULTIPLE = 16
"""What the sizes of fp8 factors must be multiples of (cuBLASLt, through torch._scaled_mm)."""
_LEAST = 1e-12
"""The smallest magnitude that a scale is made for, so that zeros have one: torchao's EPS."""
# From torchao's filter for its tensorwise recipe, which rests on its measurements on an H100.
_PAYS_FROM = (4096, 1024)
"""Inputs and outputs of which a layer needs at least one to be larger than this."""


def require_torchao(policy: Policy) -> None:
    """Raise UnsupportedPrecision where the library that computes in fp8 is not installed."""
    if find_spec("torchao") is None:
        raise UnsupportedPrecision(
            f"precision {policy.name!r} multiplies in fp8 through torchao, which is not installed",
            hint="pip install 'narrowcast[fp8]', or --precision fp8-emulated to see what fp8 does "
            "to the result, without its speed",
        )


def _to_fp8(x: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Round a tensor of any shape to an fp8 format; returns its codes and their scale (fp32).

    No value is read from the device. One NaN or infinity makes every value NaN, so that nothing
    that is not finite becomes finite.
    """
    limit = float_format(name).max
    largest = torch.max(torch.abs(x)).to(torch.float64)
    scale = (limit / torch.clamp(largest, min=_LEAST)).to(torch.float32)
    # torch's casts on CPUs did not saturate before 2.12.
    scaled = (x.to(torch.float32) * scale).clamp(-limit, limit)
    return scaled.to(torch_dtype(name)), scale


def emulated_product(a: Tensor, a_format: str, b: Tensor, b_format: str) -> Tensor:
    """Multiply two matrices, [M, K] by [K, N], rounded to fp8 before; fp32 [M, N]."""
    (a_codes, a_scale), (b_codes, b_scale) = _to_fp8(a, a_format), _to_fp8(b, b_format)
    # Autocast would round the factors once more; torch.compile lets it into backward as well.
    with torch.autocast(a.device.type, enabled=False):
        a_wide, b_wide = a_codes.float() / a_scale, b_codes.float() / b_scale
        if torch.compiler.is_dynamo_compiling():  # which knows no markers
            return torch.mm(a_wide, b_wide)
        with _EMULATING:
            return torch.mm(a_wide, b_wide)


class _Emulating(threading.local):
    """Entered round a product that stands for one in fp8, for whoever counts products."""

    def __init__(self) -> None:
        self.depth = 0

    def __enter__(self) -> None:
        self.depth += 1

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.depth -= 1


_EMULATING = _Emulating()


def product_label(source: Tensor) -> str | None:
    """Return what a product with this factor counts as, if it is one of fp8 or stands for one.

    torchao multiplies tensors that carry their codes, and computes below what watches operations.
    """
    if _EMULATING.depth:
        return "fp8-emulated"
    codes, config = (getattr(source, name, None) for name in ("_data", "_linear_mm_config"))
    if isinstance(codes, Tensor) and config is not None:
        return "fp8-emulated" if config.output.emulate else "fp8"
    is_fp8 = source.dtype in (torch_dtype(FORWARD), torch_dtype(GRADIENT))
    return "fp8" if is_fp8 else None


class _EmulatedProduct(torch.autograd.Function):
    """x [..., K] times the transpose of w [N, K], and the two products of its backward pass.

    What is saved is x and w themselves, as torchao does: codes would save memory, and would be
    rounded for one of the two products only.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        rows = x.reshape(-1, x.shape[-1])
        product = emulated_product(rows, FORWARD, weight.t(), FORWARD)
        return product.to(x.dtype).reshape(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        rows = gradient.reshape(-1, gradient.shape[-1])
        for_x = for_weight = None
        if ctx.needs_input_grad[0]:
            product = emulated_product(rows, GRADIENT, weight, FORWARD)
            for_x = product.to(gradient.dtype).reshape(x.shape)
        if ctx.needs_input_grad[1]:
            inputs = x.reshape(-1, x.shape[-1])
            product = emulated_product(rows.t(), GRADIENT, inputs, FORWARD)
            for_weight = product.to(gradient.dtype)
        return for_x, for_weight


def _multiplies_narrow(layer: nn.Linear, x: Tensor) -> bool:
    """Whether a linear layer would multiply in bf16 here, and has something to multiply."""
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    if dtype is None:
        dtype = layer.weight.dtype if layer.weight.dtype == x.dtype else None
    return dtype is torch.bfloat16 and x.numel() > 0


class _EmulatedFp8Linear(nn.Linear):
    """A linear layer that rounds as fp8 would."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name is nn.Linear's
        if not _multiplies_narrow(self, input):
            return F.linear(input, self.weight, self.bias)
        multiply: Any = _EmulatedProduct.apply
        output: Tensor = multiply(input.to(torch.bfloat16), self.weight)
        return output if self.bias is None else output + self.bias.to(output.dtype)


class _Fp8Linear(nn.Linear):
    """A linear layer that computes as torchao's does, and holds what that one reads of itself."""

    _torchao: Any
    """torchao's class; what it reads of an instance is in this one's own dictionary."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name is nn.Linear's
        if not _multiplies_narrow(self, input):
            return F.linear(input, self.weight, self.bias)
        # The rows are summed over in the weight's gradient. Rows of zeros add nothing to any sum,
        # and no magnitude to a scale.
        rows = input.to(torch.bfloat16).reshape(-1, input.shape[-1])
        missing = -len(rows) % _MULTIPLE
        padded = F.pad(rows, (0, 0, 0, missing)) if missing and torch.is_grad_enabled() else rows
        output: Tensor = self._torchao.forward(self, padded)
        return output[: len(rows)].reshape(*input.shape[:-1], -1)


_CONVERTED = (_EmulatedFp8Linear, _Fp8Linear)


def convert_linears(
    model: nn.Module, policy: Policy, *, head: nn.Module | None = None
) -> tuple[str, ...]:
    """Let a model's linear layers multiply in fp8, in place; returns what is to be said of it.

    Left out, and named in the notes: `head`, whose logits fp8 would round; fp32 islands; layers
    whose sizes fp8 products do not come in; and subclasses of nn.Linear, which compute in a way of
    their own. Raises UsageError if nothing is left, UnsupportedPrecision without torchao.
    """
    restore_linears(model)
    if policy.linears == "compute":
        return ()
    if not policy.emulates:
        require_torchao(policy)
    islands = {id(p) for p in kept_parameters(model, policy)}
    layers: dict[str, nn.Linear] = {}
    left_out: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            why = "the head" if module is head else _why_not(module, islands)
            if why:
                left_out.setdefault(why, []).append(name or "the model itself")
            else:
                layers[name or "the model itself"] = module
    said = "; ".join(f"{_listed(names)} ({why})" for why, names in left_out.items())
    if not layers:
        raise UsageError(
            f"precision {policy.name!r} finds no linear layer that it could compute in fp8"
            + (f": {said}" if said else ""),
            hint="choose bf16, which is what all else computes in",
        )
    for module in layers.values():
        _convert(module, policy)
    plural = "s" if len(layers) > 1 else ""
    found = f"{policy.linears}: the products of {len(layers)} linear layer{plural}, "
    found += _listed(layers)
    notes = [found] + ([f"left in {policy.compute}: {said}"] if said else [])
    return (*notes, what_it_saves(policy), *_too_small(policy, layers.values()))


def _why_not(module: nn.Linear, islands: Collection[int]) -> str:
    """Say why a layer cannot be converted; empty if it can."""
    if type(module) is not nn.Linear:
        return f"a {type(module).__name__}"
    if id(module.weight) in islands:
        return "kept in fp32"
    if module.in_features % _MULTIPLE or module.out_features % _MULTIPLE:
        return f"not both sizes are multiples of {_MULTIPLE}"
    return ""


def _convert(module: nn.Linear, policy: Policy) -> None:
    if policy.emulates:
        module.__class__ = _EmulatedFp8Linear
        return
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    twin = convert_to_float8_training(module, config=Float8LinearConfig())
    own = {name: value for name, value in vars(twin).items() if name not in vars(module)}
    module.__dict__.update(own, _torchao=type(twin), _of_torchao=(*own, "_torchao"))
    module.__class__ = _Fp8Linear


def restore_linears(model: nn.Module) -> None:
    """Make converted layers ordinary ones again."""
    for module in model.modules():
        if type(module) in _CONVERTED:
            for name in module.__dict__.pop("_of_torchao", ()):
                del module.__dict__[name]
            module.__class__ = nn.Linear


def what_it_saves(policy: Policy) -> str:
    """Say what fp8 saves and what it does not, before a run; empty for a policy without it."""
    if policy.linears == "compute":
        return ""
    wide = "fp8 saves time, not memory: what backward keeps, gradients and weights stay as wide"
    if policy.emulates:
        return (
            "fp8 is emulated: products are computed in fp32 from factors rounded to fp8; values "
            f"are those of fp8, time and peak memory are not. {wide} as without it"
        )
    if policy.keeps_master:
        return f"{wide}; precision fp8-split adds stores that save memory"
    return f"{wide} as without it; memory is saved by the stores"


def _too_small(policy: Policy, layers: Collection[nn.Linear]) -> Iterator[str]:
    inputs, outputs = _PAYS_FROM
    small = [m for m in layers if m.in_features <= inputs and m.out_features <= outputs]
    if small and not policy.emulates:
        yield (
            f"{len(small)} of {len(layers)} layers have at most {inputs} inputs and {outputs} "
            "outputs, where fp8 may be slower than bf16 by torchao's measurements on an H100"
        )


_NUMBERED = re.compile(r"((?:[^.]*[^.\d][^.]*\.)*)(\d+)((?:\..*)?)")


def _listed(names: Iterable[str]) -> str:
    """List dotted names; those that differ in their first number alone as 'blocks.{0-11}.up'."""
    groups: dict[tuple[str, str], list[int]] = {}
    for name in names:
        parts = _NUMBERED.fullmatch(name)
        before, after = (parts[1], parts[3]) if parts else (name, "")
        groups.setdefault((before, after), []).extend([int(parts[2])] if parts else [])
    return ", ".join(
        before + _ranges(numbers) + after for (before, after), numbers in groups.items()
    )


def _ranges(numbers: list[int]) -> str:
    """Write ascending numbers as '{0-3,5}'; nothing for none."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    text = ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
    return f"{{{text}}}" if len(numbers) > 1 else text
