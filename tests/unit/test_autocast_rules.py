"""Facts about the cast lists, and about following CUDA's on a CPU.

The proof that needs no GPU: torch's own CUDA autocast kernels, run on fake CUDA tensors, give the
same dtypes as the rehearsal. ``tests/gpu`` repeats it on real ones.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from autocast_samples import CALLS, CPU_ONLY, CUDA_ONLY, UNLISTED, Call, dtypes
from narrowcast.errors import UnknownName, UnsupportedPrecision
from narrowcast.precision.autocast_rules import CPU_LISTS, CUDA_LISTS, CastLists, rehearse

# Some operations on the lists are deprecated; the lists hold them all the same.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
LOWER = pytest.mark.parametrize("lower", [BF16, FP16], ids=["bf16", "fp16"])
# (autocast dtype, dtype of the inputs)
PAIRS = [(BF16, BF16), (BF16, FP32), (FP16, FP16), (FP16, FP32)]
# Listed by wrappers of vendor libraries, present in builds that have these.
VENDOR = {"_cudnn_rnn", "miopen_rnn"}
# Not listed themselves, but made of operations that are.
COMPOSITES = {
    "cross_entropy_loss": "fp32",
    "conv1d.padding": "lower",
    "conv2d.padding": "lower",
    "conv3d.padding": "lower",
}
# A CPU build of torch cannot run these on fake CUDA tensors; tests/gpu covers them.
NOT_FAKEABLE = {"gru_cell", "grid_sampler", "_convolution", "_convolution.deprecated"}


def registered(key: str) -> set[str]:
    """List what the installed torch has kernels for under an autocast key."""
    names = torch._C._dispatch_get_registrations_for_dispatch_key(key)
    return {n.removeprefix("aten::") for n in names if n.startswith("aten::")}


def factories(
    dtype: torch.dtype, device: str = "cpu", *, grad: bool = False
) -> tuple[Callable[..., Tensor], Callable[[list[Any]], Tensor]]:
    def floats(*shape: int) -> Tensor:
        return (torch.rand(*shape, device=device) * 0.8 + 0.1).to(dtype).requires_grad_(grad)

    return floats, lambda values: torch.tensor(values, device=device)


def on_cpu(call: Call, dtype: torch.dtype, lower: torch.dtype, **options: bool) -> Any:
    with torch.autocast("cpu", lower):
        return call(*factories(dtype, **options))


def expected(op: str, dtype: torch.dtype, lower: torch.dtype) -> torch.dtype:
    """Derive the result's dtype from CUDA's lists, as far as the installed torch has them."""
    rule = CUDA_LISTS.rule_of(op) if op in registered("AutocastCUDA") else COMPOSITES.get(op)
    if rule == "lower":
        return lower
    return FP32 if rule and rule.startswith("fp32") else dtype


REHEARSED = [op for op in {**CALLS, **UNLISTED} if CUDA_LISTS.rule_of(op) != "banned"]


def test_lists_hold_exactly_what_torch_registers() -> None:
    """If torch casts an operation that we do not list, this fails; so does a listed one it lost."""
    gone = {
        op for op in CUDA_LISTS.ops | CPU_LISTS.ops if re.search(r"[dD]imname|names_|Dimname", op)
    }
    gone |= {"rms_norm"}  # joined CUDA's list after torch 2.11

    assert registered("AutocastCUDA") - VENDOR <= CUDA_LISTS.ops
    assert registered("AutocastCPU") <= CPU_LISTS.ops
    assert CUDA_LISTS.ops - registered("AutocastCUDA") <= gone
    assert CPU_LISTS.ops - registered("AutocastCPU") <= gone


def test_cuda_lists_agree_with_torchs_header() -> None:
    """ATen/autocast_mode.h names for each operation the list that we have it on."""
    header = Path(torch.__file__).parent / "include/ATen/autocast_mode.h"
    text = header.read_text().replace("\\\n", " ")
    macros = {
        "lower": "LOWER_PRECISION_FP",
        "fp32": "FP32",
        "fp32_set_opt_dtype": "FP32_SET_OPT_DTYPE",
        "promote": "PROMOTE",
    }

    for rule, macro in macros.items():
        body = re.search(rf"#define AT_FORALL_{macro}\(_\)(.*?)\n", text)
        assert body, macro
        entries = re.findall(r"_\((\w+)(?:,\s*(\w+))?\)", body[1])
        for name, overload in entries:
            op = f"{name}.{overload}" if overload else name
            assert CUDA_LISTS.rule_of(op) == rule, op
        assert len(entries) > 5, macro


@pytest.mark.parametrize("lists", [CUDA_LISTS, CPU_LISTS], ids=["cuda", "cpu"])
def test_an_operation_is_on_one_list(lists: CastLists) -> None:
    """The lists of a device do not overlap."""
    sizes = [len(getattr(lists, name)) for name in CastLists.__dataclass_fields__]

    assert sum(sizes) == len(lists.ops)


def test_every_listed_operation_has_a_sample_or_a_reason() -> None:
    """Nothing on the lists goes untested by oversight."""
    # Named dimensions left torch; matrix_rank and lu_solve return or need integers; the last two
    # take the packed weights of modules, which test_rnn below runs.
    excused = CUDA_ONLY | {"lu_solve", "_native_multi_head_attention", "mkldnn_rnn_layer"}
    excused |= {op for op in CPU_LISTS.ops if op.startswith("linalg_matrix_rank")}
    excused |= {op for op in CPU_LISTS.ops | CUDA_LISTS.ops if re.search(r"(?i)dimname|names_", op)}

    assert (CUDA_LISTS.ops | CPU_LISTS.ops) - set(CALLS) - set(CPU_ONLY) == excused


@pytest.mark.parametrize("op", sorted(CPU_LISTS.ops & (set(CALLS) | set(CPU_ONLY))))
def test_native_rules_give_the_listed_dtypes(op: str) -> None:
    """The CPU's list is what CPU autocast does, with inputs in either dtype."""
    rule = CPU_LISTS.rule_of(op)
    for lower, dtype in PAIRS:
        result = on_cpu({**CALLS, **CPU_ONLY}[op], dtype, lower)

        wanted = {"lower": {lower}, "promote": {dtype}}.get(rule or "", {FP32, torch.complex64})
        assert set(dtypes(result)) <= wanted


