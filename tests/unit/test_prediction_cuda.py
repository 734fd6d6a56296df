"""CUDA's kernels on fake CPU tensors: what they keep and take, and that they go away again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from narrowcast.errors import UsageError
from narrowcast.memory.measure import MemoryLedger
from narrowcast.prediction.allocator import AllocatorConfig, OutOfDeviceMemory, replay
from narrowcast.prediction.cuda_ops import CudaKernels, cuda_kernels
from narrowcast.prediction.gpus import GPUS

A100, H100, T4 = GPUS["a100-80gb"], GPUS["h100"], GPUS["t4"]
MIB = 2**20
HALVES = (torch.float16, torch.bfloat16)


class Answers(TorchDispatchMode):
    """Step counts that are read get a one."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return 1.0
        return func(*args, **(kwargs or {}))


@contextmanager
def on_gpu(gpu: Any = A100, **options: Any) -> Iterator[tuple[MemoryLedger, CudaKernels]]:
    with (
        FakeTensorMode(),
        MemoryLedger(device="cpu") as ledger,
        Answers(),
        cuda_kernels(gpu, **options) as kernels,
    ):
        yield ledger, kernels


def sizes(ledger: MemoryLedger, start: int = 0) -> list[int]:
    """List what has come since event `start`, in order."""
    return [change for _, change in ledger.events()[start:] if change > 0]


def kept(ledger: MemoryLedger) -> int:
    return ledger._book.total


def test_dropout_keeps_a_mask_of_bools() -> None:
    """One byte an element beside the result, not a mask in the format of the input."""
    with on_gpu() as (ledger, _):
        value = torch.empty(1000, requires_grad=True)
        start = len(ledger.events())
        out = F.dropout(value, 0.1)

        assert sizes(ledger, start) == [4000, 1000]
        assert out.shape == value.shape


@pytest.mark.parametrize(("p", "training"), [(0.0, True), (0.5, False)])
def test_dropout_that_drops_nothing_takes_nothing(p: float, training: bool) -> None:
    """p=0 and evaluation return the input itself, as on CUDA."""
    with on_gpu() as (ledger, _):
        value = torch.empty(1000, requires_grad=True)
        start = len(ledger.events())
        F.dropout(value, p, training)

        assert sizes(ledger, start) == []


@pytest.mark.parametrize(
    ("gpu", "workspace"), [(T4, 8_519_680), (A100, 8_519_680), (H100, 32 * MIB)]
)
def test_each_thread_that_multiplies_takes_a_workspace_once(gpu: Any, workspace: int) -> None:
    """Forward and backward: two of cuBLAS; further products take none."""
    with on_gpu(gpu) as (ledger, kernels):
        left = torch.empty(64, 64, requires_grad=True)
        for _ in range(2):
            (left @ left).sum().backward()

        assert Counter(sizes(ledger))[workspace] == 2
        assert sum(t.nbytes for t in kernels.workspaces) == 2 * workspace


def test_a_fused_bias_takes_a_workspace_of_cublaslt() -> None:
    """A linear layer with a bias takes 1 MiB more in forward; its backward is plain products."""
    with on_gpu() as (ledger, _):
        layer = nn.Linear(64, 64)
        layer(torch.empty(8, 64)).sum().backward()

        assert Counter(sizes(ledger))[MIB] == 1


def test_without_products_there_is_no_workspace() -> None:
    """Elementwise operations take none."""
    with on_gpu() as (_, kernels):
        torch.empty(64, requires_grad=True).exp().sum().backward()

        assert kernels.workspaces == []


def test_workspaces_outlive_a_step() -> None:
    """A second context that adopts them takes none anew."""
    with on_gpu() as (_, first):
        torch.empty(8, 8) @ torch.empty(8, 8)
    with on_gpu() as (ledger, second):
        second.adopt_workspaces(first)
        start = len(ledger.events())
        torch.empty(8, 8) @ torch.empty(8, 8)

        assert sizes(ledger, start) == [256, 256, 256]


def attend(
    shape: tuple[int, ...], dtype: torch.dtype, **options: Any
) -> tuple[Tensor, list[Tensor]]:
    inputs = [torch.empty(shape, dtype=dtype, requires_grad=True) for _ in range(3)]
    return F.scaled_dot_product_attention(*inputs, **options), inputs


@pytest.mark.parametrize(
    ("gpu", "dtype", "more"),
    [
        (T4, torch.float32, {}),
        (T4, torch.float16, {"mask": True}),
        (A100, torch.float16, {}),
        (A100, torch.bfloat16, {"dropout_p": 0.1}),
        (A100, torch.bfloat16, {"mask": True}),
        (A100, torch.float64, {}),
        (H100, torch.bfloat16, {}),
        (H100, torch.bfloat16, {"mask": True}),
        (H100, torch.float32, {"is_causal": True}),
    ],
)
@pytest.mark.parametrize("length", [1, 32, 33, 129])
@pytest.mark.parametrize("size", [8, 60, 136])
def test_every_attention_kernel_returns_what_the_formula_returns(
    gpu: Any, dtype: torch.dtype, more: dict[str, Any], length: int, size: int
) -> None:
    """Shape, format and device of the result and of the gradients, whatever kernel is chosen."""
    options = dict(more)
    with on_gpu(gpu):
        if options.pop("mask", False):
            options["attn_mask"] = torch.ones(length, length, dtype=torch.bool)
        out, inputs = attend((2, 3, length, size), dtype, **options)
        out.sum().backward()

        assert (out.shape, out.dtype) == ((2, 3, length, size), dtype)
        for tensor in inputs:
            assert tensor.grad is not None
            assert (tensor.grad.shape, tensor.grad.dtype) == (tensor.shape, dtype)
            assert tensor.grad.device == tensor.device


