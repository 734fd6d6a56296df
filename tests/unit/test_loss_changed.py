"""Deferred logits are those of the moment of the head, or an error: never those of a later one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from narrowcast.errors import UsageError
from narrowcast.loss.heads import chunked_logits

TARGET = torch.tensor([0, 1, 2, 3])


def model_with(*, frozen: bool, bias: bool = True) -> nn.Sequential:
    model = nn.Sequential()
    model.body, model.head = nn.Linear(8, 8), nn.Linear(8, 5, bias=bias)
    model.head.requires_grad_(not frozen)
    return model


def use(change: Callable[[Tensor, nn.Linear], object], **options: bool) -> Tensor:
    """Return the loss of logits whose inputs are changed between head and loss."""
    model = model_with(**options)
    with chunked_logits(model):
        hidden = model.body(torch.randn(4, 8)) * 1.0
        logits = model.head(hidden)
        with torch.no_grad():
            change(hidden, model.head)
        return F.cross_entropy(logits, TARGET)


CHANGES: dict[str, Callable[[Tensor, nn.Linear], object]] = {
    "hidden states": lambda hidden, head: hidden.add_(1.0),
    "weight": lambda hidden, head: head.weight.mul_(2.0),
    "bias": lambda hidden, head: head.bias[0].fill_(9.0),
}


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("what", CHANGES)
def test_what_changes_between_head_and_loss_is_noticed(what: str, frozen: bool) -> None:
    """Of a frozen head too, where torch would not look, since it has the numbers already."""
    with pytest.raises(UsageError, match=f"after the {what}.* changed in place"):
        use(CHANGES[what], frozen=frozen)


def test_nothing_that_changed_is_no_error() -> None:
    """Views, reads and a head without a bias."""
    use(lambda hidden, head: (hidden.sum(), head.weight.view(-1)), frozen=True, bias=False)


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("copies", [False, True])
def test_what_is_made_of_logits_counts_changes_from_the_head_on(before: bool, copies: bool) -> None:
    """A cut of logits that is made after the change, or before it; as a view, or as a copy."""
    model = model_with(frozen=True)
    wide = torch.randn(8, 4, 8)
    with chunked_logits(model):
        hidden = model.body(wide) * 1.0
        logits = model.head(hidden)
        rows = torch.arange(4)

        def cut() -> Tensor:
            return logits[rows, 0] if copies else logits[:4, 0]

        if not before:
            hidden.add_(1.0)
            with pytest.raises(UsageError, match="hidden states changed in place"):
                cut().sum()
            return
        made = cut()
        expected = F.cross_entropy(
            F.linear(hidden[:4, 0], model.head.weight, model.head.bias), TARGET
        )
        hidden.add_(1.0)
        try:
            found = F.cross_entropy(made, TARGET)
        except UsageError:
            return  # a view of what changed
        torch.testing.assert_close(found, expected)