@pytest.mark.parametrize("op", REHEARSED)
def test_rehearsed_dtypes_follow_cudas_lists(op: str) -> None:
    """Real tensors: each operation's result has the dtype that CUDA's list says."""
    for lower, dtype in PAIRS:
        with rehearse("cuda"):
            result = on_cpu({**CALLS, **UNLISTED}[op], dtype, lower)

        assert set(dtypes(result)) == {expected(op, dtype, lower)}


@pytest.mark.parametrize("op", REHEARSED)
def test_fake_tensors_are_rehearsed_alike(op: str) -> None:
    """Fake CPU tensors, which prediction traces, get the same dtypes as real ones."""
    for lower, dtype in PAIRS:
        with rehearse("cuda"), FakeTensorMode(allow_non_fake_inputs=True):
            result = on_cpu({**CALLS, **UNLISTED}[op], dtype, lower)

        assert set(dtypes(result)) == {expected(op, dtype, lower)}


@pytest.mark.parametrize("op", [op for op in REHEARSED if op not in NOT_FAKEABLE])
def test_torchs_own_cuda_kernels_agree(op: str) -> None:
    """The autocast kernels of CUDA itself, run on fake CUDA tensors, give the same dtypes."""
    for lower, dtype in PAIRS:
        with rehearse("cuda"):
            rehearsed = dtypes(on_cpu({**CALLS, **UNLISTED}[op], dtype, lower))
        with FakeTensorMode(allow_non_fake_inputs=True), cuda_autocast(lower):
            real = dtypes({**CALLS, **UNLISTED}[op](*factories(dtype, "cuda")))

        assert rehearsed == real


@contextlib.contextmanager
def cuda_autocast(lower: torch.dtype) -> Iterator[None]:
    """Turn CUDA's autocast on without a GPU, which torch.autocast refuses to."""
    before = torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", lower)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", False)
        torch.set_autocast_dtype("cuda", before)
        torch.clear_autocast_cache()


# Torch has no derivative of it.
NO_GRADIENT = {"_addmm_activation"}


@pytest.mark.parametrize("op", [op for op in REHEARSED if op not in NO_GRADIENT])
def test_gradients_pass_through_the_casts(op: str) -> None:
    """Backward reaches every input, in the input's own dtype."""
    for lower in (BF16, FP16):
        made: list[Tensor] = []
        floats, integers = factories(FP32, grad=True)

        def remembered(
            *shape: int, make: Callable[..., Tensor] = floats, made: list[Tensor] = made
        ) -> Tensor:
            made.append(make(*shape))
            return made[-1]

        with rehearse("cuda"):
            with torch.autocast("cpu", lower):
                result = {**CALLS, **UNLISTED}[op](remembered, integers)
            results = result if isinstance(result, (list, tuple)) else (result,)
            sum(r.float().sum() for r in results if r.requires_grad).backward()

        assert made[0].grad is not None
        assert {x.grad.dtype for x in made if x.grad is not None} == {FP32}