@pytest.mark.parametrize(("length", "rows"), [(31, 32), (32, 32), (33, 64)])
def test_efficient_attention_pads_its_log_sum_exp(length: int, rows: int) -> None:
    """It keeps the output and fp32 rows padded to 32; random state is in host memory."""
    with on_gpu(T4) as (ledger, _):
        start_shape = (2, 3, length, 64)
        inputs = [torch.empty(start_shape, requires_grad=True) for _ in range(3)]
        start = len(ledger.events())
        F.scaled_dot_product_attention(*inputs)

        assert sizes(ledger, start) == [4 * 2 * 3 * length * 64, 4 * 2 * 3 * rows]


def test_flash_attention_keeps_output_log_sum_exp_and_random_state() -> None:
    """Its layout is the query's, so that (batch, length, heads, size) needs no copy afterwards."""
    with on_gpu() as (ledger, _):
        packed = torch.empty(2, 33, 3, 64, dtype=torch.bfloat16, requires_grad=True)
        query = packed.transpose(1, 2)
        start = len(ledger.events())
        out = F.scaled_dot_product_attention(query, query, query)

        assert sizes(ledger, start) == [2 * 2 * 33 * 3 * 64, 4 * 2 * 3 * 33, 16, 8]
        assert out.transpose(1, 2).is_contiguous()


def test_a_bool_mask_becomes_a_float_mask_with_aligned_rows() -> None:
    """Efficient attention adds it: one per score row of the mask, padded to 8 columns, and kept."""
    with on_gpu() as (ledger, _):
        mask = torch.ones(33, 33, dtype=torch.bool)
        before = kept(ledger)
        out, inputs = attend((2, 3, 33, 64), torch.bfloat16, attn_mask=mask)

        own = sum(t.nbytes for t in (out, *inputs)) + 4 * 2 * 3 * 64
        assert kept(ledger) - before == own + 2 * 33 * 40


def test_the_formula_upcasts_and_keeps_every_product() -> None:
    """Math attention keeps the weights; it is what remains where no kernel fits."""
    with on_gpu() as (ledger, _), sdpa_kernel(SDPBackend.MATH):
        attend((2, 3, 32, 64), torch.float32)

        assert Counter(sizes(ledger))[4 * 2 * 3 * 32 * 32] >= 2


@pytest.mark.parametrize("dtype", HALVES)
def test_norms_keep_their_statistics_in_fp32(dtype: torch.dtype) -> None:
    """Layer norm of 8 rows: two numbers of four bytes a row; batch norm of 5 channels likewise."""
    with on_gpu() as (ledger, _):
        value = torch.empty(8, 5, 16, dtype=dtype, requires_grad=True)
        start = len(ledger.events())
        F.layer_norm(value, (5, 16))
        assert sizes(ledger, start) == [value.nbytes, 32, 32]

        start = len(ledger.events())
        F.batch_norm(value, None, None, training=True)
        assert [s for s in sizes(ledger, start) if s] == [value.nbytes, 20, 20]


def test_rms_norm_keeps_its_input_and_one_number_a_row() -> None:
    """CUDA has one kernel for it where a CPU keeps squares and products."""
    with on_gpu() as (ledger, _):
        value = torch.empty(8, 64, dtype=torch.bfloat16, requires_grad=True)
        weight = torch.empty(64, dtype=torch.bfloat16, requires_grad=True)
        start = len(ledger.events())
        out = F.rms_norm(value, (64,), weight)
        assert sizes(ledger, start) == [value.nbytes, 32]

        out.sum().backward()

        assert value.grad is not None
        assert weight.grad is not None
        assert (value.grad.dtype, weight.grad.shape) == (torch.bfloat16, weight.shape)


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
def test_rms_norm_of_mixed_formats_is_composed_as_on_cuda() -> None:
    """With an fp32 weight on bf16 the fused kernel is refused, and torch says so."""
    with on_gpu() as (ledger, _):
        value = torch.empty(8, 64, dtype=torch.bfloat16, requires_grad=True)
        start = len(ledger.events())
        F.rms_norm(value, (64,), torch.empty(64))

        assert 4 * 8 * 64 in sizes(ledger, start)


