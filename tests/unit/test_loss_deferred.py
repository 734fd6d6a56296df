"""Deferred logits are logits: what is asked of them is answered as torch would, or recorded."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from narrowcast.errors import UsageError
from narrowcast.loss.deferred import DeferredLogits
from narrowcast.loss.heads import ChunkedLogits, chunked_logits

B, T, D, V = 2, 5, 4, 7
BF16 = torch.bfloat16


class Model(nn.Module):
    """A head on something with a gradient; `bias` makes sure that it is carried."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(3, D)
        self.head = nn.Linear(D, V)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))  # type: ignore[no-any-return]


def setting() -> tuple[Model, Tensor, Tensor]:
    torch.manual_seed(1)
    return Model(), torch.randn(B, T, 3), torch.randint(0, V, (B, T))


Use = Callable[[Tensor, Tensor], Tensor]


def run(use: Use, *, chunked: bool) -> tuple[Tensor, list[Tensor | None], ChunkedLogits | None]:
    model, x, y = setting()
    handle = chunked_logits(model, chunk_bytes=400) if chunked else None
    result = use(model(x), y)
    if result.requires_grad:
        result.float().square().sum().backward()
    return result.detach(), [p.grad for p in model.parameters()], handle


def agree(use: Use) -> ChunkedLogits:
    """Run with and without deferral, compare values, gradients and formats; return the handle."""
    value, gradients, _ = run(use, chunked=False)
    found, found_gradients, handle = run(use, chunked=True)

    assert type(found) is Tensor
    # A handful of sums of at most 20 terms near 1: 20 x 2^-24 is 1.2e-6.
    torch.testing.assert_close(found, value, rtol=1e-5, atol=1e-5)
    for a, b in zip(found_gradients, gradients, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert handle is not None
    return handle


LOSSES: dict[str, Use] = {
    "flatten": lambda z, y: F.cross_entropy(z.flatten(0, 1), y.flatten()),
    "torch.flatten": lambda z, y: F.cross_entropy(torch.flatten(z, end_dim=1), y.flatten()),
    "view(-1, V)": lambda z, y: F.cross_entropy(z.view(-1, V), y.view(-1)),
    "view(-1, size)": lambda z, y: F.cross_entropy(z.view(-1, z.size(-1)), y.view(-1)),
    "view(B * T, -1)": lambda z, y: F.cross_entropy(z.view(B * T, -1), y.view(-1)),
    "reshape of a tuple": lambda z, y: F.cross_entropy(z.reshape((-1, V)), y.reshape(-1)),
    "torch.reshape": lambda z, y: F.cross_entropy(torch.reshape(z, (B * T, V)), y.reshape(-1)),
    "transposed": lambda z, y: F.cross_entropy(z.transpose(1, 2), y),
    "permuted": lambda z, y: F.cross_entropy(z.permute(0, 2, 1), y),
    "torch.permute": lambda z, y: F.cross_entropy(torch.permute(z, (0, 2, 1)), y),
    "movedim": lambda z, y: F.cross_entropy(z.movedim(-1, 1), y),
    "transposed, then float": lambda z, y: F.cross_entropy(z.transpose(-1, -2).float(), y),
    "batch second": lambda z, y: F.cross_entropy(z.transpose(0, 1).reshape(-1, V), y.T.flatten()),
    "shifted": lambda z, y: F.cross_entropy(
        z[..., :-1, :].contiguous().view(-1, V), y[..., 1:].reshape(-1)
    ),
    "shifted without the last": lambda z, y: F.cross_entropy(
        z[:, :-1].flatten(0, 1), y[:, 1:].flatten()
    ),
    "one sample": lambda z, y: F.cross_entropy(z[0], y[0]),
    "one token": lambda z, y: F.cross_entropy(z[0, 1], y[0, 1]),
    "the last token": lambda z, y: F.cross_entropy(z[:, -1, :], y[:, -1]),
    "masked": lambda z, y: F.cross_entropy(z[y > 2], y[y > 2]),
    "gathered": lambda z, y: F.cross_entropy(
        z[torch.arange(B), torch.tensor([1, 3])], y[[0, 1], [1, 3]]
    ),
    "a new dimension": lambda z, y: F.cross_entropy(z[None, 0, :2].flatten(0, 1), y[0, :2]),
    "squeezed": lambda z, y: F.cross_entropy(z.unsqueeze(0).squeeze(0).flatten(0, 1), y.flatten()),
    "select": lambda z, y: F.cross_entropy(z.select(1, 2), y[:, 2]),
    "narrow": lambda z, y: F.cross_entropy(z.narrow(1, 1, 3).flatten(0, 1), y[:, 1:4].flatten()),
    "index_select": lambda z, y: F.cross_entropy(
        z.index_select(1, torch.tensor([0, 3])).flatten(0, 1), y[:, [0, 3]].flatten()
    ),
    "unflattened": lambda z, y: F.cross_entropy(
        z.flatten(0, 1).unflatten(0, (B, T)).transpose(1, 2), y
    ),
    "split": lambda z, y: torch.stack(
        [F.cross_entropy(p[0], q[0]) for p, q in zip(z.split(2, dim=1), y.split(2, 1), strict=True)]
    ),
    "chunks": lambda z, y: torch.stack(
        [F.cross_entropy(p.flatten(0, 1), q.flatten()) for p, q in zip(z.chunk(2), y, strict=True)]
    ),
    "unbound": lambda z, y: torch.stack(
        [F.cross_entropy(p, q) for p, q in zip(z.unbind(0), y, strict=True)]
    ),
    "module": lambda z, y: nn.CrossEntropyLoss(
        weight=torch.arange(1.0, V + 1), ignore_index=3, label_smoothing=0.1, reduction="sum"
    )(z.flatten(0, 1), y.flatten()),
    "not reduced": lambda z, y: F.cross_entropy(z.transpose(1, 2), y, reduction="none"),
    "keywords": lambda z, y: F.cross_entropy(input=z.flatten(0, 1), target=y.flatten()),
    "log_softmax, nll_loss": lambda z, y: F.nll_loss(
        F.log_softmax(z.flatten(0, 1), dim=-1), y.flatten()
    ),
    "log_softmax over classes in the middle": lambda z, y: F.nll_loss(
        z.transpose(1, 2).log_softmax(1), y, ignore_index=2
    ),
    "log_softmax, then view": lambda z, y: F.nll_loss(
        torch.log_softmax(z, -1, dtype=torch.float32).view(-1, V), y.view(-1), reduction="none"
    ),
    "modules of it": lambda z, y: nn.NLLLoss()(nn.LogSoftmax(dim=1)(z.flatten(0, 1)), y.flatten()),
    "cast": lambda z, y: F.cross_entropy(z.to(torch.float32).flatten(0, 1), y.flatten()),
    "moved nowhere": lambda z, y: F.cross_entropy(z.to("cpu").to(y.device)[0], y[0]),
    "cloned": lambda z, y: F.cross_entropy(z.clone().flatten(0, 1), y.flatten()),
}


@pytest.mark.parametrize("what", LOSSES)
def test_a_loss_over_the_classes_never_needs_the_logits(what: str) -> None:
    """Value and gradients are those of the whole version, and nothing was materialised."""
    handle = agree(LOSSES[what])

    assert handle.materialised == []
    assert handle.chunked_calls >= 1


WHOLE: dict[str, tuple[Use, list[str]]] = {
    "argmax": (lambda z, y: z.argmax(-1), ["torch.Tensor.argmax"]),
    "argmax, then the loss in chunks": (
        lambda z, y: F.cross_entropy(z.flatten(0, 1), y.flatten()) * z.argmax(-1).float().mean(),
        ["torch.Tensor.argmax"],
    ),
    "softmax": (lambda z, y: F.softmax(z, -1), ["torch.nn.functional.softmax"]),
    "arithmetic": (lambda z, y: z * 2 + 1, ["torch.Tensor.mul"]),
    "on the right": (lambda z, y: 2 - z, ["torch.Tensor.__rsub__"]),
    "softcap": (
        lambda z, y: F.cross_entropy((torch.tanh(z / 3) * 3).flatten(0, 1), y.flatten()),
        ["torch.Tensor.div"],
    ),
    "probabilities as targets": (
        lambda z, y: F.cross_entropy(z.flatten(0, 1), F.one_hot(y.flatten(), V).float()),
        ["torch.nn.functional.cross_entropy"],
    ),
    "cut classes": (
        lambda z, y: F.cross_entropy(z[..., :6].flatten(0, 1), y.flatten() % 6),
        ["torch.Tensor.__getitem__"],
    ),
    "flat": (lambda z, y: z.view(-1), ["torch.Tensor.view"]),
    "log-probabilities read": (
        lambda z, y: F.log_softmax(z, -1).gather(-1, y[..., None]),
        ["torch.Tensor.gather"],
    ),
    "over another dimension": (
        lambda z, y: torch.log_softmax(z, 1).sum(-1),
        ["torch.log_softmax"],
    ),
    "stacked": (lambda z, y: torch.stack([z, z]), ["torch.stack"]),
    "to double": (lambda z, y: z.double(), ["torch.Tensor.double"]),
    "narrowed": (lambda z, y: z.to(BF16), ["torch.Tensor.to"]),
    "sizes that do not fit the classes": (lambda z, y: z.view(V, B * T), ["torch.Tensor.view"]),
}


@pytest.mark.parametrize("what", WHOLE)
def test_every_other_operation_gets_the_logits_and_is_recorded(what: str) -> None:
    """Value and gradients are right, and the name of the operation is in the handle."""
    use, names = WHOLE[what]

    handle = agree(use)

    assert handle.materialised[: len(names)] == names


def test_reading_does_not_end_the_deferral() -> None:
    """After an argmax, which keeps nothing of the logits, the loss is still chunked."""
    handle = agree(WHOLE["argmax, then the loss in chunks"][0])

    assert handle.chunked_calls == 1


def masked_in_place(z: Tensor, y: Tensor) -> Tensor:
    flat = z.flatten(0, 1)
    z[..., 0] = -3.0  # shows in the view made before it
    return F.cross_entropy(flat, y.flatten())


def scaled_in_place(z: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        z.mul_(2.0)
    return F.cross_entropy(z.view(-1, V), y.view(-1))


def through_a_view(z: Tensor, y: Tensor) -> Tensor:
    z[..., 1:3].add_(1.0)
    return F.cross_entropy(z.flatten(0, 1), y.flatten())


def through_augmented_assignment(z: Tensor, y: Tensor) -> Tensor:
    alias = z
    z /= 2.0
    return F.cross_entropy(alias.flatten(0, 1), y.flatten())


def a_copy_in_place(z: Tensor, y: Tensor) -> Tensor:
    copied, turned = z.clone(), z.transpose(1, 2).contiguous()
    copied.mul_(3.0)
    turned.add_(1.0)
    return F.cross_entropy(z.flatten(0, 1), y.flatten()) + copied.mean() + turned.mean()


def test_changes_of_a_copy_leave_the_original_alone() -> None:
    """clone() and a copying contiguous() are tensors of their own."""
    agree(a_copy_in_place)


@pytest.mark.parametrize(
    "use", [masked_in_place, scaled_in_place, through_a_view, through_augmented_assignment]
)
def test_changes_in_place_are_seen_by_everyone(use: Use) -> None:
    """Once changed, logits stay whole: views and later uses see the change, as in torch."""
    handle = agree(use)

    assert handle.materialised
    assert handle.chunked_calls == 0


def test_hooks_and_kept_gradients_are_those_of_logits() -> None:
    """register_hook fires and retain_grad keeps, with the numbers of the whole version."""
    seen = []
    for chunked in (False, True):
        model, x, y = setting()
        if chunked:
            chunked_logits(model)
        logits = model(x)
        logits.retain_grad()
        logits.register_hook(lambda gradient: seen.append(gradient.clone()))
        F.cross_entropy(logits.flatten(0, 1), y.flatten()).backward()
        seen.append(logits.grad)

    torch.testing.assert_close(seen[0], seen[2])
    torch.testing.assert_close(seen[1], seen[3])


def test_what_it_knows_of_itself_needs_no_logits() -> None:
    """Shape, format, device, graph and text are answered without computing."""
    model, x, _ = setting()
    with chunked_logits(model) as handle:
        logits = model(x)
        assert isinstance(logits, DeferredLogits)

        assert (logits.shape, logits.size(-1), logits.dim(), len(logits)) == ((B, T, V), V, 3, B)
        assert (logits.numel(), logits.dtype, logits.device) == (
            math.prod((B, T, V)),
            torch.float32,
            x.device,
        )
        assert logits.requires_grad
        assert logits.grad_fn is not None
        assert not logits.is_leaf
        assert logits.is_floating_point()
        assert "DeferredLogits(shape=(2, 5, 7)" in repr(logits)
        assert handle.materialised == []


def test_detached_logits_lead_nowhere() -> None:
    """detach() keeps the deferral and drops the graph, weights included."""
    model, x, y = setting()
    with chunked_logits(model) as handle:
        loss = F.cross_entropy(model(x).detach().flatten(0, 1), y.flatten())

    assert not loss.requires_grad
    assert handle.materialised == []


class Squared(torch.autograd.Function):
    """Takes logits below Python's sight, as a fused loss of somebody else's does."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        ctx.save_for_backward(logits)
        return logits.square().sum()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (logits,) = ctx.saved_tensors
        return 2 * gradient * logits  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "prepare",
    [
        lambda z: z,
        lambda z: z.transpose(1, 2)[:, :, :],
        lambda z: F.log_softmax(z, -1),
        lambda z: z[:, 1:].float(),
    ],
)
def test_code_that_asks_autograd_and_not_python_gets_gradients(
    prepare: Callable[[Tensor], Tensor],
) -> None:
    """An autograd.Function given deferred logits sends its gradient to states, weight and bias."""
    handle = agree(lambda z, _: Squared.apply(prepare(z)))  # type: ignore[no-untyped-call]

    assert handle.materialised


@pytest.mark.parametrize("compute", [BF16, torch.float16])
def test_under_autocast_the_product_is_autocasts(compute: torch.dtype) -> None:
    """Whole logits are those of the head to the bit, after the region too."""
    model, x, _ = setting()
    with torch.autocast("cpu", compute):
        expected = model(x)
    with chunked_logits(model), torch.autocast("cpu", compute):
        logits = model(x)

    assert logits.dtype == compute
    assert torch.equal(logits + 0, expected + 0)


def test_under_autocast_the_loss_is_that_of_fp32_logits() -> None:
    """Factors are rounded to bf16, logits are not."""
    model, x, y = setting()
    with torch.autocast("cpu", BF16):
        hidden = model.body(x)
    factors = (hidden, model.head.weight, model.head.bias)
    exact = F.linear(*(factor.to(BF16).float() for factor in factors))

    with chunked_logits(model), torch.autocast("cpu", BF16):
        loss = F.cross_entropy(model(x).float().flatten(0, 1), y.flatten())

    torch.testing.assert_close(loss, F.cross_entropy(exact.flatten(0, 1), y.flatten()))


def test_logits_read_after_the_step_are_refused() -> None:
    """They would be computed with another weight than the loss was."""
    model, x, y = setting()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with chunked_logits(model):
        logits = model(x)
        F.cross_entropy(logits.flatten(0, 1), y.flatten()).backward()
        optimizer.step()

        with pytest.raises(UsageError, match="after the weight of their head changed"):
            logits.argmax(-1)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_model_that_is_checkpointed_whole_gives_the_same(reentrant: bool) -> None:
    """Head and loss inside or outside of a checkpoint: gradients are what they were."""

    def use(inside: bool, *, chunked: bool) -> list[Tensor | None]:
        model, x, y = setting()
        x.requires_grad_()
        if chunked:
            chunked_logits(model, chunk_bytes=400)

        def loss(x: Tensor) -> Tensor:
            return F.cross_entropy(model(x).flatten(0, 1), y.flatten())

        if inside:
            checkpoint(loss, x, use_reentrant=reentrant).backward()
        else:
            logits = checkpoint(model, x, use_reentrant=reentrant)
            F.cross_entropy(logits.flatten(0, 1), y.flatten()).backward()
        return [p.grad for p in model.parameters()]

    for inside in (True, False):
        for a, b in zip(use(inside, chunked=False), use(inside, chunked=True), strict=True):
            torch.testing.assert_close(a, b)


def test_a_copy_of_the_model_defers_by_itself() -> None:
    """deepcopy takes the hook along, with a record of its own."""
    model, x, _ = setting()
    handle = chunked_logits(model)
    twin = copy.deepcopy(model)

    logits = twin(x)

    assert isinstance(logits, DeferredLogits)
    assert handle.deferred_calls == 0