@LOWER
def test_promotion_takes_the_widest(lower: torch.dtype) -> None:
    """One fp32 input makes a promoted operation run in fp32; fp64 does not count."""
    low, wide = torch.ones(3, dtype=lower), torch.ones(3)

    with rehearse("cuda"), torch.autocast("cpu", lower):
        assert torch.addcmul(low, low, wide).dtype == FP32
        assert torch.dot(low, wide).dtype == FP32
        assert torch.atan2(low, low).dtype == lower
        assert torch.atan2(low, wide.double()).dtype == torch.float64, "promoted by atan2 itself"


def test_promotion_refuses_the_other_16_bit_format() -> None:
    """CUDA raises for fp16 inputs of a promoted operation under bf16 autocast; so do we."""
    with (
        rehearse("cuda"),
        torch.autocast("cpu", BF16),
        pytest.raises(UnsupportedPrecision) as error,
    ):
        torch.dot(torch.ones(3).half(), torch.ones(3).half())

    assert "torch.float16" in error.value.message


def test_binary_cross_entropy_is_refused() -> None:
    """BCE under autocast is CUDA's error, with the safe function in the hint; a CPU runs it."""
    x = torch.full((3,), 0.5)
    with torch.autocast("cpu", BF16):
        F.binary_cross_entropy(x, x)

    with (
        rehearse("cuda"),
        torch.autocast("cpu", BF16),
        pytest.raises(UnsupportedPrecision) as error,
    ):
        F.binary_cross_entropy(x, x)

    assert "binary_cross_entropy_with_logits" in error.value.hint


def test_an_asked_dtype_is_respected() -> None:
    """softmax(dtype=...) and sum(dtype=...) keep the caller's dtype, as on CUDA."""
    x = torch.ones(2, 3, dtype=BF16)

    with rehearse("cuda"), torch.autocast("cpu", BF16):
        assert torch.softmax(x, 1, dtype=BF16).dtype == BF16
        assert x.sum(dtype=torch.float64).dtype == torch.float64
        assert torch.cumsum(x, dim=0).dtype == FP32


def test_integers_and_doubles_are_left_alone() -> None:
    """Autocast touches neither: an integer sum stays integer, an fp64 product fp64."""
    with rehearse("cuda"), torch.autocast("cpu", BF16):
        assert torch.arange(3).sum().dtype == torch.int64
        assert torch.mv(torch.ones(2, 2).double(), torch.ones(2).double()).dtype == torch.float64
        assert torch.ones(2).double().exp().dtype == torch.float64
        assert torch.ones(2).double().norm().dtype == torch.float64


def test_without_autocast_nothing_is_cast() -> None:
    """A rehearsal changes what autocast does; it does not turn it on."""
    with rehearse("cuda"):
        assert torch.ones(3, dtype=BF16).softmax(0).dtype == BF16
        assert torch.mv(torch.ones(2, 2), torch.ones(2)).dtype == FP32
        with torch.autocast("cpu", BF16), torch.autocast("cpu", enabled=False):
            assert torch.ones(3, dtype=BF16).exp().dtype == BF16


def kernels() -> list[str]:
    """Dump the dispatch tables of everything that either device lists."""
    return [
        torch._C._dispatch_dump(f"aten::{op}")
        for op in sorted(registered("AutocastCPU") | registered("AutocastCUDA"))
    ]


@pytest.mark.parametrize("fail", [False, True])
def test_nothing_is_left_behind(fail: bool) -> None:
    """After the last rehearsal the dispatch tables are torch's own, also after an exception."""
    before = kernels()

    with contextlib.suppress(ZeroDivisionError), rehearse("cuda"):
        with rehearse("cuda"):
            pass
        assert kernels() != before
        _ = 1 / (0 if fail else 1)

    assert kernels() == before


def test_only_cuda_is_rehearsed() -> None:
    """Another device is an error, not a rehearsal of nothing."""
    with pytest.raises(UnknownName, match="tpu"):
        rehearse("tpu")


class Casts(TorchDispatchMode):
    """Counts the conversions to 16 bits."""

    def __init__(self) -> None:
        super().__init__()
        self.made = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._to_copy.default and kwargs.get("dtype") in (BF16, FP16):
            self.made += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("grad", [True, False])
