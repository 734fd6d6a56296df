"""The Triton kernel in Triton's interpreter, on the CPU, against the reference step.

torch's square root on the CPU is off by an ulp for a fifth of all numbers (it is MKL's), the
kernel's is correctly rounded. So the kernel is held against rules written in fp64 where it matters:
bit for bit, with codes, scales, remainders and noise. Against the real rules there is a bound.
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from narrowcast.kernels.launch import BLOCK
from narrowcast.kernels.steps import advance
from narrowcast.optim import dispatch, narrow
from narrowcast.optim.adamw import ADAMW
from narrowcast.optim.dispatch import advance_by_kernels
from narrowcast.optim.lion import LION
from narrowcast.optim.narrow import NarrowOptimizer
from narrowcast.optim.release import GradientRelease
from narrowcast.optim.rule import Rule
from narrowcast.optim.sgd import SGD_RULE
from narrowcast.optim.states import SMALL
from narrowcast.optim.step import update
from optim_cases import RULES, give_gradients, held, same_bits

triton = pytest.importorskip("triton", reason="Triton is not installed (pip install triton)")
FUSES = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(
    not INTERPRETED, reason="runs in a process with TRITON_INTERPRET=1, started by the first test"
)

# Round the ranges of a program, the blocks of codes and what counts as small.
SHAPES: tuple[tuple[int, ...], ...] = ((0,), (), (BLOCK - 1,), (BLOCK + 1,), (SMALL + 31, 1))
# Each program takes the interpreter 50 ms: one rule on all stores, the others on one of each.
STORES = [
    ("AdamW", weights, states)
    for weights in ("fp32", "split16", "split8", "stochastic")
    for states in ("fp32", "bf16", "int8", "int4")
] + [
    (rule, weights, states)
    for rule in ("SGD", "Lion")
    for weights, states in (("fp32", "bf16"), ("split16", "int8"), ("split8", "int4"))
]


@pytest.mark.slow
def test_the_kernel_agrees_with_the_reference_in_the_interpreter() -> None:
    """Run this file where kernels are interpreted: the switch is read when Triton is imported."""
    if INTERPRETED:
        pytest.skip("this is that process")
    path = Path(__file__)
    out = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", str(path)],
        cwd=path.parents[2],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )

    assert out.returncode == 0, out.stdout[-3000:]
    assert " passed" in out.stdout


def fma(left: Tensor, right: Tensor | float, addend: Tensor) -> Tensor:
    """Round once, as the interpreter does from Triton 3.9 on; before, it rounds the product too."""
    if isinstance(right, float):
        right = torch.tensor(right)
    if not FUSES:
        return left * right + addend
    return (left.double() * right.double() + addend.double()).float()


def lerp(left: Tensor, right: Tensor, share: float) -> Tensor:
    return fma(right - left, share, left)


class Exact(Rule):
    """A rule whose square roots and fused operations are correctly rounded."""

    def __init__(self, rule: Rule) -> None:
        self.rule = rule
        self.name = rule.name

    def moments(self, group: Any) -> Any:
        return self.rule.moments(group)

    def coefficients(self, group: Any, step: int, *, is_fresh: bool) -> Any:
        return self.rule.coefficients(group, step, is_fresh=is_fresh)

    def require_sound(self, group: Any) -> None:
        self.rule.require_sound(group)

    def update(
        self, weight: Tensor, gradient: Tensor, moments: Sequence[Tensor], coefficients: Any
    ) -> None:
        if self.rule is ADAMW:
            decay, share1, beta2, share2, correction, eps, negative_step = coefficients
            mean, square = moments
            mean.copy_(lerp(mean, gradient, share1))
            square.copy_(fma(gradient * share2, gradient, square * beta2))
            denominator = square.double().sqrt().float() / correction + eps
            weight.copy_(weight * decay + (mean * negative_step) / denominator)
        elif self.rule is SGD_RULE:
            decay, momentum, share, nesterov, is_fresh, negative_lr = coefficients
            gradient = fma(weight, decay, gradient) if decay else gradient
            if moments:
                (buffer,) = moments
                buffer.copy_(gradient if is_fresh else fma(gradient, share, buffer * momentum))
                gradient = fma(buffer, momentum, gradient) if nesterov else buffer
            weight.copy_(fma(gradient, negative_lr, weight))
        else:
            assert self.rule is LION
            decay, share1, share2, negative_lr = coefficients
            (mean,) = moments
            direction = lerp(mean, gradient, share1).sign()
            weight.copy_(fma(direction, negative_lr, weight * decay))
            mean.copy_(lerp(mean, gradient, share2))


def pair(
    rule: str, weights: str, states: str, **more: Any
) -> tuple[NarrowOptimizer, NarrowOptimizer]:
    make, options = RULES[rule]
    generator = torch.Generator().manual_seed(0)
    owned = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]
    optimizer = make(owned, **{**options, **more}, weights=weights, states=states)
    return optimizer, copy.deepcopy(optimizer)


def step_both(left: NarrowOptimizer, right: NarrowOptimizer, steps: int, *, fused: bool) -> None:
    """Step the first with the kernel, the second with the reference on the same numbers."""
    reference = left.rule if fused else Exact(left.rule)
    for step in range(steps):
        for optimizer in (left, right):
            give_gradients(optimizer.param_groups[0]["params"], step)
        with torch.no_grad():
            chosen = set(left.param_groups[0]["params"])
            advance_by_kernels(left.rule, left._items(chosen))
            update(reference, list(right._items(set(right.param_groups[0]["params"]))))


@interpreted
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of lanes that are masked
@pytest.mark.parametrize(("rule", "weights", "states"), STORES)
def test_the_kernel_is_the_reference_bit_for_bit(rule: str, weights: str, states: str) -> None:
    """Two steps: weights, remainders, codes and scales, for every rule and store."""
    left, right = pair(rule, weights, states)
    step_both(left, right, 2, fused=False)

    assert same_bits(held(left), held(right))


@interpreted
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(
    ("rule", "more"),
    [
        ("SGD", {"momentum": 0.0}),
        ("SGD", {"nesterov": True}),
        ("SGD", {"weight_decay": 0.0, "dampening": 0.5, "maximize": True}),
        ("AdamW", {"weight_decay": 0.0, "maximize": True}),
        ("Lion", {"weight_decay": 0.0, "maximize": True}),
    ],
)
def test_options_of_the_rules(rule: str, more: dict[str, Any]) -> None:
    """Bit for bit as well."""
    left, right = pair(rule, "split16", "int8", **more)
    step_both(left, right, 2, fused=False)

    assert same_bits(held(left), held(right))


@interpreted
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("rule", ["AdamW", "SGD"])
def test_against_the_real_rules_the_difference_is_rounding(rule: str) -> None:
    """Roots differ by an ulp, older interpreters round products: at most 8 ulps of an update.

    An update of AdamW is below lr, one of SGD below lr times the largest gradient's sum (5 each).
    """
    left, right = pair(rule, "fp32", "fp32")
    step_both(left, right, 3, fused=True)
    largest = {"AdamW": 1.0, "SGD": 15.0}[rule] * 1e-2

    for mine, other in zip(
        left.param_groups[0]["params"], right.param_groups[0]["params"], strict=True
    ):
        bound = 3 * (8 * 2.0**-23 * largest + 2.0**-24 * other.detach().abs())
        assert ((mine.detach() - other.detach()).abs() <= bound).all()


@interpreted
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_noise_goes_on_from_tile_to_tile() -> None:
    """A tensor longer than a tile of noise, which has a key of its own."""
    make, options = RULES["AdamW"]
    left = make([nn.Parameter(torch.randn(66_000))], **options, weights="split8", states="int4")
    right = copy.deepcopy(left)
    step_both(left, right, 1, fused=False)

    assert same_bits(held(left), held(right))


@interpreted
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("flag", [True, False])
def test_a_flag_decides_on_the_device(flag: bool) -> None:
    """False: not a bit changes, in any tensor. True: as without a flag."""
    left, right = pair("AdamW", "split8", "int4")
    step_both(left, right, 1, fused=False)
    before = held(left)
    for optimizer in (left, right):
        give_gradients(optimizer.param_groups[0]["params"], 1)
    with torch.no_grad():
        chosen = set(left.param_groups[0]["params"])
        advance_by_kernels(left.rule, left._items(chosen), torch.tensor(flag))
        update(Exact(right.rule), list(right._items(set(right.param_groups[0]["params"]))))

    assert same_bits(held(left), held(right) if flag else before)


@interpreted
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("states", ["fp32", "int4"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 3.4e38, 1e-41])
def test_extreme_gradients(states: str, bad: float) -> None:
    """NaN, infinities and subnormals end in the same bits, or in NaN on both sides."""
    left, right = pair("AdamW", "split16", states)
    for optimizer in (left, right):
        give_gradients(optimizer.param_groups[0]["params"], 0)
        for parameter in optimizer.param_groups[0]["params"]:
            parameter.grad.flatten()[::7] = bad
    with torch.no_grad():
        for optimizer, go in ((left, advance_by_kernels), (right, update)):
            rule = optimizer.rule if optimizer is left else Exact(right.rule)
            go(rule, list(optimizer._items(set(optimizer.param_groups[0]["params"]))))

    for a, b in zip(held(left), held(right), strict=True):
        equal = torch.equal(a, b) or torch.equal(a.isnan(), b.isnan())
        assert equal if a.is_floating_point() else torch.equal(a, b)


@interpreted
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_repeated_step_is_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is kept from step to step gives the same bits as looking at everything anew.

    With a learning rate that changes, a parameter without gradient, a state that is loaded, a
    tensor that is replaced, and a group that is added.
    """
    monkeypatch.setattr(dispatch, "_has_kernel", lambda _rule, _parameter: True)
    left, right = pair("AdamW", "split16", "int8")
    repeated = []
    original = dispatch.repeat
    monkeypatch.setattr(narrow, "repeat", lambda *a: repeated.append(original(*a)) or repeated[-1])
    for step in range(9):
        for optimizer in (left, right):
            owned = [p for group in optimizer.param_groups for p in group["params"]]
            give_gradients(owned, step)
            optimizer.param_groups[0]["lr"] = 1e-2 / (step + 1)
            if step == 3:
                owned[2].grad = None
            if step == 5:
                optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            if step == 6:
                owned[3].data = owned[3].data.clone()
            if step == 7:
                generator = torch.Generator().manual_seed(7)
                added = nn.Parameter(torch.randn(9, generator=generator))
                optimizer.add_param_group({"params": [added]})
                give_gradients([added], step)
        right._plan = None
        left.step()
        right.step()

    assert same_bits(held(left), held(right))
    assert [left.state[p]["step"] for p in left.param_groups[0]["params"][1:3]] == [9, 8]
    assert True in repeated
    assert False in repeated


