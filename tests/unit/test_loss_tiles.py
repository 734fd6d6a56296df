"""The cut of the logits: what it promises about bytes, and that the promise holds."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from narrowcast.errors import UsageError
from narrowcast.loss import passes
from narrowcast.loss.cross_entropy import linear_cross_entropy
from narrowcast.loss.tiles import Problem, Tiling, blocks
from narrowcast.memory.measure import MemoryLedger

FP32, BF16 = torch.float32, torch.bfloat16
FORMATS = st.sampled_from([FP32, BF16])


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    return Problem(
        tokens=draw(st.integers(0, 20_000)),
        classes=draw(st.integers(1, 200_000)),
        width=draw(st.integers(1, 5_000)),
        hidden=draw(FORMATS),
        weight=draw(FORMATS),
        compute=draw(FORMATS),
        accumulate=FP32,
        narrow=draw(st.booleans()),
        hidden_gradient=draw(st.booleans()),
        weight_gradient=draw(st.booleans()),
    )


@given(problem=problems(), chunk_bytes=st.integers(1, 2**30))
def test_a_tile_with_what_lives_beside_it_fits(problem: Problem, chunk_bytes: int) -> None:
    """Tiles cost what bytes_beside says, at most the budget; a budget below 1 x 1 is refused."""
    tile, token, class_ = problem.bytes_beside()
    if chunk_bytes < tile + token + class_:
        with pytest.raises(UsageError, match="too little for one logit"):
            Tiling.fitting(problem, chunk_bytes)
        return

    cut = Tiling.fitting(problem, chunk_bytes)

    n, v = cut.tokens, cut.classes
    assert 1 <= n <= max(problem.tokens, 1)
    assert 1 <= v <= problem.classes
    assert tile * n * v + token * n + class_ * v <= chunk_bytes


@given(count=st.integers(0, 100), size=st.integers(1, 30))
def test_blocks_cover_each_number_once(count: int, size: int) -> None:
    """No row is left out and none comes twice."""
    covered = [i for block in blocks(count, size) for i in range(block.start, block.stop)]

    assert covered == list(range(count))


@pytest.mark.parametrize(
    ("hidden", "weight", "tokens", "by_class"),
    [
        (FP32, FP32, 10, True),  # both sums are gradients themselves
        (BF16, FP32, 10, False),  # autocast: the sum of the weight's gradient is the gradient
        (FP32, BF16, 10_000, True),
        (BF16, BF16, 999, True),  # two sums of their own: the smaller one
        (BF16, BF16, 1_001, False),
    ],
)
def test_the_gradient_that_is_summed_whole_is_the_one_that_costs_less(
    hidden: torch.dtype, weight: torch.dtype, tokens: int, *, by_class: bool
) -> None:
    """Of N x D and V x D numbers in fp32, those that are no gradient themselves count."""
    problem = Problem(
        tokens=tokens,
        classes=1_000,
        width=8,
        hidden=hidden,
        weight=weight,
        compute=BF16,
        accumulate=FP32,
        narrow=False,
        hidden_gradient=True,
        weight_gradient=True,
    )

    assert problem.by_class is by_class


def peak_of(step: Callable[[], None]) -> int:
    with MemoryLedger(device="cpu") as ledger:
        step()
    return ledger.record().total_peak_bytes


@torch.library.custom_op("narrowcast_tests::narrow_mm", mutates_args=())
def narrow_mm(a: Tensor, b: Tensor) -> Tensor:
    """One operation that widens nothing that can be seen, as on CUDA."""
    return a.float() @ b.float()


@pytest.mark.slow
@pytest.mark.parametrize("chunk_bytes", [40_000, 200_000, 1_000_000])
@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize(
    ("hidden_dtype", "weight_dtype", "tokens", "classes"),
    [
        (FP32, FP32, 300, 700),
        (BF16, BF16, 300, 700),
        (BF16, BF16, 700, 300),
        (BF16, FP32, 300, 700),
        (FP32, BF16, 300, 700),
    ],
)
def test_temporaries_are_bounded_by_chunk_bytes(
    hidden_dtype: torch.dtype,
    weight_dtype: torch.dtype,
    tokens: int,
    classes: int,
    chunk_bytes: int,
    *,
    narrow: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Inputs and their gradients, what is saved, the one whole sum, and chunk_bytes, by the ledger.

    Beyond that, 16 numbers of 8 bytes a token and 2 of 4 bytes a class. 16-bit gradients: the one
    whole sum is rounded at the end, when no tile is alive.
    """
    width = 32
    if narrow:
        monkeypatch.setattr(passes, "_multiplies_narrow", lambda _d, compute: compute == BF16)
        monkeypatch.setattr(passes, "_narrow_product", narrow_mm)
    hidden = torch.randn(tokens, width, dtype=hidden_dtype, requires_grad=True)
    weight = torch.randn(classes, width, dtype=weight_dtype, requires_grad=True)
    bias = torch.randn(classes, requires_grad=True)
    target = torch.randint(0, classes, (tokens,))
    mixed = not hidden_dtype == weight_dtype == FP32

    def step() -> None:
        with torch.autocast("cpu", BF16, enabled=mixed):
            loss = linear_cross_entropy(hidden, weight, target, bias=bias, chunk_bytes=chunk_bytes)
        loss.backward()

    found = peak_of(step)

    inputs = hidden.nbytes + weight.nbytes + bias.nbytes
    saved = 2 * tokens * width if hidden_dtype == FP32 and mixed else 0
    whole = [n for n, dtype in ((tokens, hidden_dtype), (classes, weight_dtype)) if dtype == BF16]
    sums = 4 * width * min(whole) if len(whole) == 2 else 0
    allowed = 2 * inputs + saved + sums + chunk_bytes + 128 * tokens + 8 * classes
    assert found <= allowed


def test_a_budget_below_one_logit_is_refused_with_the_least_that_works() -> None:
    """The message has both numbers."""
    hidden, weight = torch.randn(4, 1_000, dtype=BF16), torch.randn(5, 1_000, dtype=BF16)

    with pytest.raises(UsageError, match=r"chunk_bytes=100 is too little .* 8004 bytes"):
        linear_cross_entropy(hidden, weight, torch.zeros(4, dtype=torch.long), chunk_bytes=100)
