"""Facts about putting levers on modules: which match, which exclude each other, and taking off."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from narrowcast.activations.forward import levered
from narrowcast.activations.rules import (
    apply_rules,
    load_rounding_state,
    remove_rules,
    rounding_state,
)
from narrowcast.errors import UsageError
from narrowcast.plan import LEVERS, ActivationRule
from narrowcast.policy import POLICIES
from narrowcast.precision.cast import prepare_model

FP32, BF16 = POLICIES["fp32"], POLICIES["bf16"]


class MLP(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(64)
        self.mlp = MLP()

    def forward(self, x: Tensor, shift: float = 0.0) -> Tensor:
        """Return what a block makes of x."""
        return x + self.mlp(self.norm(x)) + shift  # type: ignore[no-any-return]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.norm = nn.LayerNorm(64)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.norm(x)  # type: ignore[no-any-return]


def rule(modules: str, lever: str) -> ActivationRule:
    return ActivationRule(modules=modules, lever=lever)  # type: ignore[arg-type]


def placed(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Map the names of levered modules to their levers, outermost first."""
    return {
        name: tuple(lever.name for lever in forward.levers)
        for name, module in model.named_modules()
        if (forward := levered(module)) is not None
    }


@pytest.mark.parametrize(
    ("modules", "lever", "matched"),
    [
        ("auto", "checkpoint", ["blocks.0", "blocks.1", "blocks.2"]),
        ("blocks.*", "checkpoint", ["blocks.0", "blocks.1", "blocks.2"]),
        ("blocks*", "int8", ["blocks.0", "blocks.1", "blocks.2"]),
        ("blocks.[12].mlp", "e4m3", ["blocks.1.mlp", "blocks.2.mlp"]),
        ("*.mlp*", "checkpoint", ["blocks.0.mlp", "blocks.1.mlp", "blocks.2.mlp"]),
        ("*", "int8", [""]),
        ("*", "remake", [""]),
        ("blocks.1", "remake", ["blocks.1"]),
        ("blocks.1", "narrow_norm", ["blocks.1.norm"]),
        ("*", "narrow_norm", ["blocks.0.norm", "blocks.1.norm", "blocks.2.norm", "norm"]),
    ],
)
def test_a_rule_takes_the_outermost_modules_that_match(
    modules: str, lever: str, matched: list[str]
) -> None:
    """What is inside is covered by them; norms are looked for inside; all are named."""
    model = Net()
    applied = apply_rules(model, [rule(modules, lever)], FP32)

    assert [(r.rule, list(r.modules)) for r in applied.rules] == [(rule(modules, lever), matched)]
    assert placed(model) == dict.fromkeys(matched, (lever,))


def test_a_second_call_replaces_the_first() -> None:
    """Rules do not pile up, and none is left of the first."""
    model = Net()
    apply_rules(model, [rule("auto", "checkpoint"), rule("*", "narrow_norm")], FP32)
    apply_rules(model, [rule("blocks.0", "int8")], FP32)
    apply_rules(model, [rule("blocks.0", "int8")], FP32)

    assert placed(model) == {"blocks.0": ("int8",)}


def test_removing_leaves_the_model_as_it_was() -> None:
    """No attribute of any module is left, and what somebody else had put there is back."""
    model = Net()
    theirs = model.blocks[1].forward
    model.blocks[1].forward = theirs  # type: ignore[method-assign]
    before = [sorted(module.__dict__) for module in model.modules()]
    apply_rules(model, [rule("auto", "checkpoint")], FP32)
    remove_rules(model)

    assert before == [sorted(module.__dict__) for module in model.modules()]
    assert model.blocks[1].__dict__["forward"] is theirs


def test_a_forward_that_somebody_put_on_the_instance_is_the_one_that_runs() -> None:
    """Levers go round it, and a deep copy calls its own."""
    model = Net()
    original = model.blocks[0].forward
    model.blocks[0].forward = lambda x: original(x, shift=1.0)  # type: ignore[method-assign]
    x = torch.randn(2, 64)
    before = model(x)
    apply_rules(model, [rule("auto", "checkpoint")], FP32)

    assert torch.equal(before, model(x))


def test_an_error_leaves_the_earlier_rules_in_force() -> None:
    """A rule without a match is found before anything is changed."""
    model = Net()
    apply_rules(model, [rule("auto", "checkpoint")], FP32)
    with pytest.raises(UsageError):
        apply_rules(model, [rule("blocks.0", "int8"), rule("head", "int8")], FP32)

    assert placed(model) == {f"blocks.{i}": ("checkpoint",) for i in range(3)}


