"""Facts about fp8 where memory is measured, predicted and planned, and where runs are compared."""

from __future__ import annotations

import pytest
import torch

from narrowcast.comparison.compare import plan_comparison
from narrowcast.errors import UnsupportedPrecision
from narrowcast.plan import PLANS
from narrowcast.planning.axes import anonymous, effects_of, named, short
from narrowcast.planning.space import policies_for, space_of
from narrowcast.policy import POLICIES
from narrowcast.precision import device as devices
from narrowcast.prediction.predict import predict_memory
from narrowcast.prediction.targets import target_named
from narrowcast.profiling import measure_recipe
from narrowcast.recipes.load import load_recipe
from narrowcast.records.memory import MemoryRecord

CPU = torch.device("cpu")


@pytest.mark.parametrize("precision", ["fp8-emulated", "fp8-split-emulated"])
def test_an_emulated_step_is_predicted_to_the_byte(precision: str) -> None:
    """The tensors of the emulation are tensors like others: nothing of it is left out."""
    recipe, plan = load_recipe("fashion"), PLANS[precision]
    measured = measure_recipe(recipe, plan, CPU, break_even=False)
    predicted = predict_memory(recipe, plan, break_even=False)

    assert predicted.total_peak_bytes == measured.total_peak_bytes
    assert predicted.lines == measured.lines
    assert any("fp8 is emulated" in note for note in predicted.notes)


@pytest.mark.parametrize("precision", ["fp8-emulated", "fp8"])
def test_backward_keeps_the_activations_that_it_keeps_in_bf16(
    monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    """To the byte, and without copies of converted weights; torchao's layers are run on the CPU."""
    if precision == "fp8":
        pytest.importorskip("torchao")
        able = {**devices.capabilities(CPU), **devices.cuda_capabilities((9, 0))}
        monkeypatch.setattr(devices, "capabilities", lambda _: able)
    recipe = load_recipe("fashion")
    bf16, fp8 = (
        largest(measure_recipe(recipe, PLANS[name], CPU, break_even=False))
        for name in ("bf16", precision)
    )

    assert fp8["activations"] == bf16["activations"]
    assert fp8["autocast_casts"] < bf16["autocast_casts"] / 2


def largest(record: MemoryRecord) -> dict[str, int]:
    """Return the most that each category ever held."""
    names = {name for point in record.timeline for name in point.categories}
    return {name: max(p.categories.get(name, 0) for p in record.timeline) for name in names}


@pytest.mark.parametrize("precision", ["fp8", "fp8-split", "fp8-emulated"])
def test_fp8_is_not_predicted_for_a_gpu(precision: str) -> None:
    """What its layers allocate there was never measured, and a guess is not given."""
    with pytest.raises(UnsupportedPrecision, match="was never measured") as error:
        target_named("h100").plan(precision)

    assert "bf16" in error.value.hint


def test_fp8_and_bf16_are_two_policies_to_plan_with() -> None:
    """Though weights and all other products are alike."""
    found = policies_for(target_named("cpu"), ["bf16", "fp8-emulated"])

    assert [policy.name for policy in found] == ["bf16", "fp8-emulated"]


def test_auto_never_plans_with_fp8() -> None:
    """It is asked for by its name: on hardware it is unproven, elsewhere it is an emulation."""
    found = policies_for(target_named("cpu"), ["auto"])

    assert all(policy.linears == "compute" for policy in found)


def test_what_fp8_saves_stands_among_the_notes_of_a_plan() -> None:
    """Before anything is chosen."""
    recipe = load_recipe("fashion")
    space = space_of(
        recipe,
        recipe.build_model(),
        (POLICIES["fp32"], POLICIES["fp8-emulated"]),
        batch_size=recipe.batch_size,
        keep_batch=True,
        release=False,
        offload=False,
    )

    assert sum("fp8 is emulated" in note for note in space.notes) == 1


@pytest.mark.parametrize("name", ["fp8", "fp8-emulated", "fp8-split", "fp8-split-emulated"])
def test_a_planned_point_says_that_it_is_fp8(name: str) -> None:
    """In its name, also where the planner makes one up, and among what it changes."""
    plan = PLANS[name]
    effects = effects_of(plan, batch_norm=False)

    assert named(plan) is plan
    assert anonymous(plan) != anonymous(PLANS["bf16"])
    assert short(plan).startswith(plan.policy.linears)
    assert any(e.axis == "linear layers" and not e.exact for e in effects)


def test_a_comparison_says_it_before_the_first_run() -> None:
    """And in its record."""
    plans = [PLANS[name] for name in ("fp32", "bf16", "fp8-emulated")]
    planned = plan_comparison(load_recipe("fashion"), plans, seeds=2, device=CPU, steps=1)

    assert sum("fp8 is emulated" in note for note in planned.notes) == 1
