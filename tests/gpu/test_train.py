"""Training, checkpoints and exact resume on a CUDA device."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from narrowcast.plan import plan_named
from narrowcast.randomness import isolated, random_state, restore_random_state
from narrowcast.recipes.load import load_recipe
from narrowcast.records.run import RunRecord, StepPoint
from narrowcast.training import checkpoint
from narrowcast.training.run_directory import RunDirectory
from narrowcast.training.state_tree import leaves, pack, unpack
from narrowcast.training.train import TrainOptions, train
from narrowcast.training.verify import verify_resume

pytestmark = pytest.mark.gpu

SMALL = Path(__file__).parents[1] / "small_recipe.py"
PRECISIONS = ["fp32", "tf32", "fp16", "bf16", "bf16-true"]


def run(
    directory: Path,
    precision: str,
    *,
    recipe: str = str(SMALL),
    resume: bool = False,
    stop_at: int | None = None,
    options: TrainOptions | None = None,
) -> RunRecord:
    return train(
        load_recipe(recipe),
        plan_named(precision),
        options or TrainOptions(measure=False, evaluate_every=4, clip_norm=1.0),
        directory,
        device=torch.device("cuda"),
        resume=resume,
        stop_at=stop_at,
    )


def story(directory: Path) -> tuple[bytes, list[object]]:
    place = RunDirectory(directory)
    points = [
        replace(p, seconds=0.0) if isinstance(p, StepPoint) else p for p in place.read_metrics()
    ]
    return place.weights_path.read_bytes(), points


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_resumed_run_is_the_run_that_was_never_stopped(tmp_path: Path, precision: str) -> None:
    """Dropout draws from the CUDA generator, so its state is restored as well."""
    run(tmp_path / "whole", precision)

    run(tmp_path / "parts", precision, stop_at=5)
    torch.cuda.manual_seed_all(99)
    run(tmp_path / "parts", precision, resume=True)

    assert story(tmp_path / "parts") == story(tmp_path / "whole")


@pytest.mark.parametrize(
    ("recipe", "overrides"),
    [("fashion", "model=resnet"), ("fashion", "model=vit"), ("austen", "batch_size=4")],
    ids=["convolutions", "vit", "gpt"],
)
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_built_in_recipes_are_exact(
    tmp_path: Path, recipe: str, overrides: str, precision: str
) -> None:
    """cuDNN, attention and embedding have deterministic backward passes, which are used."""
    record = verify_resume(
        recipe,
        (overrides,),
        plan_named(precision),
        TrainOptions(steps=6),
        tmp_path,
        device=torch.device("cuda"),
    )

    assert record.verdict == "EXACT", record.difference


@pytest.mark.parametrize("precision", PRECISIONS)
def test_peak_memory_and_executed_dtypes_are_the_devices(tmp_path: Path, precision: str) -> None:
    """The allocator's own peak over the training steps, and products in the policy's format."""
    record = run(tmp_path / "run", precision, recipe="tabular", options=TrainOptions(steps=6))

    assert record.memory is not None
    assert record.peak_bytes is not None
    assert record.peak_bytes >= record.memory.total_peak_bytes > 0
    assert set(record.executed_dtypes["matmul"]) == {plan_named(precision).compute}
    assert record.precision_honoured is True
    assert record.environment.device.startswith("cuda")


def test_the_same_seed_starts_from_the_same_weights_on_both_devices(tmp_path: Path) -> None:
    """Weights are made on the CPU, so that a run can be compared with one on another device."""
    on_gpu = run(tmp_path / "gpu", "fp32")
    on_cpu = train(
        load_recipe(SMALL),
        plan_named("fp32"),
        TrainOptions(measure=False),
        tmp_path / "cpu",
        device=torch.device("cpu"),
    )

    assert on_gpu.initial_weights_hash == on_cpu.initial_weights_hash
    assert on_gpu.data_order_hash == on_cpu.data_order_hash


def test_a_state_on_the_device_comes_back_bit_for_bit(tmp_path: Path) -> None:
    """Moments of a fused optimizer on CUDA, channels_last weights, all in their true dtypes."""
    model = torch.nn.Conv2d(3, 8, 3).cuda().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    model(torch.randn(2, 3, 8, 8, device="cuda")).sum().backward()
    optimizer.step()
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}

    checkpoint.save(tmp_path, state, step=1, identity={})
    back = checkpoint.load_latest(tmp_path)
    optimizer.load_state_dict(back["optimizer"])

    expected, found = leaves(state), leaves(back)
    assert list(found) == list(expected)
    for name, value in expected.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(found[name], value.cpu()), name
            assert found[name].stride() == value.stride(), name
    assert all(
        entry["exp_avg"].is_cuda and entry["exp_avg"].stride() == weight.stride()
        for weight, entry in optimizer.state.items()
    )


def test_random_states_of_the_device_are_saved_and_isolated() -> None:
    """What is drawn after restoring, or after an isolated block, is what would have been drawn."""
    torch.rand(3, device="cuda")
    data, tensors = pack(random_state())
    expected = torch.rand(3, device="cuda")

    restore_random_state(unpack(data, tensors))
    with isolated(0, "evaluation"):
        torch.rand(5, device="cuda")

    assert torch.equal(torch.rand(3, device="cuda"), expected)
