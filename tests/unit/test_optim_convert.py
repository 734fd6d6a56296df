"""Making a narrow optimizer of torch's: the same groups, the same results, or a clear refusal."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from narrowcast.errors import UnknownName, UsageError
from narrowcast.optim.adamw import AdamW
from narrowcast.optim.convert import narrowed
from narrowcast.optim.sgd import SGD
from optim_cases import parameters, train

SHAPES = [(70, 70), (5,)]
KINDS: list[tuple[Any, dict[str, Any], type]] = [
    (torch.optim.AdamW, {"lr": 1e-2, "fused": True}, AdamW),
    (torch.optim.AdamW, {"lr": 1e-2, "foreach": True, "betas": (0.8, 0.9)}, AdamW),
    (torch.optim.Adam, {"lr": 1e-2, "maximize": True}, AdamW),
    (torch.optim.Adam, {"weight_decay": 0.1, "decoupled_weight_decay": True}, AdamW),
    (torch.optim.SGD, {"lr": 1e-2, "momentum": 0.9, "nesterov": True}, SGD),
]


@pytest.mark.parametrize(("kind", "options", "ours"), KINDS)
def test_a_narrowed_optimizer_does_what_the_original_would(
    kind: Any, options: dict[str, Any], ours: type
) -> None:
    """split16 and fp32 states follow the original's plain loop bit for bit."""
    owned, reference = parameters(SHAPES), parameters(SHAPES)
    plain = {k: v for k, v in options.items() if k not in ("fused", "foreach")}
    expected = kind(reference, **plain, foreach=False)
    optimizer = narrowed(kind(owned, **options), weights="split16", states="fp32")
    train(optimizer, owned, range(5))
    train(expected, reference, range(5))

    assert type(optimizer) is ours
    assert all(torch.equal(optimizer.master(p), r) for p, r in zip(owned, reference, strict=True))


def test_groups_and_hyperparameters_are_kept() -> None:
    """Names, learning rates and what a scheduler noted."""
    model = torch.nn.Linear(70, 70)
    named = list(model.named_parameters())
    original = torch.optim.AdamW(
        [{"params": named[:1], "lr": 0.5}, {"params": named[1:], "weight_decay": 0.0}]
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(original, lambda step: 1 / (1 + step))
    optimizer = narrowed(original, weights="split8", states="int4")

    assert [g["lr"] for g in optimizer.param_groups] == [0.5, 1e-3]
    assert [g["weight_decay"] for g in optimizer.param_groups] == [1e-2, 0.0]
    assert [g["initial_lr"] for g in optimizer.param_groups] == [0.5, 1e-3]
    assert [h.name for h in optimizer.describe()] == ["weight", "bias"]
    assert schedule.optimizer.param_groups[0] is optimizer.param_groups[0]


def test_parameters_can_stay_fp32_in_their_group() -> None:
    """Islands keep their place; a state dict knows it."""
    first, second, third = owned = parameters([(70, 70), (5,), (70, 71)])
    optimizer = narrowed(
        torch.optim.AdamW(owned),
        weights="split16",
        states="int8",
        keep_fp32=lambda p: p.dim() == 1,
    )
    train(optimizer, owned, range(2))

    assert [p.dtype for p in (first, second, third)] == [
        torch.bfloat16,
        torch.float32,
        torch.bfloat16,
    ]
    assert [h.weights for h in optimizer.describe()] == ["split16", "fp32", "split16"]
    assert optimizer.state_dict()["param_groups"][0]["keep_fp32"] == (1,)

    again = narrowed(
        torch.optim.AdamW(parameters([(70, 70), (5,), (70, 71)])),
        weights="split16",
        states="int8",
        keep_fp32=lambda p: p.dim() == 1,
    )
    again.load_state_dict(optimizer.state_dict())
    assert again.param_groups[0]["keep_fp32"] == (1,)


class OwnAdamW(torch.optim.AdamW):
    """A subclass, which may do anything."""


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (torch.optim.RMSprop, "RMSprop cannot be narrowed"),
        (lambda p: torch.optim.AdamW(p, amsgrad=True), "amsgrad"),
        (lambda p: torch.optim.AdamW(p, differentiable=True), "differentiable"),
        (lambda p: torch.optim.Adam(p, weight_decay=0.1), r"\(L2\)"),
        (lambda p: torch.optim.AdamW(p, betas=(torch.tensor(0.9), torch.tensor(0.9))), "tensor"),
        (OwnAdamW, "OwnAdamW"),
        (AdamW, "already"),
    ],
)
def test_what_has_no_rule_is_refused_and_nothing_changes(make: Any, match: str) -> None:
    """The error names the rule and what is possible; parameters stay fp32."""
    owned = parameters(SHAPES)
    with pytest.raises(UsageError, match=match):
        narrowed(make(owned), weights="split16", states="int8")

    assert all(p.dtype is torch.float32 for p in owned)


def test_an_optimizer_that_has_stepped_is_refused() -> None:
    """Its states would be lost."""
    owned = parameters(SHAPES)
    optimizer = torch.optim.AdamW(owned)
    train(optimizer, owned, range(1))
    with pytest.raises(UsageError, match="has taken steps"):
        narrowed(optimizer, weights="split16", states="int8")


def test_a_wrong_store_changes_nothing() -> None:
    """Neither the parameters nor the original's groups."""
    owned = parameters(SHAPES)
    optimizer = torch.optim.AdamW(owned)
    with pytest.raises(UnknownName):
        narrowed(optimizer, weights="split16", states="int3")

    assert all(p.dtype is torch.float32 for p in owned)
    assert "weights" not in optimizer.param_groups[0]
