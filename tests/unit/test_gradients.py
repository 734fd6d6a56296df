"""Arithmetic on lists of gradients, on each dtype, at the edges of each range."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from narrowcast.engine import gradients
from narrowcast.errors import UsageError

DTYPES = [torch.bfloat16, torch.float32, torch.float64]
SHAPES = [(), (1,), (0,), (7,), (3, 5)]


def parameter(gradient: Tensor | None, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    made = nn.Parameter(torch.zeros(() if gradient is None else gradient.shape, dtype=dtype))
    made.grad = gradient
    return made


def optimizer(*parameters: nn.Parameter) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


def total(found: list[Tensor], dtype: torch.dtype | None = torch.float32) -> float:
    return gradients.read_total(gradients.norms(found, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_norm_is_that_of_all_elements_together(dtype: torch.dtype) -> None:
    """Within fp32's rounding of the fp64 norm, whatever the dtype and the shapes; none is lost."""
    found = [torch.randn(shape).to(dtype) for shape in SHAPES]
    flat = torch.cat([g.double().flatten() for g in found])
    owner = optimizer(*(parameter(g, dtype) for g in found))

    norms = gradients.norms(found, gradients.norm_dtype(owner))

    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert [n.dtype for n in norms] == [wide] * len(SHAPES)
    assert [n.shape for n in norms] == [()] * len(SHAPES)
    # each of 5 norms sums at most 15 squares: 24 roundings of 2^-24 in all
    assert gradients.read_total(norms) == pytest.approx(flat.norm().item(), rel=24 * 2**-24)


def test_a_bf16_norm_is_summed_in_fp32() -> None:
    """4096 ones have norm 64; in bf16 adding 1 to 256 is lost and the norm would be 16."""
    assert total([torch.ones(4096, dtype=torch.bfloat16)]) == 64.0


def test_views_that_are_not_contiguous_count_their_own_elements() -> None:
    """A transposed and a strided gradient are read through their strides."""
    base = torch.arange(12.0).reshape(3, 4)

    assert total([base.t()]) == total([base])
    assert total([base[:, ::2]]) == pytest.approx(base[:, ::2].norm().item())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
def test_one_bad_element_is_found(dtype: torch.dtype, bad: float) -> None:
    """In the norm, which is then not finite, and in the exact check."""
    found = [torch.ones(3, dtype=dtype), torch.tensor([1.0, bad, 1.0], dtype=dtype)]

    assert not math.isfinite(total(found, None if dtype == torch.float64 else torch.float32))
    assert not bool(gradients.all_finite(found))
    assert gradients.exact_norms(found) is None


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_finite_elements_are_not_taken_for_bad_ones(dtype: torch.dtype) -> None:
    """Squares of 1e30 overflow fp32; summed in fp64 the norm is right."""
    found = [torch.full((4,), 1e30).to(dtype), torch.zeros(0, dtype=dtype)]

    assert bool(gradients.all_finite(found))
    exact = gradients.exact_norms(found)
    assert exact is not None
    # bf16 holds 1e30 to 2^-9
    assert gradients.read_total(exact) == pytest.approx(2e30, rel=2**-8)


def test_nothing_but_empty_gradients_is_finite() -> None:
    """An empty tensor has no largest element, and no bad one."""
    assert bool(gradients.all_finite([torch.zeros(0)]))
    assert total([torch.zeros(0)]) == 0.0


@pytest.mark.parametrize("limit", [1e-6, 0.5, 3.0, 1e9])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_clipping_is_torchs_bit_for_bit(dtype: torch.dtype, limit: float) -> None:
    """Below, near and above the norm; in bf16 from an fp32 norm, which torch's is not."""
    ours = [torch.randn(5, 3).to(dtype), torch.randn(4).to(dtype)]
    theirs = [g.clone() for g in ours]
    norms = gradients.norms(ours, torch.float32)

    gradients.clip(ours, norms, limit)
    nn.utils.clip_grads_with_norm_(
        [parameter(g, dtype) for g in theirs],
        limit,
        torch.linalg.vector_norm(torch.stack(list(norms))),
    )

    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_scaling_by_a_power_of_two_and_back_is_exact(dtype: torch.dtype) -> None:
    """The loss scale leaves no trace in gradients that are not subnormal."""
    found = [torch.randn(7).to(dtype), torch.randn(2, 2).to(dtype)]
    before = [g.clone() for g in found]

    gradients.scale(found, 2.0**16)
    gradients.scale(found, 2.0**-16)

    assert all(torch.equal(a, b) for a, b in zip(found, before, strict=True))


def test_collecting_shares_storage_and_coalesces_sparse_gradients() -> None:
    """What is done to the collected values is done to the gradients themselves."""
    sparse = torch.sparse_coo_tensor(
        torch.tensor([[1, 1, 2]]), torch.tensor([1.0, 2.0, 4.0]), (4,), check_invariants=True
    )
    holders = [parameter(torch.ones(2)), parameter(None), parameter(sparse)]

    found = gradients.collect(optimizer(*holders))
    gradients.scale(found, 2.0)

    assert [g.tolist() for g in found] == [[2.0, 2.0], [6.0, 8.0]]
    assert holders[2].grad is not None
    assert holders[2].grad.to_dense().tolist() == [0.0, 6.0, 8.0, 0.0]


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
def test_other_layouts_are_refused() -> None:
    """Rather than skipped: an unchecked gradient would be applied unchecked."""
    holder = nn.Parameter(torch.eye(3).to_sparse_csr())
    holder.grad = torch.eye(3).to_sparse_csr()

    with pytest.raises(UsageError, match="sparse_csr"):
        gradients.collect(optimizer(holder))


def test_wide_sums_round_once_and_leave_other_gradients_alone() -> None:
    """256 + 1 + 1 in bf16, one by one, is 256; from the fp32 sum it is 258. fp32 stays in .grad."""
    narrow = parameter(torch.tensor([256.0]).bfloat16(), torch.bfloat16)
    wide = parameter(torch.tensor([1.0]))
    owner = optimizer(narrow, wide)
    sums = gradients.WideSums(torch.float32)

    sums.add(owner)
    for _ in range(2):
        narrow.grad = torch.ones(1, dtype=torch.bfloat16)
        sums.add(owner)
    collected = sums.collect(owner)
    sums.round_into_gradients()

    assert [(g.dtype, g.item()) for g in collected] == [
        (torch.float32, 258.0),
        (torch.float32, 1.0),
    ]
    assert narrow.grad is not None
    assert narrow.grad.dtype == torch.bfloat16
    assert narrow.grad.item() == 258.0
    assert sums.collect(optimizer(parameter(None))) == []