def test_a_weight_is_cast_once_a_region(grad: bool) -> None:
    """Our kernels keep casts of weights as torch's do: one a region, a new one in the next."""
    weight, vector = nn.Parameter(torch.ones(3, 3)), torch.ones(3, dtype=BF16)

    with rehearse("cuda"), torch.set_grad_enabled(grad):
        for value in (1.0, 2.0):
            weight.data.fill_(value)
            with Casts() as casts, torch.autocast("cpu", BF16):
                first = torch.mv(weight, vector)
                weight.data.zero_()
                second = torch.mv(weight, vector)
            assert casts.made == 1
            assert torch.equal(first, second)
            assert first[0] == 3 * value


def test_a_cast_dies_with_its_region() -> None:
    """When autocast ends, nothing of ours keeps the 16-bit copy of a weight alive."""
    from narrowcast.precision.autocast_rules import _WEIGHT_CASTS

    weight = nn.Parameter(torch.ones(3, 3))
    with rehearse("cuda"):
        with torch.autocast("cpu", BF16), torch.no_grad():
            torch.mv(weight, torch.ones(3))
            with torch.autocast("cpu", enabled=False):
                pass
            assert len(_WEIGHT_CASTS._casts) == 1, "an inner region ends nothing"
        assert len(_WEIGHT_CASTS._casts) == 0


def test_a_cast_made_without_gradients_is_not_used_with_them() -> None:
    """A weight read under no_grad first still gets its gradient in the same region."""
    weight = nn.Parameter(torch.ones(3, 3))

    with rehearse("cuda"), torch.autocast("cpu", BF16):
        with torch.no_grad():
            torch.mv(weight, torch.ones(3))
        torch.mv(weight, torch.ones(3)).sum().backward()

    assert weight.grad is not None
    assert weight.grad.dtype == FP32


def test_the_cache_can_be_off() -> None:
    """autocast(cache_enabled=False): every use casts anew."""
    weight = nn.Parameter(torch.ones(3, 3))

    with rehearse("cuda"), Casts() as casts, torch.autocast("cpu", BF16, cache_enabled=False):
        torch.mv(weight, torch.ones(3, dtype=BF16))
        torch.mv(weight, torch.ones(3, dtype=BF16))

    assert casts.made == 2


class Block(nn.Module):
    """A transformer block, written out: norms, softmax and exp are where the devices differ."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        return x + self.out(torch.softmax(q @ k.mT / 8**0.5, -1) @ v).exp()


def test_a_module_trains_under_rehearsal() -> None:
    """Loss and gradients are finite and fp32; the saved softmax is fp32, as CUDA would save it."""
    model, x = Block(), torch.randn(2, 4, 8)
    saved: set[torch.dtype] = set()

    def note(tensor: Tensor) -> Tensor:
        if tensor.shape == (2, 4, 4):
            saved.add(tensor.dtype)
        return tensor

    with rehearse("cuda"):
        with (
            torch.autocast("cpu", BF16),
            torch.autograd.graph.saved_tensors_hooks(note, lambda t: t),
        ):
            loss = F.mse_loss(model(x), x)
        loss.backward()

    assert loss.dtype == FP32
    assert saved == {FP32, BF16}, "fp32 by softmax, bf16 by the product after it"
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_an_lstm_gives_16_bits_as_cudnn_does() -> None:
    """cuDNN's recurrent layers have a wrapper of their own; a CPU's LSTM keeps its native rule."""
    with rehearse("cuda"), torch.autocast("cpu", BF16):
        output, _ = nn.LSTM(4, 4)(torch.ones(2, 1, 4))

    assert output.dtype == BF16


def test_the_page_names_what_differs() -> None:
    """docs/autocast-rules.md lists every operation that the two devices cast differently."""
    page = (Path(__file__).resolve().parents[2] / "docs" / "autocast-rules.md").read_text()
    differing = {
        op.partition(".")[0]
        for op in CUDA_LISTS.ops | CPU_LISTS.ops
        if CUDA_LISTS.rule_of(op) != CPU_LISTS.rule_of(op)
    }
    # Named as families, or existing on one device only.
    families = re.compile(
        r"fft_|linalg_|cholesky|.*(qr|svd|lu_|_lu|inverse|solve|geqrf|as_complex)"
    )
    inner = {"mkldnn_rnn_layer", "grid_sampler_2d", "grid_sampler_3d"}
    inner |= {"_grid_sampler_2d_cpu_fallback", "fake_quantize_per_tensor_affine", "pinverse"}
    inner |= {"multilabel_margin_loss_forward", *CUDA_ONLY}

    missing = {op for op in differing - inner if not families.match(op) and f"`{op}`" not in page}
    assert missing == set()
