"""Facts about narrow norms: 16 bits in and out, fp32 inside, against fp64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from narrowcast.activations import norms
from narrowcast.activations.rules import apply_rules, remove_rules, rounding_state
from narrowcast.errors import UsageError
from narrowcast.plan import ActivationRule
from narrowcast.policy import POLICIES, Policy
from narrowcast.precision.cast import forward_context, full_precision, prepare_model
from narrowcast.prediction.cuda_ops import cuda_kernels
from narrowcast.prediction.gpus import gpu_named

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
RULES = (ActivationRule(modules="*", lever="narrow_norm"),)
REHEARSED = Policy(name="bf16", compute="bf16", autocast_rules="cuda")

# Half an ulp of a number is at most this part of it: 8 and 11 bits of significand.
HALF_ULP = {BF16: 2.0**-8, FP16: 2.0**-11, FP32: 2.0**-24}
# fp32 sums over a row: torch adds in blocks, so that errors grow like the depth of a tree; 32
# roundings are more than any path through the formulas has for rows of up to 2^16 numbers.
ROUNDINGS = 32 * 2.0**-24

KINDS: dict[str, Callable[[int], nn.Module]] = {
    "layer": nn.LayerNorm,
    "layer without bias": lambda width: nn.LayerNorm(width, bias=False),
    "layer without weights": lambda width: nn.LayerNorm(width, elementwise_affine=False),
    "rms": lambda width: nn.RMSNorm(width, eps=1e-5),
    "rms with torch's eps": nn.RMSNorm,
    "rms without weights": lambda width: nn.RMSNorm(width, elementwise_affine=False),
}


def put_on(module: nn.Module) -> nn.Module:
    """Give random weights, and the lever."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, mean=1.0, std=0.3)
    model = nn.ModuleDict({"norm": module})
    apply_rules(model, RULES, POLICIES["fp32"])
    return module