@pytest.mark.parametrize(
    ("modules", "lever", "message", "hint"),
    [
        ("block.*", "checkpoint", "'block.*' (lever 'checkpoint') matches no module", "blocks.0"),
        ("blocks", "int8", "'blocks' is a ModuleList", "'blocks.*'"),
        ("", "int8", "names no module", "'auto'"),
        ("*", "checkpoint", "checkpoints the whole model", "'auto'"),
        ("*.mlp", "narrow_norm", "none of them is or holds a norm", "RMSNorm"),
        ("nrom", "narrow_norm", "matches no module", "did you mean 'norm'"),
    ],
)
def test_a_rule_that_cannot_be_meant_is_refused(
    modules: str, lever: str, message: str, hint: str
) -> None:
    """The error names the rule, what it met, and what to write."""
    with pytest.raises(UsageError) as caught:
        apply_rules(Net(), [rule(modules, lever)], FP32)

    assert message in caught.value.message
    assert hint in caught.value.hint


@pytest.mark.parametrize(
    ("rules", "parts"),
    [
        ([("auto", "int8"), ("blocks.1", "e4m3")], ["'int8'", "'e4m3'", "'blocks.1'"]),
        ([("auto", "checkpoint"), ("auto", "int8")], ["'checkpoint'", "'int8'", "biased"]),
        ([("auto", "checkpoint"), ("*.mlp", "int8")], ["'blocks.0.mlp'", "computed again"]),
        ([("auto", "checkpoint"), ("*.mlp", "e4m3")], ["'blocks.0.mlp'", "computed again"]),
        ([("auto", "int8"), ("auto", "remake")], ["'blocks.0'", "rounded inputs", "biased"]),
        ([("blocks.1.mlp", "remake"), ("*", "e4m3")], ["'blocks.1.mlp'", "'e4m3'", "biased"]),
    ],
)
def test_levers_that_exclude_each_other_are_refused(
    rules: list[tuple[str, str]], parts: list[str]
) -> None:
    """The error names both rules, the module and the reason."""
    with pytest.raises(UsageError, match="exclude each other") as caught:
        apply_rules(Net(), [rule(*each) for each in rules], FP32)

    assert all(part in caught.value.message for part in parts)


def test_batch_norms_need_no_lever() -> None:
    """They are told apart from norms that the lever does not know."""
    model = nn.Sequential(nn.Conv2d(1, 4, 1), nn.BatchNorm2d(4))

    with pytest.raises(UsageError, match="knows, but BatchNorm2d") as caught:
        apply_rules(model, [rule("*", "narrow_norm")], BF16)
    assert "drop the rule" in caught.value.hint


def test_a_narrow_norm_in_an_fp32_island_is_refused() -> None:
    """keep_fp32 asks for fp32 in and out, and the lever for 16 bits."""
    policy = BF16.keeping_fp32("blocks.1")

    with pytest.raises(UsageError, match=r"'blocks.1.norm'.*keeps 'blocks.1' in fp32"):
        apply_rules(Net(), [rule("auto", "narrow_norm")], policy)


def test_levers_that_go_together_stand_in_a_fixed_order() -> None:
    """Rounding outside of checkpoints, norms innermost, whatever the order of the rules."""
    model = Net()
    rules = [rule("*", "narrow_norm"), rule("norm", "checkpoint"), rule("*", "int8")]
    apply_rules(model, rules, FP32)

    assert placed(model)["norm"] == ("checkpoint", "narrow_norm")
    assert placed(model)[""] == ("int8",)


def test_checkpoints_within_a_remade_module_remake_by_themselves() -> None:
    """They run again in backward, when what was noted of the whole is gone; others do not."""
    model = Net()
    rules = [rule("blocks.[01]", "checkpoint"), rule("*", "remake")]
    applied = apply_rules(model, rules, FP32)

    assert placed(model) == {"": ("remake",)} | dict.fromkeys(
        ("blocks.0", "blocks.1"), ("checkpoint", "remake")
    )
    assert [each.modules for each in applied.rules] == [("blocks.0", "blocks.1"), ("",)]


def test_a_checkpoint_round_a_remade_module_is_as_it_was() -> None:
    """Remaking in a part of what is checkpointed is for that part."""
    model = Net()
    apply_rules(model, [rule("blocks.0", "checkpoint"), rule("blocks.0.mlp", "remake")], FP32)

    assert placed(model) == {"blocks.0": ("checkpoint",), "blocks.0.mlp": ("remake",)}