@pytest.mark.parametrize("function", [F.softmax, F.log_softmax])
@pytest.mark.parametrize(("dtype", "copies"), [(torch.float16, 0), (torch.bfloat16, 1)])
def test_softmax_of_fp16_to_fp32_is_one_kernel(
    function: Callable[..., Tensor], dtype: torch.dtype, copies: int
) -> None:
    """From bf16 the input is cast first; from fp16 it is not (half_to_float)."""
    with on_gpu() as (ledger, _):
        value = torch.empty(8, 64, dtype=dtype, requires_grad=True)
        start = len(ledger.events())
        out = function(value, -1, dtype=torch.float32)
        out.sum().backward()

        assert sizes(ledger, start)[: 1 + copies] == [out.nbytes] * (1 + copies)
        assert out.dtype == torch.float32
        assert value.grad is not None
        assert value.grad.dtype == dtype


def test_autocast_follows_the_lists_of_cuda() -> None:
    """Layer norm and softmax return fp32 under bf16 autocast, products bf16."""
    with on_gpu(), torch.autocast("cpu", torch.bfloat16):
        value = torch.empty(4, 8, dtype=torch.bfloat16)

        assert F.layer_norm(value, (8,)).dtype == torch.float32
        assert F.softmax(value, -1).dtype == torch.float32
        assert (torch.empty(4, 8) @ torch.empty(8, 4)).dtype == torch.bfloat16


def test_optimizers_default_to_foreach() -> None:
    """Foreach holds the roots of all second moments at once; a loop holds one parameter's."""
    temporaries = {}
    for foreach in (None, False):
        with on_gpu() as (ledger, _):
            parameters = [nn.Parameter(torch.empty(n)) for n in (1000, 3000)]
            optimizer = torch.optim.AdamW(parameters, foreach=foreach)
            for _ in range(2):
                for parameter in parameters:
                    parameter.grad = torch.empty_like(parameter)
                held, start = kept(ledger), len(ledger.events())
                optimizer.step()
            total = highest = held
            for _, change in ledger.events()[start:]:
                total += change
                highest = max(highest, total)
            temporaries[foreach] = highest - held

    assert temporaries[None] == 4 * 4000
    # Root and denominator of the second, and by its name still the denominator of the first.
    assert temporaries[False] == 4 * (3000 + 3000 + 1000)


@pytest.mark.parametrize(("count", "sorts"), [(0, False), (3072, False), (3073, True)])
def test_embeddings_sort_more_than_3072_indices(count: int, sorts: bool) -> None:
    """The gradient of few rows needs no order; that of more takes it, and fp32 sums by segment."""
    with on_gpu() as (ledger, _):
        weight = torch.empty(50, 32, requires_grad=True)
        out = F.embedding(torch.zeros(count, dtype=torch.long), weight)
        start = len(ledger.events())
        out.sum().backward()

        assert weight.grad is not None
        assert weight.grad.shape == weight.shape
        assert (4 * (count // 10 + min(count, 50)) * 32 in sizes(ledger, start)) == sorts


def test_what_a_gpu_does_ends_with_the_context() -> None:
    """Afterwards a CPU's own kernels and defaults are in force again."""
    with on_gpu():
        pass
    with FakeTensorMode(), MemoryLedger(device="cpu") as ledger:
        value = torch.empty(1000, requires_grad=True)
        start = len(ledger.events())
        F.dropout(value, 0.5)
        assert 1000 not in sizes(ledger, start)
    torch.manual_seed(0)
    value = torch.randn(2, 2, 8, 8)

    out = F.scaled_dot_product_attention(value, value, value)

    expected = (value @ value.transpose(-1, -2) / 8**0.5).softmax(-1) @ value
    torch.testing.assert_close(out, expected)


def test_two_emulations_exclude_each_other() -> None:
    """The kernels are the process's; a second context says so."""
    with on_gpu(), pytest.raises(UsageError, match="already"), cuda_kernels(T4):
        pass


def test_a_rule_of_ones_own_replaces_a_kernel() -> None:
    """A kernel that is not ours can be described by whoever knows it."""
    exp = torch.ops.aten.exp.default

    def rule(kernels: CudaKernels, func: Any, args: Any, kwargs: Any) -> Any:
        kernels.scratch(123456)
        return func(*args, **kwargs)

    with on_gpu(rules={exp: rule}) as (ledger, _):
        torch.empty(10).exp()

        assert 123456 in sizes(ledger)


def step_on(gpu: Any) -> MemoryLedger:
    with on_gpu(gpu) as (ledger, _):
        model = nn.Sequential(nn.Linear(512, 2048), nn.GELU(), nn.Linear(2048, 512))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            model(torch.empty(64, 512)).sum().backward()
            optimizer.step()
    return ledger


def test_the_same_step_takes_more_on_hopper() -> None:
    """Two workspaces of 32 MiB in the place of two of 8.125 MiB."""
    on_a100, on_h100 = (replay(step_on(gpu).events()) for gpu in (A100, H100))

    assert on_h100.requested_bytes - on_a100.requested_bytes == 2 * (32 * MIB - 8_519_680)


def test_a_device_that_is_too_small_is_an_error() -> None:
    """The replay with a limit raises as the run would."""
    with pytest.raises(OutOfDeviceMemory, match="do not fit"):
        replay(step_on(A100).events(), AllocatorConfig(device_bytes=24 * MIB))
