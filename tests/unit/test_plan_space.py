"""Which plans a recipe can have: the product of its choices, less what conflicts."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import nn

from narrowcast.errors import UnknownName, UnsupportedPrecision, UsageError
from narrowcast.plan import OWN, PLANS, Plan
from narrowcast.planning.peaks import model_without_contents
from narrowcast.planning.place import place_named
from narrowcast.planning.space import REMAKE, Space, candidates, policies_for, space_of
from narrowcast.policy import POLICIES
from narrowcast.prediction.gpus import GPUS
from narrowcast.prediction.targets import target_named
from narrowcast.prediction.trace import Stage
from narrowcast.recipes.load import Recipe, load_recipe

CPU = target_named("cpu")
RECIPES = Path(__file__).parents[1] / "recipes"


def surveyed(recipe: Recipe, *, keep_batch: bool = False, batch_size: int = 16) -> Space:
    stage = Stage()
    model = model_without_contents(recipe, stage)
    with stage:
        return space_of(
            recipe,
            model,
            policies_for(CPU, ["auto"]),
            batch_size=batch_size,
            keep_batch=keep_batch,
            release=True,
            offload=False,
        )


def test_every_candidate_is_a_plan_of_its_own_with_a_name_of_its_own() -> None:
    """Names are directories and colours: no two plans may share one."""
    found = candidates(surveyed(load_recipe("austen")))

    assert len({plan.name for plan in found}) == len(set(found)) == len(found)
    assert PLANS["fp32"] in found
    assert PLANS["bf16"] in found
    assert PLANS["bf16-split"] in found


def test_no_candidate_has_low_precision_weights_and_nothing_that_remembers_small_updates() -> None:
    """bf16 weights come with a master or with stochastic rounding."""
    for plan in candidates(surveyed(load_recipe("austen"))):
        assert not (plan.policy.param == "bf16" and plan.weights == OWN)


def test_bf16_weights_always_come_with_norms_of_fp32_statistics() -> None:
    """As in the named plans: without the rule a CPU keeps the statistics in bf16."""
    for plan in candidates(surveyed(load_recipe("austen"))):
        norms = [rule for rule in plan.activations if rule.lever == "narrow_norm"]
        assert bool(norms) == (plan.policy.param == "bf16")


def test_each_axis_of_a_transformer_is_there() -> None:
    """Stores, release, checkpointing, chunked loss, micro-batches."""
    found = candidates(surveyed(load_recipe("austen")))

    assert {plan.weights for plan in found} == {OWN, "fp32", "split16", "split8", "stochastic"}
    assert {plan.states for plan in found} == {OWN, "fp32", "bf16", "int8", "int4"}
    assert {plan.gradients for plan in found} == {"keep", "release"}
    assert {plan.loss for plan in found} == {"whole", "chunked"}
    assert {plan.micro_batches for plan in found} == {1, 2, 4, 8, 16}
    assert {
        tuple(rule.lever for rule in plan.activations)
        for plan in found
        if plan.policy.param == "fp32"
    } == {(), ("remake",), ("checkpoint",), ("checkpoint", "remake")}


def test_with_many_blocks_every_second_one_can_be_checkpointed() -> None:
    """Half of the recomputation for half of the memory; by name, in the order of the model."""
    halves = surveyed(load_recipe("austen", ["size=small"])).activations[2]

    assert [rule.modules for rule in halves] == ["blocks.1", "blocks.3", "blocks.5"]


def test_a_kept_batch_is_never_split() -> None:
    """--keep-batch is a promise."""
    found = candidates(surveyed(load_recipe("austen"), keep_batch=True))

    assert {plan.micro_batches for plan in found} == {1}


@pytest.mark.parametrize(
    ("batch_size", "parts"),
    [(1, (1,)), (2, (1,)), (4, (1, 2)), (12, (1, 2, 3, 6)), (13, (1,)), (16, (1, 2, 4, 8))],
)
def test_batch_norm_gets_no_part_of_a_single_sample(
    batch_size: int, parts: tuple[int, ...]
) -> None:
    """A part of one sample has no variance; parts divide the batch evenly."""
    space = surveyed(load_recipe("fashion", ["model=resnet"]), batch_size=batch_size)

    assert space.batch_norm
    assert space.micro_batches == parts


def test_what_a_model_lacks_is_left_out_and_said() -> None:
    """An MLP has neither repeated blocks nor a head to compute in chunks."""
    space = surveyed(load_recipe("fashion"))

    assert space.activations == ((), REMAKE)
    assert space.losses == ("whole",)
    assert any("no checkpointing" in note for note in space.notes)
    assert any("no chunked loss" in note for note in space.notes)


def test_an_optimizer_that_has_no_stores_keeps_its_own(tmp_path: Path) -> None:
    """RMSprop cannot be narrowed: stores, release and bf16 weights are left out and it is said."""
    file = tmp_path / "own.py"
    file.write_text(
        (RECIPES / "regression.py").read_text() + "\n\ndef optimizer(model, options):\n"
        "    return torch.optim.RMSprop(model.parameters(), lr=options.lr)\n"
    )
    space = surveyed(load_recipe(file))

    assert not space.narrow_stores
    assert {plan.weights for plan in candidates(space)} == {OWN}
    assert {plan.policy.param for plan in candidates(space)} == {"fp32"}
    assert any("keeps its stores" in note for note in space.notes)


def test_precisions_limit_the_choice_to_their_policies() -> None:
    """fp32 alone leaves the exact computation, with every lever."""
    assert policies_for(CPU, ["fp32"]) == (POLICIES["fp32"],)
    assert [p.param for p in policies_for(CPU, ["bf16-split", "lean"])] == ["bf16"]


def test_auto_takes_what_the_device_is_good_at() -> None:
    """A GPU without bf16 gets fp16; one with it needs no loss scaling; a CPU has no TF32."""
    computed = {
        name: [p.compute for p in policies_for(target_named(name), ["auto"])]
        for name in ("cpu", "t4", "h200")
    }

    assert computed["cpu"] == ["fp32", "bf16", "bf16"]
    assert computed["t4"] == ["fp32", "fp16"]
    assert computed["h200"] == ["fp32", "tf32", "bf16", "bf16"]


def test_no_precision_at_all_is_one_clear_error() -> None:
    """Not an index out of range."""
    with pytest.raises(UsageError, match="no precision was named"):
        policies_for(CPU, [])


def test_a_precision_that_the_device_lacks_is_refused() -> None:
    """Asked for by name, nothing is replaced by something else."""
    with pytest.raises(UnsupportedPrecision):
        policies_for(target_named("t4"), ["bf16"])
    with pytest.raises(UnknownName, match="fp23"):
        policies_for(CPU, ["fp23"])


@pytest.mark.parametrize("name", ["H200", "CPU", "A100-80GB"])
def test_capitals_do_not_matter_in_the_name_of_a_place(name: str) -> None:
    """A GPU is called as its maker writes it."""
    assert place_named(name).target == name.lower()


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("RTX 4090", "rtx4090"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("A100 80GB", "a100-80gb"),
        ("NVIDIA A100 40 GB", "a100-40gb"),
        ("H100-PCIe", "h100-pcie"),
        ("NVIDIA H100 80 GB SXM", "h100"),
    ],
)
def test_a_gpu_is_known_by_its_title_and_however_it_is_spaced(name: str, target: str) -> None:
    """As its maker writes it, and as the table has it."""
    assert place_named(name).target == target
    assert target_named(name).name == target


@pytest.mark.parametrize("name", ["", " ", "nvidia", "A100", "RTX"])
def test_half_a_name_is_no_gpu(name: str) -> None:
    """Two GPUs share it, or none has it."""
    with pytest.raises(UnknownName):
        target_named(name)


def test_a_place_is_a_device_at_hand_or_a_gpu_by_name() -> None:
    """cpu can be timed on; h200 only counted for."""
    assert place_named("cpu").device == torch.device("cpu")
    assert place_named("h200").device is None
    assert place_named("h200").target == "h200"
    assert all(place_named(name).target == name for name in GPUS)


@pytest.mark.parametrize("name", ["h20", "gpu", "cup"])
def test_an_unknown_place_names_the_nearest(name: str) -> None:
    """Typing errors are answered with a guess."""
    with pytest.raises(UnknownName, match="unknown device"):
        place_named(name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is present")
def test_cuda_without_cuda_is_one_clear_error() -> None:
    """A device that is asked for and absent is not replaced by the CPU."""
    with pytest.raises(UsageError, match="finds no CUDA device"):
        place_named("cuda")


def test_a_model_that_looks_at_values_is_built_for_real_and_then_emptied(tmp_path: Path) -> None:
    """Weights that are made from values do not stop the planning."""
    file = tmp_path / "looks.py"
    text = (RECIPES / "regression.py").read_text()
    file.write_text(
        text.replace(
            "def model(options):\n    return",
            "def model(options):\n    assert float(torch.ones(1)) == 1\n    return",
        )
    )

    model = model_without_contents(load_recipe(file), Stage())

    assert isinstance(model, nn.Module)
    assert all(type(p).__name__ != "Parameter" or p.is_meta is False for p in model.parameters())


def test_a_plan_is_hashable_and_equal_to_its_copy() -> None:
    """Plans are keys of what is known about them."""
    plan = candidates(surveyed(load_recipe("austen")))[5]

    assert {plan: 1}[dataclasses.replace(plan)] == 1
    assert isinstance(plan, Plan)
