"""linear_cross_entropy in a loop: autocast, scaling, checkpointing, formats, refusals."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from narrowcast.errors import NarrowcastError, UnknownName, UsageError
from narrowcast.loss.cross_entropy import linear_cross_entropy
from narrowcast.memory.measure import MemoryLedger

FP64, FP32, BF16, FP16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
CHUNK = 4_000


def problem(
    tokens: int = 37, classes: int = 53, dtype: torch.dtype = FP32
) -> tuple[Tensor, Tensor, Tensor]:
    hidden = torch.randn(tokens, 8).to(dtype).requires_grad_()
    weight = torch.randn(classes, 8).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(0, classes, (tokens,))


@pytest.mark.parametrize("compute", [BF16, FP16])
@pytest.mark.parametrize("hidden_dtype", [FP32, BF16])
def test_autocast_rounds_the_factors_and_nothing_else(
    compute: torch.dtype, hidden_dtype: torch.dtype
) -> None:
    """Under autocast it is the loss, in fp32, of factors rounded once; gradients keep formats."""
    hidden, weight, target = problem()
    hidden = hidden.detach().to(hidden_dtype).requires_grad_()
    h, w = (t.detach().to(compute).float().requires_grad_() for t in (hidden, weight))
    expected = linear_cross_entropy(h, w, target, chunk_bytes=CHUNK)
    expected.backward()

    with torch.autocast("cpu", compute):
        found = linear_cross_entropy(hidden, weight, target, chunk_bytes=CHUNK)
    found.backward()

    # Other tiles, as blocks are widened here: roundings of fp32 differ.
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    for got, want in ((hidden, h), (weight, w)):
        assert got.grad is not None
        assert got.grad.dtype == got.dtype
        tolerance = 1e-5 if got.dtype == FP32 else 2**-8
        torch.testing.assert_close(got.grad.float(), want.grad, rtol=tolerance, atol=1e-7)


def test_backward_may_run_inside_autocast() -> None:
    """Where backward is called makes no difference to a bit."""
    hidden, weight, target = problem()
    gradients = []
    for inside in (False, True):
        loss = linear_cross_entropy(hidden, weight, target, chunk_bytes=CHUNK)
        with torch.autocast("cpu", BF16, enabled=inside):
            gradients.append(torch.autograd.grad(loss, (hidden, weight)))

    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_a_loss_scale_is_carried_in_fp32() -> None:
    """fp16 gradients under a scale of 2^16 are the scaled gradients, rounded once to fp16."""
    hidden, weight, target = problem(dtype=FP16)
    h, w = (t.detach().double().requires_grad_() for t in (hidden, weight))
    (F.cross_entropy(F.linear(h, w), target) * 2**10).backward()

    loss = linear_cross_entropy(hidden, weight, target, chunk_bytes=CHUNK)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    scaler.scale(loss).backward()

    for got, want in ((hidden, h), (weight, w)):
        assert got.grad is not None
        assert want.grad is not None
        assert got.grad.dtype == FP16
        # fp16 rounds to 2^-11; the fp32 arithmetic before it errs by about 2^-20.
        torch.testing.assert_close(got.grad.double(), want.grad, rtol=2**-11 * 1.1, atol=2**-18)


@pytest.mark.parametrize("wanted", [(True, False), (False, True)])
@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("tokens", [5, 80])
def test_only_the_gradients_asked_for_are_made(
    wanted: tuple[bool, bool], dtype: torch.dtype, tokens: int
) -> None:
    """A frozen head or frozen states take no gradient, and the other's is what it was."""
    hidden, weight, target = problem(tokens=tokens, dtype=dtype)
    both = torch.autograd.grad(
        linear_cross_entropy(hidden, weight, target, chunk_bytes=CHUNK), (hidden, weight)
    )
    inputs = [
        t.detach().requires_grad_(want) for t, want in zip((hidden, weight), wanted, strict=True)
    ]

    linear_cross_entropy(*inputs, target, chunk_bytes=CHUNK).backward()

    for tensor, want, expected in zip(inputs, wanted, both, strict=True):
        assert (tensor.grad is not None) == want
        if want:
            torch.testing.assert_close(
                tensor.grad, expected, rtol=1e-5 if dtype == FP32 else 2**-7, atol=1e-6
            )


def test_without_gradients_nothing_is_saved() -> None:
    """Under no_grad the result is the same and has no graph."""
    hidden, weight, target = problem()
    expected = linear_cross_entropy(hidden, weight, target)

    with torch.no_grad():
        found = linear_cross_entropy(hidden, weight, target)

    assert torch.equal(found, expected.detach())
    assert not found.requires_grad