def test_removing_takes_the_notes_of_entries_off_as_well() -> None:
    """Hooks round the cast of inputs go, and those of others stay in their order."""
    model, policy = Net(), POLICIES["bf16-true"]
    model.register_forward_pre_hook(lambda *_: None)
    prepare_model(model, policy, "cpu")
    before = list(model._forward_pre_hooks.items())
    for _ in range(2):
        apply_rules(model, [rule("*", "remake")], policy)
    during = list(model._forward_pre_hooks.items())
    remove_rules(model)

    assert len(during) == len(before) + 2
    assert during[1] == before[0]
    assert before == list(model._forward_pre_hooks.items())
    assert len(model._forward_pre_hooks_with_kwargs) == 1


def test_offload_on_a_cpu_is_refused_with_the_reason() -> None:
    """The host's memory is where the tensors are already."""
    with pytest.raises(UsageError, match="from the host's memory to the host's memory") as caught:
        apply_rules(Net(), [rule("auto", "offload")], FP32)

    assert "'checkpoint'" in caught.value.hint


@pytest.mark.parametrize("lever", [lever for lever in LEVERS if lever != "offload"])
def test_a_state_dict_has_the_names_that_it_had(lever: str) -> None:
    """Checkpoints of a model with levers load into one without, and the other way round."""
    model = Net()
    names = list(model.state_dict())
    apply_rules(model, [rule("blocks.*", lever)], FP32)

    assert names == list(model.state_dict())
    Net().load_state_dict(model.state_dict())


def as_pickled(model: nn.Module) -> nn.Module:
    copied: nn.Module = pickle.loads(pickle.dumps(model))
    return copied


def as_saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copied: nn.Module = torch.load(file, weights_only=False)
    return copied


def as_averaged(model: nn.Module) -> nn.Module:
    return AveragedModel(model).module


@pytest.mark.parametrize("copied", [copy.deepcopy, as_pickled, as_saved, as_averaged])
@pytest.mark.parametrize("lever", ["checkpoint", "remake", "int8", "narrow_norm"])
def test_a_copy_runs_its_own_modules(copied: Callable[..., nn.Module], lever: str) -> None:
    """Gradients of a copy's loss arrive in the copy, and the original's stay empty."""
    model = Net()
    apply_rules(model, [rule("auto", lever)], FP32)
    other = copied(model)
    other(torch.randn(4, 64)).sum().backward()

    assert placed(other) == placed(model) != {}
    assert all(p.grad is not None for p in other.parameters())
    assert all(p.grad is None for p in model.parameters())


def test_a_model_dies_with_its_last_reference() -> None:
    """No cycle keeps it until the garbage collector comes: that is memory of a GPU."""
    model = Net()
    apply_rules(model, [rule("auto", "checkpoint"), rule("*", "narrow_norm")], FP32)
    model(torch.randn(4, 64)).sum().backward()
    alive = weakref.ref(model.blocks[0].mlp[0].weight)  # type: ignore[union-attr,index]
    del model

    assert alive() is None


def test_the_signature_is_the_modules_own() -> None:
    """Who asks what forward takes, as data collators do, is told."""
    block = nn.ModuleDict({"a": Block()})
    before = inspect.signature(block["a"].forward)
    apply_rules(block, [rule("a", "checkpoint")], FP32)

    assert inspect.signature(block["a"].forward) == before


def test_a_run_that_continues_rounds_as_the_uninterrupted_one() -> None:
    """Two integers are the state of the roundings; loading them repeats the bits."""
    x = torch.randn(256, 64)

    def gradient(model: nn.Module) -> Tensor:
        model.zero_grad()
        model(x).square().sum().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    model = Net()
    apply_rules(model, [rule("auto", "int8")], FP32, seed=5)
    first = gradient(model)
    state = rounding_state(model)
    second = gradient(model)
    resumed = Net()
    resumed.load_state_dict(model.state_dict())
    apply_rules(resumed, [rule("auto", "int8")], FP32, seed=99)
    load_rounding_state(resumed, state)

    # Of each block the MLP's two inputs and GELU's; the norm's input, but for the batch itself.
    assert state == {"seed": 5, "drawn": 3 * 3 + 2}
    assert not torch.equal(first, second)
    assert torch.equal(second, gradient(resumed))


def test_a_state_of_roundings_and_a_model_without_levers_do_not_go_together() -> None:
    """Neither is dropped without a word."""
    model = Net()

    assert rounding_state(model) == {}
    load_rounding_state(model, {})
    with pytest.raises(UsageError, match="no lever that rounds"):
        load_rounding_state(model, {"seed": 0, "drawn": 3})
    apply_rules(model, [rule("auto", "int8")], FP32)
    with pytest.raises(UsageError, match=r"is \{\}, and the model has levers that rounds?"):
        load_rounding_state(model, {})
