"""The example projects run as their READMEs say, and the migration page does what it says."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from recipes import torchvision_on_cpu  # noqa: F401 -- before what imports torchvision

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
PAGE = (ROOT / "docs" / "from-torch-amp.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
LOOPS = ("torch_amp", "dropin", "engine", "plan")


def run(
    project: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: str
) -> str:
    """Run a project's train.py with these words; returns the last lines that it printed."""
    path = EXAMPLES / project / "train.py"
    monkeypatch.setattr(sys, "argv", [str(path), *words])
    if "accelerate" in sys.modules:
        sys.modules["accelerate"].state.AcceleratorState._reset_state(reset_partial_state=True)
    runpy.run_path(str(path), run_name="__main__")
    return capsys.readouterr().out


def test_the_page_has_the_parts_and_four_loops() -> None:
    """One block of parts, one for torch.amp and one for each step."""
    assert len(BLOCKS) == 1 + len(LOOPS)


@pytest.mark.parametrize(("block", "name"), list(zip(BLOCKS[1:], LOOPS, strict=True)))
def test_each_loop_of_the_page_is_that_of_its_example(block: str, name: str) -> None:
    """The page shows what the files do, line for line."""
    lines = (EXAMPLES / "plain_loop" / f"{name}.py").read_text().splitlines()

    assert [line for line in block.splitlines() if line not in lines] == []


def test_the_blocks_of_the_page_train_the_same_weights() -> None:
    """torch.amp, the drop-in and the Engine: equal bit for bit; the plan: bf16 weights, learned."""
    trained: list[dict[str, Any]] = []
    for block in BLOCKS[1:]:
        place: dict[str, Any] = {}
        exec(BLOCKS[0], place)
        exec(block, place)
        trained.append(place)

    by_hand, *same, planned = (place["model"].state_dict() for place in trained)
    for other in same:
        assert all(torch.equal(by_hand[name], other[name]) for name in by_hand)
    assert {w.dtype for w in planned.values()} == {torch.bfloat16}
    assert trained[-1]["loss"].item() < 0.1
    assert trained[1]["scaler"].skips == trained[2]["engine"].skips == ()


@pytest.mark.parametrize("name", LOOPS)
def test_the_plain_loops_run(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Each file by itself: the loss falls, and all samples are learned."""
    runpy.run_path(str(EXAMPLES / "plain_loop" / f"{name}.py"))

    loss = re.search(r"loss (\d+\.\d+).*accuracy 1.00", capsys.readouterr().out)
    assert loss is not None
    assert float(loss[1]) < 0.1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of Lightning's own making
def test_the_lightning_project_runs_and_resumes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """fp16 on a CPU executes in fp16; an epoch and a second are the same as two."""
    pytest.importorskip("lightning")
    words = ("--precision", "16-mixed", "--folder")
    whole = run("lightning", capsys, monkeypatch, *words, str(tmp_path / "a"), "--epochs", "2")
    folder = str(tmp_path / "b")
    run("lightning", capsys, monkeypatch, *words, folder, "--epochs", "1")
    resumed = run("lightning", capsys, monkeypatch, *words, folder, "--epochs", "2", "--resume")

    assert "epoch 2, accuracy" in whole
    assert "executed {'fp16': 2}" in whole
    assert whole.splitlines()[-1] == resumed.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of transformers' own making
def test_the_trainer_project_runs_and_resumes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """fp16 on a CPU executes in fp16; twenty steps and ten more have learned some letters."""
    pytest.importorskip("transformers")
    words = ("--precision", "fp16", "--folder", str(tmp_path), "--steps")
    run("hf_trainer", capsys, monkeypatch, *words, "20")
    resumed = run("hf_trainer", capsys, monkeypatch, *words, "30", "--resume")

    found = re.search(r"step 30, loss (\d+\.\d+), executed \{(.*)\}", resumed)
    assert found is not None
    assert float(found[1]) < 3.0  # where guessing among the letters that there are gives 3.3
    assert "'fp16'" in found[2]
