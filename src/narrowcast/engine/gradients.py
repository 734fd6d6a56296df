"""Arithmetic on the gradients of one optimizer: collecting, scaling, norm, finiteness, clipping.

Plain functions on lists of tensors. A step on CUDA waits for the device once, in `read_total`; only
`exact_norms`, which is for steps that look broken, waits again.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from narrowcast.errors import UsageError
from narrowcast.parallel.peers import Peers

__all__ = [
    "CLIP_EPSILON",
    "LARGEST_SURE_NORM",
    "WideSums",
    "Witness",
    "all_finite",
    "clip",
    "collect",
    "discard",
    "exact_norms",
    "norm_dtype",
    "norms",
    "read_total",
    "run_backward",
    "scale",
]

# No element is larger than the norm, so at or below this all elements are finite in fp32 and in
# bf16, whose largest number is 3.3895e38. Beyond it, or for NaN, elements have to be looked at.
LARGEST_SURE_NORM = 3.38e38

# torch.nn.utils.clip_grad_norm_ adds this to the norm before it divides; so do we, bit for bit.
CLIP_EPSILON = 1e-6

# What torch.autograd.backward ends in, after 15 us of checks (a tenth of a smallest step; see
# benchmarks/overhead.py) of what the engine has checked. It is private, so it may be missing.
_RUN_BACKWARD = getattr(torch.autograd.graph, "_engine_run_backward", None)

_STRIDED = torch.strided


def run_backward(
    loss: Tensor, seed: Tensor, *, retain_graph: bool, inputs: Sequence[Tensor] | None
) -> None:
    """Do what ``torch.autograd.backward(loss, seed)`` does, where `seed` has the loss's shape.

    With `inputs`, gradients are written into these tensors only.
    """
    is_plain = type(loss) is Tensor and not torch._C._are_functorch_transforms_active()
    if _RUN_BACKWARD is None or not is_plain:
        torch.autograd.backward(loss, seed, retain_graph, inputs=inputs)
        return
    _RUN_BACKWARD(
        (loss,),
        (seed,),
        retain_graph,
        False,  # create_graph
        () if inputs is None else tuple(inputs),
        allow_unreachable=True,
        accumulate_grad=True,
    )


def collect(optimizer: Optimizer) -> list[Tensor]:
    """List the gradients that the optimizer would use, as dense tensors that share their storage.

    A sparse gradient is coalesced in place, and its values stand for it: they have the same norm.
    Parameters are asked for anew at each call, since groups may be added while training.
    """
    found = []
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            gradient = parameter.grad
            if gradient is not None:
                found.append(gradient if gradient.layout is _STRIDED else _values(parameter))
    return found


def _values(parameter: Tensor) -> Tensor:
    gradient = parameter.grad
    assert gradient is not None
    if gradient.layout is not torch.sparse_coo:
        raise UsageError(
            f"a gradient of layout {gradient.layout} cannot be checked",
            hint="dense and sparse COO gradients can (nn.Embedding(sparse=True) makes the latter)",
        )
    parameter.grad = gradient.coalesce()
    return parameter.grad._values()  # values() of a tensor that autograd made is a copy


def discard(optimizer: Optimizer) -> None:
    """Set all gradients of the optimizer's parameters to None."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = None


def scale(gradients: list[Tensor], factor: float) -> None:
    """Multiply in place; exact for a power of two, but for results below the smallest normal."""
    torch._foreach_mul_(gradients, factor)