@pytest.mark.parametrize("reentrant", [False, True])
def test_it_may_be_recomputed_by_checkpointing(reentrant: bool) -> None:
    """Activation checkpointing round the loss gives the same gradients, bit for bit."""
    hidden, weight, target = problem()

    def loss(h: Tensor, w: Tensor) -> Tensor:
        return linear_cross_entropy(h * 2, w, target, chunk_bytes=CHUNK)

    plain = torch.autograd.grad(loss(hidden, weight), (hidden, weight))
    checkpoint(loss, hidden, weight, use_reentrant=reentrant).backward()

    assert hidden.grad is not None
    assert weight.grad is not None
    assert torch.equal(hidden.grad, plain[0])
    assert torch.equal(weight.grad, plain[1])


def test_a_second_backward_through_a_kept_graph_is_the_same() -> None:
    """retain_graph works: what forward saved is not consumed."""
    hidden, weight, target = problem()
    loss = linear_cross_entropy(hidden, weight, target, chunk_bytes=CHUNK)

    first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    second = torch.autograd.grad(loss, (hidden, weight))

    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_differentiating_twice_is_refused() -> None:
    """create_graph=True is an error that names the way out, and no wrong second derivative."""
    hidden, weight, target = problem()
    loss = linear_cross_entropy(hidden, weight, target)

    with pytest.raises(UsageError, match="create_graph=True"):
        torch.autograd.grad(loss, hidden, create_graph=True)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("tokens", [0, 6])
def test_nothing_that_counts_is_what_it_is_to_torch(reduction: str, tokens: int) -> None:
    """With all targets ignored, or none there: nan for mean, zeros else; gradients are zeros."""
    hidden, weight, target = problem(tokens=tokens)
    target = torch.full_like(target, -100)
    whole = F.cross_entropy(F.linear(hidden, weight), target, reduction=reduction)

    chunked = linear_cross_entropy(hidden, weight, target, reduction=reduction)
    chunked.sum().backward()

    torch.testing.assert_close(chunked, whole, equal_nan=True)
    assert hidden.grad is not None
    assert weight.grad is not None
    assert not hidden.grad.any()
    assert not weight.grad.any()


def test_shapes_are_those_of_the_target() -> None:
    """Any number of leading dimensions, none too, contiguous or not."""
    weight = torch.randn(11, 4)
    for shape in ((), (3,), (2, 3), (2, 1, 3)):
        hidden = torch.randn(4, *shape).movedim(0, -1)
        target = torch.randint(0, 11, shape)

        found = linear_cross_entropy(hidden, weight.T.contiguous().T, target, reduction="none")

        expected = F.cross_entropy(
            (hidden.reshape(-1, 4) @ weight.T), target.reshape(-1), reduction="none"
        )
        assert found.shape == target.shape
        torch.testing.assert_close(found.reshape(-1), expected)


def test_masked_classes_at_the_end_of_the_vocabulary_do_no_harm() -> None:
    """A block of classes whose bias is -inf adds nothing; torch agrees."""
    hidden, weight, target = problem(classes=80)
    bias = torch.zeros(80)
    bias[10:] = -torch.inf
    target = target % 10

    whole = F.cross_entropy(F.linear(hidden, weight, bias), target)
    chunked = linear_cross_entropy(hidden, weight, target, bias=bias, chunk_bytes=1_500)

    torch.testing.assert_close(chunked, whole)
    found, expected = (torch.autograd.grad(loss, (hidden, weight)) for loss in (chunked, whole))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_so(value: float) -> None:
    """A broken hidden state breaks the loss of its token and of no other."""
    hidden, weight, target = problem()
    broken = hidden.detach().clone()
    broken[4, 2] = value

    losses = linear_cross_entropy(broken, weight, target, reduction="none", chunk_bytes=CHUNK)

    assert losses.isfinite().logical_not().nonzero().flatten().tolist() == [4]


def test_fake_tensors_give_the_ledger_of_real_ones() -> None:
    """A trace without memory sees the same bytes at the same peak."""

    def peak() -> int:
        hidden, weight, target = problem(tokens=100, classes=300, dtype=BF16)
        with MemoryLedger(device="cpu") as ledger:
            linear_cross_entropy(hidden, weight, target, chunk_bytes=20_000).backward()
        return ledger.record().total_peak_bytes

    with FakeTensorMode():
        traced = peak()

    # The check of targets cannot look at fake numbers: at most 3 flags of 1 byte a token less.
    assert 0 <= peak() - traced <= 3 * 100


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.int64])
def test_class_numbers_may_be_of_any_integer_type(dtype: torch.dtype) -> None:
    """uint8 tokens need no cast by the caller."""
    hidden, weight, target = problem()

    found = linear_cross_entropy(hidden, weight, target.to(dtype))

    assert torch.equal(found, linear_cross_entropy(hidden, weight, target))