def in_fp64(module: nn.Module, x: Tensor, dy: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Return y and the gradients of x and the weights, by torch's own norm in fp64."""
    wide = type(module)(*arguments(module)).double()
    wide.load_state_dict({name: t.double() for name, t in module.state_dict().items()})
    if isinstance(wide, nn.RMSNorm) and wide.eps is None:
        wide.eps = torch.finfo(FP32).eps  # torch's default is that of the dtype squared in
    x = x.double().requires_grad_()
    y = wide(x)
    return y, list(torch.autograd.grad(y, [x, *wide.parameters()], dy.double()))


def arguments(module: nn.Module) -> tuple[object, ...]:
    if isinstance(module, nn.GroupNorm):
        return module.num_groups, module.num_channels, module.eps, module.affine
    shape, eps = module.normalized_shape, module.eps
    if isinstance(module, nn.LayerNorm):
        return shape, eps, module.elementwise_affine, module.bias is not None
    return shape, eps, module.elementwise_affine


@contextmanager
def chunks_of(size: int) -> Iterator[None]:
    before, norms._CHUNK = norms._CHUNK, size
    try:
        yield
    finally:
        norms._CHUNK = before


def check(module: nn.Module, x: Tensor, reduced: tuple[int, ...]) -> None:
    """Compare y, dx and the gradients of weights with fp64, within derived bounds.

    y and dx are fp32 results rounded once: half an ulp, and `ROUNDINGS` of the terms that they are
    sums of. Gradients of weights are fp32 sums over n rows: n roundings of the sum of sizes at the
    most, and half an ulp where the weights are 16-bit.
    """
    dy = torch.randn(x.shape).to(x.dtype)
    x = x.detach().requires_grad_()
    y = module(x)
    parameters = list(module.parameters())
    got = torch.autograd.grad(y, [x, *parameters], dy)
    exact_y, exact = in_fp64(module, x.detach(), dy)
    half = HALF_ULP[x.dtype]

    assert (y.dtype, y.shape, y.device) == (x.dtype, x.shape, x.device)
    assert (got[0].dtype, got[0].shape) == (x.dtype, x.shape)
    if x.numel() == 0:
        assert all(not gradient.any() for gradient in got[1:])
        return
    wide, weight = x.detach().double(), max([1.0, *(p.abs().max().item() for p in parameters)])
    deviation = wide.var(reduced, keepdim=True, unbiased=False)
    r = 1 / (deviation + module.eps if module.eps else deviation + 2.0**-23).sqrt()
    if isinstance(module, nn.RMSNorm):
        r = 1 / (wide.square().mean(reduced, keepdim=True) + (module.eps or 2.0**-23)).sqrt()
    normal = wide.abs() * r + 1  # sizes of what is added and subtracted on the way to x^
    terms = weight * (normal + wide.abs().mean(reduced, keepdim=True) * r)
    off = (y.double() - exact_y).abs()
    assert bool((off <= half * exact_y.abs() + (1 + half) * ROUNDINGS * terms).all())

    g = weight * dy.double().abs()
    mean = (g * terms).mean(reduced, keepdim=True)
    inner = r * (g + g.mean(reduced, keepdim=True) + terms * mean) * (1 + normal)
    off = (got[0].double() - exact[0]).abs()
    assert bool((off <= half * exact[0].abs() + (1 + half) * ROUNDINGS * inner).all())

    rows = x.numel() // max(1, parameters[0].numel()) if parameters else 1
    for parameter, one, reference in zip(parameters, got[1:], exact[1:], strict=True):
        assert (one.dtype, one.shape) == (parameter.dtype, parameter.shape)
        sizes = (dy.double().abs() * terms).sum()
        slack = (rows + 32) * 2.0**-24 * sizes
        off = (one.double() - reference).abs()
        assert bool((off <= HALF_ULP[parameter.dtype] * reference.abs() + slack).all())


@pytest.mark.parametrize(
    "shape", [(1, 1), (5, 7), (3, 2, 64), (257,), (4, 4, 33), (0, 8), (2, 0, 8)]
)
@pytest.mark.parametrize("weights", ["fp32", "16-bit"])
@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("kind", KINDS)
def test_norms_of_rows_are_rounded_once(
    kind: str, dtype: torch.dtype, weights: str, shape: tuple[int, ...]
) -> None:
    """Layer and RMS norms with every kind of weights, in chunks of a few rows."""
    module = put_on(KINDS[kind](shape[-1]))
    if weights == "16-bit":
        module.to(dtype)
    with chunks_of(2 * shape[-1]):
        check(module, (torch.randn(shape) * 2 + 0.5).to(dtype), (-1,))


@pytest.mark.parametrize("shape", [(1, 8, 2), (5, 8, 3, 3), (2, 8, 33), (0, 8, 4, 4)])
@pytest.mark.parametrize("weights", ["fp32", "16-bit", "none"])
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_group_norms_are_rounded_once(
    dtype: torch.dtype, weights: str, shape: tuple[int, ...]
) -> None:
    """Statistics over the channels of a group, in chunks of two samples."""
    module = put_on(nn.GroupNorm(8, 8, affine=weights != "none"))
    if weights == "16-bit":
        module.to(dtype)
    x = (torch.randn(shape) * 2 + 0.5).to(dtype)
    with chunks_of(2 * x[:1].numel()):
        check(module, x, tuple(range(2, x.dim())))


def test_group_norms_of_several_channels_agree_with_fp64() -> None:
    """Also in channels-last memory, which the result has too."""
    module = put_on(nn.GroupNorm(2, 8))
    x = (torch.randn(3, 8, 5, 5) * 2 + 0.5).to(BF16).contiguous(memory_format=torch.channels_last)
    x.requires_grad_()
    y = module(x)
    dy = torch.randn(y.shape).to(BF16)
    exact_y, (exact_dx, *_) = in_fp64(module, x.detach(), dy)
    (dx,) = torch.autograd.grad(y, x, dy)

    assert y.is_contiguous(memory_format=torch.channels_last)
    for got, exact in ((y, exact_y), (dx, exact_dx)):
        bound = HALF_ULP[BF16] * exact.abs() + ROUNDINGS * 100
        assert bool(((got.double() - exact).abs() <= bound).all())


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_inputs_in_any_order_of_memory_are_taken(kind: str) -> None:
    """Transposed, sliced and expanded inputs, and gradients of a result that was transposed."""
    module = put_on(KINDS[kind](16))
    base = torch.randn(16, 6, 8).to(BF16)
    for x in (
        base.transpose(0, 2),
        base.permute(1, 2, 0),
        base.new_tensor(torch.randn(4, 32).tolist())[:, ::2],
        torch.randn(1, 16).to(BF16).expand(5, 16),
    ):
        check(module, x, (-1,))
    x = base.permute(1, 2, 0).detach().requires_grad_()
    (dx,) = torch.autograd.grad(module(x).transpose(0, 1).sum(), x)
    assert dx.shape == x.shape


def test_norms_over_several_dimensions_are_known() -> None:
    """A normalized_shape of two."""
    check(put_on(nn.LayerNorm((6, 8))), torch.randn(5, 6, 8).to(BF16), (-2, -1))
    check(put_on(nn.RMSNorm((6, 8), eps=1e-6)), torch.randn(6, 8).to(BF16), (-2, -1))


def saved(module: nn.Module, x: Tensor) -> list[tuple[torch.dtype, tuple[int, ...]]]:
    """List what autograd saves while the module runs, weights left out."""
    found: list[tuple[torch.dtype, tuple[int, ...]]] = []

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            found.append((tensor.dtype, tuple(tensor.shape)))
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        module(x)
    return found


@pytest.mark.parametrize("weights", [FP32, BF16])
@pytest.mark.parametrize(
    ("module", "shape", "statistics"),
    [
        (nn.LayerNorm(32), (4, 6, 32), [(24, 1), (24, 1)]),
        (nn.RMSNorm(32), (4, 6, 32), [(24, 1)]),
        (nn.GroupNorm(4, 32), (4, 32, 6), [(4, 4), (4, 4)]),
    ],
    ids=["layer", "rms", "group"],
)
def test_a_narrow_norm_saves_its_input_and_fp32_statistics_alone(
    module: nn.Module,
    shape: tuple[int, ...],
    statistics: list[tuple[int, ...]],
    weights: torch.dtype,
) -> None:
    """In 16 bits, the very tensor that it was given; also under autocast, which casts nothing."""
    module = put_on(module).to(weights)
    x = (torch.randn(shape, requires_grad=True) * 1.0).to(BF16)
    expected = [(BF16, shape), *((FP32, each) for each in statistics)]

    assert saved(module, x) == expected
    with torch.autocast("cpu", BF16):
        assert saved(module, x) == expected
    with forward_context(REHEARSED, "cpu"):
        assert saved(module, x) == expected


@pytest.mark.parametrize(
    ("module", "shape", "native"),
    [
        # (dtype, one of its sizes is a row's): what torch saves with bf16 weights on a CPU.
        (nn.LayerNorm(32), (4, 32), [(BF16, (4, 32)), (BF16, (4, 1)), (BF16, (4, 1))]),
        (nn.GroupNorm(4, 32), (4, 32, 6), [(BF16, (4, 32, 6)), (BF16, (4, 4)), (BF16, (4, 4))]),
    ],
    ids=["layer", "group"],
)
def test_torchs_own_norms_with_bf16_weights_keep_statistics_in_bf16(
    module: nn.Module, shape: tuple[int, ...], native: list[tuple[torch.dtype, tuple[int, ...]]]
) -> None:
    """What the lever is for on a CPU; if torch changes it, the page about it must change."""
    x = (torch.randn(shape, requires_grad=True) * 1.0).to(BF16)

    assert saved(module.to(BF16), x) == native


def test_torchs_own_batch_norms_with_fp32_weights_are_narrow_already() -> None:
    """A bf16 input, a bf16 result, and fp32 statistics: there is nothing for the lever to do."""
    module = nn.BatchNorm1d(32)
    x = (torch.randn(4, 32, requires_grad=True) * 1.0).to(BF16)

    assert saved(module, x) == [(BF16, (4, 32)), *[(FP32, (32,))] * 4]
    assert module(x).dtype == BF16


def test_torchs_own_rms_norm_keeps_two_fp32_tensors_of_the_input() -> None:
    """Its fp32 copy and the normalised numbers, on a CPU with bf16 weights."""
    x = (torch.randn(4, 32, requires_grad=True) * 1.0).to(BF16)
    found = saved(nn.RMSNorm(32).to(BF16), x)

    assert found.count((FP32, (4, 32))) == 3  # the copy is saved by two operations
    assert (BF16, (4, 32)) not in found


@pytest.mark.parametrize(
    ("context", "given", "result"),
    [
        ("none", BF16, BF16),
        ("none", FP16, FP16),
        ("none", FP32, FP32),
        ("native", FP32, BF16),
        ("native", BF16, BF16),
        ("cuda", FP32, BF16),
        ("cuda", BF16, BF16),
    ],
)
def test_the_result_is_in_the_format_that_is_computed_in(
    context: str, given: torch.dtype, result: torch.dtype
) -> None:
    """Autocast's dtype under autocast, whoever's rules; else the input's own; fp32 stays fp32."""
    module = put_on(nn.LayerNorm(8))
    policy = {"none": POLICIES["fp32"], "native": POLICIES["bf16"], "cuda": REHEARSED}[context]
    with forward_context(policy, "cpu"):
        y = module(torch.randn(3, 8).to(given))
        inside = torch.is_autocast_enabled("cpu")

    assert y.dtype == result
    assert inside == policy.autocasts  # as it was


def test_the_gradient_under_autocast_reaches_fp32_weights_in_fp32() -> None:
    """An fp32 residual stream is saved as it is, and gets its gradient in fp32."""
    module = put_on(nn.LayerNorm(8))
    x = torch.randn(3, 8, requires_grad=True)
    with torch.autocast("cpu", BF16):
        y = module(x)
    dx, dw, db = torch.autograd.grad(y.float().square().sum(), [x, *module.parameters()])

    assert [g.dtype for g in (dx, dw, db)] == [FP32] * 3


def test_an_evaluation_in_full_precision_goes_torchs_own_way() -> None:
    """Widened weights and fp32 inputs: the bits of the model without the lever."""
    policy = POLICIES["bf16-true"]
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.RMSNorm(8))
    prepare_model(model, policy, "cpu")
    x = torch.randn(3, 8)
    with torch.no_grad(), full_precision(model):
        expected = model(x)
        apply_rules(model, RULES, policy)
        got = model(x)
    remove_rules(model)

    assert got.dtype == FP32
    assert torch.equal(expected, got)


