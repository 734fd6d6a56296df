"""verify-resume tells an exact recipe from one that hides state and one that rolls dice."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from narrowcast.errors import NarrowcastError
from narrowcast.plan import plan_named
from narrowcast.records.verify import VerifyRecord
from narrowcast.training.train import TrainOptions
from narrowcast.training.verify import _how_they_differ, verify_resume

SMALL = Path(__file__).parents[1] / "small_recipe.py"


def verify(recipe: Path, directory: Path, precision: str = "fp32") -> VerifyRecord:
    return verify_resume(
        str(recipe),
        (),
        plan_named(precision),
        TrainOptions(steps=8),
        directory,
        device=torch.device("cpu"),
    )


LOSS = "    return F.cross_entropy(model(x), y)"
MODEL = "    return Net(options.width)"


def variant(tmp_path: Path, old: str, new: str) -> Path:
    """Write the small recipe with some of its text replaced."""
    text = SMALL.read_text()
    assert old in text
    file = tmp_path / "mine.py"
    file.write_text(text.replace(old, new))
    return file


@pytest.mark.slow
def test_a_recipe_whose_state_is_in_its_modules_is_exact(tmp_path: Path) -> None:
    """Every tensor and number of the resumed run is compared, and all are equal."""
    record = verify(SMALL, tmp_path, "fp16")

    assert (record.verdict, record.difference) == ("EXACT", None)
    assert (record.steps, record.interrupted_at) == (8, 4)
    # 4 Linear, 5 batch norm, 1 unsaved buffer; AdamW keeps three for each of 6 parameters.
    assert record.tensors >= 10 + 3 * 6
    assert record.bytes > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.complex64, torch.bool])
def test_tensors_are_compared_bit_by_bit_whatever_their_size(dtype: torch.dtype) -> None:
    """None, one or two elements: a difference is counted, and nothing has none in it."""
    for size in (0, 1, 2):
        a = torch.ones(size, dtype=dtype)
        b = a.clone()
        b[:1] = 0

        assert _how_they_differ(a, a.clone()) == ""
        said = f"1 of {size} elements, by 1 at most" if size else ""
        assert _how_they_differ(a, b) == said


@pytest.mark.slow
def test_state_in_a_global_variable_is_found(tmp_path: Path) -> None:
    """It survives in one process, and not the crash; the first weight that differs is named."""
    counting = f"    calls.append(1)\n{LOSS} * (1 + len(calls) / 100)\n\n\ncalls = []"
    recipe = variant(tmp_path, LOSS, counting)

    record = verify(recipe, tmp_path / "runs")

    assert record.verdict == "NOT EXACT"
    assert record.difference is not None
    assert record.difference.name == "model.layers.0.weight"
    assert "of 96 elements, by" in record.difference.what
    assert record.difference.step == 5


@pytest.mark.slow
def test_a_recipe_that_is_not_deterministic_is_told_apart(tmp_path: Path) -> None:
    """Two runs that were never stopped differ, so the resume is not to blame."""
    clock = f"    import time\n{LOSS} * (1 + time.perf_counter_ns() % 997 / 9970)"
    recipe = variant(tmp_path, LOSS, clock)

    record = verify(recipe, tmp_path / "runs")

    assert record.verdict == "NOT DETERMINISTIC"
    assert record.difference is not None
    assert record.difference.step == 1


@pytest.mark.slow
def test_a_failure_in_the_resuming_process_arrives_here(tmp_path: Path) -> None:
    """With its own words: this recipe refuses to run in a process where it did not begin."""
    licence = """
    import os, pathlib
    mark = pathlib.Path(__file__).with_suffix('.pid')
    if not mark.exists():
        mark.write_text(str(os.getpid()))
    if mark.read_text() != str(os.getpid()):
        raise OSError('the licence server knows another process')
"""
    recipe = variant(tmp_path, MODEL, licence + MODEL)

    with pytest.raises(NarrowcastError, match=r"resuming failed: .*licence server") as caught:
        verify(recipe, tmp_path / "runs")

    assert caught.value.exit_code == 4
