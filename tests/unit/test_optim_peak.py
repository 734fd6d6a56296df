"""A step needs at most 16 MiB beside what is held, whatever the model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from narrowcast.memory.storages import StorageBook, tensors_in
from narrowcast.optim.adamw import AdamW
from optim_cases import RULES, give_gradients, parameters

LIMIT = 16 * 2**20


class Peak(TorchDispatchMode):
    """Notes the most bytes alive at once among storages that operations made."""

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.book = StorageBook(torch.device("cpu"))
        for tensor in known:
            self.book.made(tensor, "")
        self.before = self.most = self.book.total

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tensors_in(out):
            self.book.made(tensor, "")
        self.most = max(self.most, self.book.total)
        return out


def known(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    owned = [p for group in optimizer.param_groups for p in group["params"]]
    states = [t for s in optimizer.state.values() for t in s.values() if torch.is_tensor(t)]
    return [*owned, *(p.grad for p in owned if p.grad is not None), *states]


@pytest.mark.parametrize(
    ("rule", "weights", "states"),
    [
        ("AdamW", "fp32", "fp32"),
        ("AdamW", "split16", "int8"),
        ("AdamW", "split8", "int4"),
        ("AdamW", "stochastic", "bf16"),
        ("SGD", "split8", "int4"),
        ("Lion", "split8", "int4"),
    ],
)
def test_temporaries_of_a_step_do_not_grow_with_the_model(
    rule: str, weights: str, states: str
) -> None:
    """A 16 MiB tensor, one whose tail is ragged, and many small ones; a second step."""
    make, options = RULES[rule]
    owned = parameters([(4096, 1024), (70_001,), *[(400,)] * 500])
    optimizer = make(owned, **options, weights=weights, states=states, maximize=True)
    for step in range(2):
        give_gradients(owned, step)
        if step == 0:
            optimizer.step()
    with Peak(known(optimizer)) as peak:
        optimizer.step()

    assert peak.most - peak.before <= LIMIT


def test_odd_strides_need_no_copy_of_the_whole() -> None:
    """A gradient laid out unlike its parameter, and a parameter with holes, go range by range."""
    slices = nn.Parameter(torch.randn(2048, 2048, 2)[..., 0])
    transposed = nn.Parameter(torch.randn(4096, 1024))
    optimizer = AdamW([slices, transposed])
    slices.grad = torch.randn(2048, 2048)
    transposed.grad = torch.randn(1024, 4096).t()
    optimizer.step()
    with Peak(known(optimizer)) as peak:
        optimizer.step()

    assert peak.most - peak.before <= LIMIT


@pytest.mark.parametrize("weights", ["split16", "split8", "stochastic"])
def test_making_and_reading_weights_needs_little_more_than_the_weights(weights: str) -> None:
    """The constructor and set_master: what is new, and 16 MiB."""
    (parameter,) = owned = parameters([(4096, 2048)])
    with Peak([parameter]) as peak:
        optimizer = AdamW(owned, weights=weights)
    new = optimizer.nbytes()
    assert peak.most - peak.before <= new + LIMIT

    value = torch.zeros(4096, 2048)
    with Peak([*known(optimizer), value]) as peak:
        optimizer.set_master(parameter, value)
    assert peak.most - peak.before <= LIMIT

    with Peak(known(optimizer)) as peak:
        master = optimizer.master(parameter)
    assert peak.most - peak.before <= master.nbytes + LIMIT


NOISE_TABLE = 2**18
"""Bytes that are made once and kept for all optimizers on a device."""


@pytest.mark.parametrize("width", [64, 128, 512, 2048])
def test_temporaries_are_no_larger_than_the_model(width: int) -> None:
    """A step on a small model does not take more than the model itself, beside a fixed least."""
    parameter = torch.nn.Parameter(torch.randn(width, width))
    optimizer = AdamW([parameter], weights="split8", states="int4")
    parameter.grad = torch.randn_like(parameter).bfloat16()
    optimizer.step()
    parameter.grad = torch.randn_like(parameter).bfloat16()

    with Peak(known(optimizer)) as peak:
        optimizer.step()

    assert peak.most - peak.before <= max(4 * parameter.numel(), 7 * 4 * 8192) + NOISE_TABLE
