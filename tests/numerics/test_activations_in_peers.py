"""Levers on models that others wrote: transformers' and timm's own modules, small."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from narrowcast.activations.rules import apply_rules, rounding_state, unused_levers
from narrowcast.plan import ActivationRule
from narrowcast.policy import POLICIES, Policy
from narrowcast.precision.cast import backward_context, forward_context
from recipes import torchvision_on_cpu  # noqa: F401 -- both peers import torchvision

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # of the peers' own making
]
REHEARSED = Policy(name="bf16", compute="bf16", autocast_rules="cuda")
SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "vocab_size": 100,
}
MIXTURE = {**SIZES, "num_key_value_heads": 4, "num_local_experts": 4}
Peer = tuple[nn.Module, Callable[[nn.Module], Tensor]]


def language_model(name: str, **sizes: Any) -> Peer:
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{name.removesuffix('ForCausalLM')}Config")
    tokens = torch.randint(0, 100, (2, 32))
    model = getattr(transformers, name)(config(**(sizes or SIZES)))
    return model, lambda m: m(input_ids=tokens, labels=tokens).loss


def vision_model(name: str, size: int, **options: Any) -> Peer:
    timm = pytest.importorskip("timm")
    images = torch.randn(4, 3, size, size)
    return timm.create_model(name, num_classes=10, **options), lambda m: m(images).square().mean()


PEERS: dict[str, Callable[[], Peer]] = {
    "llama": lambda: language_model("LlamaForCausalLM"),
    "mixtral": lambda: language_model("MixtralForCausalLM", **MIXTURE),
    "vit": lambda: vision_model("vit_tiny_patch16_224", 32, img_size=32, depth=3),
    "resnet": lambda: vision_model("resnet18", 64),
}


def gradients(peer: Peer, lever: str | None, policy: Policy, modules: str) -> dict[str, Tensor]:
    """Return the gradients of one step from a fresh copy, its loss and buffers."""
    model, loss_of = copy.deepcopy(peer[0]).train(), peer[1]
    rules: list[ActivationRule] = []
    for each in lever.split(" in ") if lever is not None else ():
        where = "*" if each == "remake" else modules
        rules.append(ActivationRule(modules=where, lever=each))  # type: ignore[arg-type]
    apply_rules(model, rules, policy)
    torch.manual_seed(1)
    with forward_context(policy, "cpu"):
        loss = loss_of(model)
    with backward_context(policy, "cpu"):
        loss.backward()
    assert unused_levers(model) == {}
    assert lever != "int8" or rounding_state(model)["drawn"] > 0
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return found | dict(model.named_buffers()) | {"loss": loss.detach()}


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Return the size of the difference of all gradients, as a part of their size."""
    off = sum((one[n].double() - other[n].double()).square().sum() for n in one)
    return float((off / sum(each.double().square().sum() for each in one.values())) ** 0.5)


@pytest.mark.parametrize("policy", [POLICIES["fp32"], REHEARSED], ids=["fp32", "rehearsed"])
@pytest.mark.parametrize("peer", PEERS)
def test_checkpointed_blocks_give_the_same_bits(peer: str, policy: Policy) -> None:
    """Attention with caches and masks as keywords, routed experts, batch norms."""
    made = PEERS[peer]()
    expected = gradients(made, None, policy, "auto")
    got = gradients(made, "checkpoint", policy, "auto")

    assert expected.keys() == got.keys()
    assert [name for name in got if not torch.equal(expected[name], got[name])] == []


@pytest.mark.parametrize("policy", [POLICIES["fp32"], REHEARSED], ids=["fp32", "rehearsed"])
@pytest.mark.parametrize("lever", ["remake", "remake in checkpoint"])
@pytest.mark.parametrize("peer", PEERS)
def test_remade_results_give_the_same_bits(peer: str, lever: str, policy: Policy) -> None:
    """Norms of their own, gated MLPs, routed experts, ReLUs in place."""
    made = PEERS[peer]()
    expected = gradients(made, None, policy, "auto")
    got = gradients(made, lever, policy, "auto")

    assert expected.keys() == got.keys()
    assert [name for name in got if not torch.equal(expected[name], got[name])] == []


@pytest.mark.parametrize("peer", PEERS)
def test_compressed_blocks_give_nearly_the_same_gradient(peer: str) -> None:
    """Within 5 %: a step is at most 1.6 % of the largest of 128 numbers, and errors average out."""
    made = PEERS[peer]()
    expected = gradients(made, None, POLICIES["fp32"], "auto")

    assert 0 < distance(expected, gradients(made, "int8", POLICIES["fp32"], "auto")) < 0.05


@pytest.mark.parametrize(("peer", "norms"), [("llama", 5), ("vit", 7)])
def test_norms_of_peers_are_known(peer: str, norms: int) -> None:
    """Llama's own RMS norm too; the gradient moves by bf16's roundings (2^-8) and no more."""
    made = PEERS[peer]()
    model = copy.deepcopy(made[0])
    rule = ActivationRule(modules="*", lever="narrow_norm")
    applied = apply_rules(model, [rule], POLICIES["bf16"])
    expected = gradients(made, None, POLICIES["bf16"], "*")

    assert len(applied.rules[0].modules) == norms
    assert distance(expected, gradients(made, "narrow_norm", POLICIES["bf16"], "*")) < 2.0**-6