def test_an_evaluation_in_the_training_precision_computes_as_training_does() -> None:
    """The lever changes what is computed, and so acts without gradients as well."""
    module = put_on(nn.LayerNorm(64))
    x = torch.randn(5, 64).to(BF16)
    with torch.no_grad():
        evaluated = module.eval()(x)

    assert torch.equal(evaluated, module.train()(x.requires_grad_()).detach())


def test_a_narrow_norm_under_compression_has_its_input_packed() -> None:
    """Levers see it by name, as they see torch's own norms."""
    norm = nn.LayerNorm(128)
    model = nn.Sequential(nn.Linear(128, 128), norm)
    rules = (*RULES, ActivationRule(modules="1", lever="int8"))
    apply_rules(model, rules, POLICIES["fp32"])
    x = torch.randn(64, 128)
    with torch.autocast("cpu", BF16):
        model(x).sum().backward()

    assert rounding_state(model)["drawn"] == 1


class SquareRoot(nn.Module):
    """An RMS norm as models write it themselves, such as T5, Llama and Mistral."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.variance_epsilon = 1e-6

    def forward(self, hidden_states: Tensor) -> Tensor:
        wide = hidden_states.to(FP32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * wide.to(hidden_states.dtype)


class OwnRMSNorm(SquareRoot):
    pass


class OffsetRMSNorm(SquareRoot):
    """As Gemma has it: 1 is added to the weight."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states) * (1 + 1 / self.weight)