@interpreted
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_released_gradients_are_judged_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A NaN steps nothing and is counted back when the iteration ends; the others step."""
    monkeypatch.setattr(dispatch, "_has_kernel", lambda _rule, _parameter: True)
    make, options = RULES["AdamW"]
    first, second = nn.Parameter(torch.ones(50)), nn.Parameter(torch.ones(50))
    optimizer = make([first, second], **options, weights="split16")
    release = GradientRelease(optimizer)
    (first.float().sum() * float("nan") + second.float().sum()).backward()
    optimizer.step()

    assert release.skipped == (first,)
    assert torch.equal(first.detach().float(), torch.ones(50))
    assert not torch.equal(second.detach().float(), torch.ones(50))
    assert list(optimizer.state[first]) == ["remainder"]
    assert optimizer.state[second]["step"] == 1


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    ("rule", "weights", "states"),
    [
        ("AdamW", "split16", "int8"),
        ("AdamW", "split8", "int4"),
        ("SGD", "stochastic", "bf16"),
        ("Lion", "fp32", "fp32"),
    ],
)
def test_the_kernel_compiles_for_gpus_that_are_not_here(
    rule: str, weights: str, states: str, capability: int
) -> None:
    """To PTX for A100 and H100, with whole ranges moved 16 bytes at a time."""
    constants = {
        "RULE": rule,
        "WEIGHTS": weights,
        "STATES": states,
        "HAS_MOMENT": True,
        "GRADIENT": "bf16",
        "MAXIMIZE": False,
        "HAS_FLAG": False,
        "ALIGNED": True,
        "COLUMNS": 9,
        "BLOCK": BLOCK,
    }
    signature = {
        "table": "*i64",
        "owners": "*i32",
        "gradients": "*i64",
        "flag": "*i32",
        "base": "i32",
        **{f"c{i}": "fp32" for i in range(7)},
        **dict.fromkeys(constants, "constexpr"),
    }
    source = triton.compiler.ASTSource(
        fn=advance,
        signature=signature,
        constexprs={(advance.arg_names.index(k),): v for k, v in constants.items()},
    )
    target = triton.backends.compiler.GPUTarget("cuda", capability, 32)
    options = {"num_warps": 8, "enable_fp_fusion": False}
    code = triton.compile(source, target=target, options=options).asm["ptx"]

    assert "ld.global.v4.b32" in code
    assert "st.global.v4.b32" in code
    assert "fma.rn.f32" in code  # asked for by name, in spite of contraction being off
    assert "sqrt.approx" not in code