def test_the_whole_version_of_torch_213_agrees() -> None:
    """F.linear_cross_entropy, where this torch has it, is another witness."""
    if not hasattr(F, "linear_cross_entropy"):
        pytest.skip("torch 2.13 has the function first")
    hidden, weight, target = problem()
    options = torch.nn.LinearCrossEntropyOptions()

    with warnings.catch_warnings(action="ignore"):
        expected = F.linear_cross_entropy(hidden, weight, target, options=options)

    torch.testing.assert_close(linear_cross_entropy(hidden, weight, target), expected)


@pytest.mark.parametrize("with_bias", [False, True])
def test_hidden_states_may_have_no_width(with_bias: bool) -> None:
    """Then logits are the bias, or zero."""
    hidden = torch.randn(5, 0, requires_grad=True)
    weight = torch.randn(7, 0, requires_grad=True)
    bias = torch.randn(7, requires_grad=True) if with_bias else None
    target = torch.randint(0, 7, (5,))
    found = linear_cross_entropy(hidden, weight, target, bias=bias)
    found.backward()

    expected = F.cross_entropy(F.linear(hidden, weight, bias), target)
    torch.testing.assert_close(found, expected)
    assert hidden.grad is not None
    assert hidden.grad.shape == (5, 0)
    if bias is not None:
        (wanted,) = torch.autograd.grad(expected, bias)
        torch.testing.assert_close(bias.grad, wanted)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128, torch.bool, FP32])
def test_targets_that_are_no_integers_are_refused(dtype: torch.dtype) -> None:
    """Whatever the width of a complex number."""
    hidden, weight, target = problem()
    with pytest.raises(UsageError, match="probabilities cannot be chunked"):
        linear_cross_entropy(hidden, weight, target.clamp(max=1).to(dtype))


def test_transforms_of_torch_func_are_refused_by_name() -> None:
    """They need functions that they can differentiate themselves."""
    hidden, weight, target = problem()
    with pytest.raises(UsageError, match=r"transform of torch\.func"):
        torch.func.grad(lambda h: linear_cross_entropy(h, weight, target))(hidden.detach())


def test_a_weight_changed_between_forward_and_backward_is_noticed() -> None:
    """Logits are computed again in backward: autograd refuses another weight."""
    hidden, weight, target = problem()
    loss = linear_cross_entropy(hidden, weight, target)
    with torch.no_grad():
        weight.mul_(2)

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


H, W, T = torch.zeros(3, 4), torch.zeros(5, 4), torch.zeros(3, dtype=torch.long)
REFUSED: dict[str, tuple[tuple[Tensor, ...], dict[str, object], str]] = {
    "another width": ((H, W[:, :3], T), {}, r"\(3, 4\), weight \(5, 3\) do not multiply"),
    "a flat weight": ((H, W[0], T), {}, "do not multiply"),
    "targets of another shape": ((H, W, T[:2]), {}, r"target \(2,\) does not fit"),
    "probabilities": ((H, W, torch.zeros(3, 5)), {}, "probabilities cannot be chunked"),
    "a bias of another size": ((H, W, T), {"bias": H[0]}, r"bias \(4,\) does not fit"),
    "class weights likewise": ((H, W, T), {"class_weight": H[0]}, r"class_weight \(4,\)"),
    "integers": ((T[None], T[None], T[:1]), {}, "hidden is torch.int64"),
    "two formats": ((H, W.double(), T), {}, "torch.float32 and weight is torch.float64"),
    "a target too large": ((H, W, T + 5), {}, "target 5 is no class: the head has 5"),
    "a negative target": ((H, W, T - 3), {}, "target -3 is no class"),
    "too much smoothing": ((H, W, T), {"label_smoothing": 1.5}, "label_smoothing is 1.5"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_bad_input_is_refused_with_its_values(what: str) -> None:
    """One error that says what was given, and a hint."""
    tensors, options, message = REFUSED[what]

    with pytest.raises(NarrowcastError, match=message) as caught:
        linear_cross_entropy(*tensors, **options)  # type: ignore[arg-type]
    assert caught.value.hint


def test_an_unknown_reduction_names_the_nearest() -> None:
    """The hint lists the three."""
    with pytest.raises(UnknownName, match="did you mean 'mean'"):
        linear_cross_entropy(H, W, T, reduction="means")


@pytest.mark.parametrize("position", [0, 1, 2])
def test_what_is_no_tensor_is_refused_by_name(position: int) -> None:
    """As a batch without labels hands over."""
    given: list[object] = [torch.zeros(3, 4), torch.zeros(5, 4), torch.zeros(3).long()]
    given[position] = None
    name = ("hidden", "weight", "target")[position]

    with pytest.raises(UsageError, match=f"{name} is a NoneType"):
        linear_cross_entropy(*given)  # type: ignore[arg-type]