class LayerNorm2d(nn.LayerNorm):
    """As ConvNeXt has it: over the channels of images."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class RenamedLayerNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)


@pytest.mark.parametrize("made", [OwnRMSNorm, RenamedLayerNorm])
def test_a_norm_that_computes_as_one_that_is_known_is_taken(
    made: Callable[[int], nn.Module],
) -> None:
    """It is asked for an example, and saves what a narrow norm saves."""
    module = put_on(made(32))
    x = (torch.randn(4, 32, requires_grad=True) * 1.0).to(BF16)
    statistics = 1 if made is OwnRMSNorm else 2

    assert saved(module, x) == [(BF16, (4, 32)), *[(FP32, (4, 1))] * statistics]


@pytest.mark.parametrize("made", [OffsetRMSNorm, LayerNorm2d])
def test_a_norm_that_computes_otherwise_is_refused(made: Callable[[int], nn.Module]) -> None:
    """Its class is named: a lever must not change what is computed."""
    with pytest.raises(UsageError, match=f"{made.__name__} compute in a way of their own"):  # type: ignore[attr-defined]
        apply_rules(nn.Sequential(made(32)), RULES, POLICIES["fp32"])


def called(module: nn.Module, x: Tensor) -> list[str]:
    """Return the names of the torch functions that a norm under the lever calls."""
    seen: list[str] = []

    class Names(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            seen.append(getattr(func, "__name__", ""))
            return func(*args, **(kwargs or {}))

    module(x)  # the first call finds out, and is not counted
    with Names():
        module(x)
    return [name for name in seen if name.endswith("norm")]


@pytest.mark.parametrize(
    ("made", "on_cuda"),
    [
        (lambda: nn.LayerNorm(64, dtype=BF16), "layer_norm"),
        (lambda: nn.LayerNorm(64, elementwise_affine=False), "layer_norm"),
        (lambda: nn.RMSNorm(64, dtype=BF16), "rms_norm"),
        (lambda: nn.GroupNorm(4, 64, dtype=BF16), "narrow_norm"),
    ],
)
def test_torchs_own_kernel_is_taken_where_it_is_as_narrow(
    made: Callable[[], nn.Module], on_cuda: str
) -> None:
    """CUDA's kernels for rows keep fp32 statistics of bf16 weights; a CPU's do not."""
    with FakeTensorMode():
        norm = put_on(made())
        with cuda_kernels(gpu_named("h200")):
            emulated = called(norm, torch.zeros(8, 64, dtype=BF16, requires_grad=True))
    norm = put_on(made())

    assert emulated == [on_cuda]
    assert called(norm, torch.zeros(8, 64, dtype=BF16, requires_grad=True)) == ["narrow_norm"]


@pytest.mark.parametrize("grad", [False, True])
def test_weights_of_another_format_are_never_left_to_torch(grad: bool) -> None:
    """Kernels of CUDA do not take fp32 weights beside 16-bit inputs."""
    norm = put_on(nn.LayerNorm(64))
    with torch.set_grad_enabled(grad):
        names = called(norm, torch.zeros(8, 64, dtype=BF16))

    assert names == ["narrow_norm"]
