"""Activation levers on CUDA: the same bits where they are exact, and fewer bytes."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from narrowcast.activations.packing import PACKINGS
from narrowcast.activations.rounding_stream import RoundingStream
from narrowcast.activations.rules import apply_rules, rounding_state
from narrowcast.memory.measure import MemoryLedger
from narrowcast.plan import ActivationRule
from narrowcast.policy import POLICIES, Policy
from narrowcast.precision.cast import forward_context, prepare_model

pytestmark = pytest.mark.gpu
BF16, FP32 = torch.bfloat16, torch.float32
POLICY = POLICIES["bf16"]
ROWS, WIDTH = 4096, 256
STEPS = 3


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(
            nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Dropout(0.1), nn.Linear(4 * WIDTH, WIDTH)
        )

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(self.norm(x)).chunk(3, dim=-1)
        q, k, v = (part.unflatten(-1, (4, -1)).transpose(1, 2) for part in parts)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.mlp(x)  # type: ignore[no-any-return]


def transformer() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(WIDTH, WIDTH), nn.Sequential(Block(), Block(), Block(), Block(), Block(), Block())
    )


def trained(
    rules: tuple[ActivationRule, ...], policy: Policy = POLICY, steps: int = STEPS
) -> dict[str, Tensor]:
    """Return gradients after some steps on one batch, with and without which the weights move."""
    model = transformer()
    prepare_model(model, policy, "cuda")
    apply_rules(model, rules, policy)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    torch.manual_seed(1)
    x = torch.randn(8, ROWS // 8, WIDTH, device="cuda")
    for _ in range(steps):
        optimizer.zero_grad()
        with forward_context(policy, "cuda"):
            loss = model(x).float().square().mean()
        loss.backward()
        optimizer.step()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def rule(lever: str, modules: str = "auto") -> ActivationRule:
    return ActivationRule(modules=modules, lever=lever)  # type: ignore[arg-type]


@pytest.mark.parametrize("policy", [POLICY, POLICIES["bf16-true"], POLICIES["fp16"]])
@pytest.mark.parametrize(
    "rules",
    [
        (rule("checkpoint"),),
        (rule("offload"),),
        (rule("offload"), rule("checkpoint")),
        (rule("remake", "*"),),
        (rule("remake", "*"), rule("checkpoint")),
        (rule("remake"), rule("offload")),
    ],
    ids=["checkpoint", "offload", "both", "remake", "remake in checkpoint", "remake, offload"],
)
def test_exact_levers_give_the_same_bits(rules: tuple[ActivationRule, ...], policy: Policy) -> None:
    """Autocast, dropout and flash attention included; three steps, so that memory is reused."""
    if any(each.lever == "offload" for each in rules):
        # Run twice: copies that were not waited for would show as differences now and then.
        for _ in range(2):
            assert_same(trained((), policy), trained(rules, policy))
    assert_same(trained((), policy), trained(rules, policy))


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("policy", [POLICY, POLICIES["bf16-true"]])
def test_batch_norms_are_remade_with_the_same_bits(
    policy: Policy, memory_format: torch.memory_format
) -> None:
    """cuDNN's kernel or torch's own, with algorithms of convolutions that repeat their bits."""

    def gradients(rules: tuple[ActivationRule, ...]) -> dict[str, Tensor]:
        torch.manual_seed(0)
        layers = [nn.Conv2d(3, 32, 3, padding=1)]
        for _ in range(3):
            layers += [nn.BatchNorm2d(32), nn.ReLU(inplace=True), nn.Conv2d(32, 32, 3, padding=1)]
        model = nn.Sequential(*layers).to(memory_format=memory_format)
        prepare_model(model, policy, "cuda")
        apply_rules(model, rules, policy)
        x = torch.randn(16, 3, 32, 32, device="cuda").to(memory_format=memory_format)
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True):
            with forward_context(policy, "cuda"):
                loss = model(x).float().square().mean()
            loss.backward()
        found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        return found | dict(model.named_buffers())

    assert_same(gradients(()), gradients((rule("remake", "*"),)))


def peak(rules: tuple[ActivationRule, ...]) -> int:
    """Return what the second of two steps allocates at its peak, beside weights and gradients."""
    model = transformer()
    prepare_model(model, POLICY, "cuda")
    apply_rules(model, rules, POLICY)
    x = torch.randn(8, ROWS // 8, WIDTH, device="cuda")
    for _ in range(2):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with forward_context(POLICY, "cuda"):
            loss = model(x).float().square().mean()
        loss.backward()
        for parameter in model.parameters():
            parameter.grad = None
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize(
    ("lever", "at_most"), [("checkpoint", 0.5), ("offload", 0.6), ("int8", 0.75), ("e4m3", 0.75)]
)
def test_each_lever_lowers_the_peak(lever: str, at_most: float) -> None:
    """Six blocks: bounds that leave room for what one block and the lever itself need."""
    assert peak((rule(lever),)) < at_most * peak(())


@pytest.mark.parametrize("name", PACKINGS)
@pytest.mark.parametrize("dtype", [FP32, BF16, torch.float16])
def test_packing_on_cuda_keeps_within_a_step_of_the_cpus(name: str, dtype: torch.dtype) -> None:
    """Both round to neighbours of the same grid; what the format holds is exact on both."""
    packing = PACKINGS[name]
    x = torch.randn(2**20 + 129).to(dtype)
    stream = RoundingStream(0)
    on_cpu, on_cuda = (
        packing.unpack(packing.pack(y, stream.next(y.device)), y.numel(), dtype)
        for y in (x, x.cuda())
    )
    again = packing.unpack(packing.pack(on_cuda, stream.next(on_cuda.device)), x.numel(), dtype)
    step = (on_cpu.double() - on_cuda.cpu().double()).abs()
    largest = torch.nn.functional.pad(x.double().abs(), (0, -x.numel() % 128)).view(-1, 128)
    bound = largest.amax(1, keepdim=True).expand(-1, 128).reshape(-1)[: x.numel()]

    assert on_cuda.dtype == dtype
    assert bool((step <= bound * (2 / 63.5 if name == "int8" else 1 / 8)).all())
    assert torch.equal(again, on_cuda)


def test_rounding_on_cuda_is_right_in_the_mean() -> None:
    """4,096 roundings of 512 numbers, each mean within 6 standard errors (1e-6 a test)."""
    packing, stream = PACKINGS["int8"], RoundingStream(0)
    x = torch.randn(512, device="cuda").to(BF16)
    total = torch.zeros(512, device="cuda", dtype=torch.float64)
    for _ in range(4096):
        total += packing.unpack(packing.pack(x, stream.next(x.device)), 512, BF16).double()
    groups = x.double().abs().view(4, 128)
    step = torch.exp2((groups.amax(1, keepdim=True) / 127).log2().ceil())
    bound = (6 * 0.5 / 64 + 2.0**-24) * step

    assert bool(((total / 4096 - x.double()).view(4, 128).abs() <= bound).all())


@pytest.mark.parametrize("lever", ["int8", "e4m3"])
def test_compression_leaves_the_cuda_generator_alone_and_repeats_from_its_state(lever: str) -> None:
    """Dropout draws what it would have drawn; equal seeds give equal bits."""
    plain, first, second = trained((), steps=1), *(trained((rule(lever),), steps=1) for _ in "ab")

    assert_same(first, second)
    worst = max(((plain[n] - first[n]).norm() / plain[n].norm()).item() for n in plain)
    assert 0 < worst < 0.2


def test_compressed_blocks_pack_on_this_version_of_torch() -> None:
    """Saved tensors come with their graph to the hooks; without it nothing would be packed."""
    model = transformer().cuda()
    apply_rules(model, [rule("int8")], POLICY)
    model(torch.randn(8, ROWS // 8, WIDTH, device="cuda")).sum().backward()

    # Of each block the norm's input and result, q, k, v, what attention returned, the MLP's input,
    # GELU's, and the input of the last layer; the dropout's mask is kept.
    assert rounding_state(model)["drawn"] == 6 * 9


NORMS: dict[str, Callable[[], nn.Module]] = {
    "layer": lambda: nn.LayerNorm(WIDTH),
    "rms": lambda: nn.RMSNorm(WIDTH, eps=1e-5),
    "group": lambda: nn.GroupNorm(8, WIDTH),
}


@pytest.mark.parametrize("weights", [FP32, BF16])
@pytest.mark.parametrize("kind", NORMS)
def test_narrow_norms_on_cuda_agree_with_fp64(kind: str, weights: torch.dtype) -> None:
    """Half an ulp of bf16 and the fp32 arithmetic inside."""
    module = NORMS[kind]().cuda().to(weights)
    x = (torch.randn(64, WIDTH, 8 if kind == "group" else WIDTH, device="cuda") * 2 + 0.5).to(BF16)
    wide = copy.deepcopy(module).double()
    exact = wide(x.double())
    apply_rules(nn.Sequential(module), [rule("narrow_norm", "*")], POLICY)
    y = module(x)

    assert y.dtype == BF16
    bound = 2.0**-8 * exact.abs() + 32 * 2.0**-24 * 20
    assert bool(((y.double() - exact).abs() <= bound).all())


def test_a_narrow_norm_under_autocast_keeps_bf16_where_cuda_keeps_fp32() -> None:
    """The ledger counts what each holds of one bf16 input: half, and a little for statistics."""

    def held(rules: tuple[ActivationRule, ...]) -> int:
        model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 8))
        model.cuda()
        apply_rules(model, rules, POLICY)
        x = torch.randn(ROWS, WIDTH, device="cuda")
        with MemoryLedger(model) as ledger:
            ledger.inputs(x)
            with forward_context(POLICY, "cuda"):
                loss = model(x).float().sum()
            loss.backward()
        return ledger.first_lines("backward")["activations"]

    one = ROWS * WIDTH
    # autocast: the bf16 batch, the fp32 copy of the norm's input, the bf16 cast of its result.
    assert held(()) >= (2 + 4 + 2) * one
    assert held((rule("narrow_norm", "1"),)) <= (2 + 2 + 2) * one + 2 * 4 * ROWS