def norm_dtype(optimizer: Optimizer) -> torch.dtype | None:
    """Return the dtype to sum squares in: fp32, or where a parameter has more, its own (None)."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    has_more = any(p.is_complex() or p.dtype is torch.float64 for p in parameters)
    return None if has_more else torch.float32


def norms(gradients: list[Tensor], dtype: torch.dtype | None) -> tuple[Tensor, ...]:
    """Return the L2 norm of each gradient: shape (), of `dtype` (see `norm_dtype`)."""
    return torch._foreach_norm(gradients, 2.0, dtype)


def read_total(norms: tuple[Tensor, ...]) -> float:
    """Return the norm over all gradients from the norm of each; waits for the device once.

    Not finite if an element is not, and where a sum of squares overflows (see `exact_norms`).
    """
    if norms[0].device.type == "cpu":  # nothing to wait for, and two operations fewer
        return math.hypot(*[x.item() for x in norms])
    return _total(norms).item()


def _total(norms: tuple[Tensor, ...]) -> Tensor:
    total: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    return total


def all_finite(gradients: list[Tensor]) -> Tensor:
    """Return, unread on the device, whether every element is finite: bool of shape ()."""
    filled = [g for g in gradients if g.numel()]  # an empty tensor has no largest element
    if not filled:
        return torch.tensor(True)
    return torch.stack(torch._foreach_norm(filled, math.inf)).isfinite().all()


def exact_norms(gradients: list[Tensor]) -> tuple[Tensor, ...] | None:
    """Return norms summed in fp64, or None if an element is not finite; reads the device."""
    if not bool(all_finite(gradients)):
        return None
    return torch._foreach_norm(gradients, 2.0, torch.float64)


def clip(gradients: list[Tensor], norms: tuple[Tensor, ...], limit: float) -> None:
    """Scale gradients in place so that the norm over all of them is at most `limit`.

    The same operations as ``torch.nn.utils.clip_grad_norm_``, from the `norms` of each.
    """
    coefficient = torch.clamp(limit / (_total(norms) + CLIP_EPSILON), max=1.0)
    torch._foreach_mul_(gradients, coefficient)


_Mark = tuple[int, int] | None
"""Which tensor a gradient is, and how often it has been written; None for no gradient."""


def _marks(optimizer: Optimizer) -> list[_Mark]:
    """Return the marks of all gradients; written so as to take 0.2 us each, twice a step."""
    return [
        (id(gradient), gradient._version) if (gradient := parameter.grad) is not None else None
        for group in optimizer.param_groups
        for parameter in group["params"]
    ]


class Witness:
    """A parameter that has a gradient: when it has none any more, somebody dropped them.

    Gradients that `WideSums` took are safe from that, and are not witnesses. Marks of all gradients
    show whether somebody wrote into one, where that matters.
    """

    def __init__(self) -> None:
        self._parameter: Tensor | None = None
        self._marks: list[_Mark] = []

    def choose(self, optimizer: Optimizer) -> None:
        """Take the first parameter with a gradient, unless there is a witness."""
        if self._parameter is None:
            held = (p for group in optimizer.param_groups for p in group["params"])
            self._parameter = next((p for p in held if p.grad is not None), None)

    def misses(self, optimizer: Optimizer) -> bool:
        """Whether all gradients are gone; of one alone somebody may have chosen to be rid."""
        if self._parameter is None or self._parameter.grad is not None:
            return False
        self._parameter = None
        self.choose(optimizer)
        return self._parameter is None

    def mark(self, optimizer: Optimizer) -> None:
        """Remember all gradients as they are now."""
        self._marks = _marks(optimizer)

    def changed(self, optimizer: Optimizer) -> Tensor | None:
        """Return the first parameter whose gradient is another than was marked, or none.

        One alone may have been dropped on purpose.
        """
        if not self._marks or (now := _marks(optimizer)) == self._marks:
            return None
        held: Iterator[Tensor] = (p for group in optimizer.param_groups for p in group["params"])
        marks = zip(held, self._marks, now, strict=False)  # a group may have been added
        return next((p for p, before, mark in marks if mark not in (None, before)), None)

    def dismiss(self) -> None:
        """Forget the witness and the marks: the gradients may go."""
        self._parameter = None
        self._marks = []


class WideSums:
    """Sums of 16-bit gradients over micro-batches, kept in a wider format.

    Adding in bf16 rounds after every micro-batch; here the sum is rounded once, when it is handed
    to the optimizer. Costs the wider format's bytes for each parameter while a window is open.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._sums: dict[Tensor, Tensor] = {}

    def add(self, optimizer: Optimizer) -> None:
        """Move gradients narrower than the sums out of ``.grad`` and into the sums."""
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                gradient = parameter.grad
                if gradient is None or gradient.element_size() >= self._dtype.itemsize:
                    continue
                if gradient.layout is not _STRIDED:
                    raise UsageError(
                        f"sparse {gradient.dtype} gradients cannot be summed in {self._dtype}",
                        hint="keep the embedding in fp32: policy.keeping_fp32(nn.Embedding)",
                    )
                widened = gradient.to(self._dtype)
                known = self._sums.get(parameter)
                self._sums[parameter] = widened if known is None else known.add_(widened)
                parameter.grad = None

    def meet(self, optimizer: Optimizer, peers: Peers) -> None:
        """Make sums, and gradients that are no sums, their sum over the ranks, in one pass.

        A rank on which a parameter took no part counts with zeros.
        """
        if peers.size == 1:
            return
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        held = [self._sums.get(parameter, parameter.grad) for parameter in parameters]
        anywhere = peers.any_of_each([tensor is not None for tensor in held])
        summed = []
        for parameter, tensor, is_there in zip(parameters, held, anywhere, strict=True):
            if is_there and tensor is None:
                wide = max(parameter.dtype, self._dtype, key=lambda dtype: dtype.itemsize)
                tensor = self._sums[parameter] = torch.zeros_like(parameter, dtype=wide)
            if tensor is not None:
                summed.append(tensor)
        peers.add_up(summed)

    def collect(self, optimizer: Optimizer) -> list[Tensor]:
        """List the sums, and the gradients that are no sums."""
        return [*self._sums.values(), *collect(optimizer)]

    def round_into_gradients(self) -> None:
        """Write each sum into ``.grad``, rounded to the parameter's dtype."""
        for parameter, total in self._sums.items():
            parameter.grad = total.to(parameter.dtype)
        self._sums.clear()

    def discard(self) -> None:
        """Forget all sums."""
        self._sums.clear()
