"""A training of a compiled model: recorded, resumed to the bit, and measured without a trace."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from narrowcast.cli.app import app
from narrowcast.errors import CheckpointError, UnknownName
from narrowcast.plan import plan_named
from narrowcast.recipes.load import load_recipe
from narrowcast.records.run import RunRecord
from narrowcast.report.run_outline import outline_of_run
from narrowcast.report.shapes import Facts
from narrowcast.training.run_directory import RunDirectory
from narrowcast.training.train import TrainOptions, train

SMALL = Path(__file__).parents[1] / "small_recipe.py"
EXACT = "aot_eager"


def run(directory: Path, precision: str = "bf16", **named: Any) -> RunRecord:
    options = TrainOptions(**{"compile": EXACT, "measure": False, **named.pop("options", {})})
    recipe = load_recipe(named.pop("path", SMALL))
    return train(
        recipe, plan_named(precision), options, directory, device=torch.device("cpu"), **named
    )


def weights(directory: Path) -> dict[str, torch.Tensor]:
    with safe_open(directory / "weights.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 -- no dict


def is_same(a: Path, b: Path) -> bool:
    x, y = weights(a), weights(b)
    return list(x) == list(y) and all(torch.equal(x[name], y[name]) for name in x)


@pytest.mark.parametrize("precision", ["fp32", "bf16-split"])
def test_a_compiled_run_gives_the_weights_of_one_that_is_not(
    tmp_path: Path, precision: str
) -> None:
    """Under the names of the model itself, with dropout and batch norm; to the bit in fp32.

    In bf16 dropout draws its numbers in another way than eager kernels do.
    """
    record = run(tmp_path / "compiled", precision)
    run(tmp_path / "plain", precision, options={"compile": ""})

    assert not [name for name in weights(tmp_path / "compiled") if "_orig_mod" in name]
    if precision == "fp32":
        assert is_same(tmp_path / "compiled", tmp_path / "plain")
    assert record.compiled is not None
    assert record.compiled.backend == EXACT


@pytest.mark.slow
def test_a_resumed_run_is_the_same_to_the_bit(tmp_path: Path) -> None:
    """With evaluations on the way, whose last batch is smaller, and dropout."""
    options = {"evaluate_every": 4}
    run(tmp_path / "whole", options=options)
    run(tmp_path / "parts", options=options, stop_at=6)
    record = run(tmp_path / "parts", options=options, resume=True)
    whole = RunDirectory(tmp_path / "whole").read_record()

    assert is_same(tmp_path / "whole", tmp_path / "parts")
    assert record.evaluations == whole.evaluations


@pytest.mark.slow
def test_measuring_changes_no_bit_and_needs_no_ledger(tmp_path: Path) -> None:
    """Formats are counted in the graph; of memory nothing is said."""
    record = run(tmp_path / "measured", options={"measure": True})
    run(tmp_path / "plain")

    assert is_same(tmp_path / "measured", tmp_path / "plain")
    # Forward and backward of two layers; the first one's input needs no gradient.
    assert record.executed_dtypes["matmul"]["bf16"] == 5
    assert record.precision_honoured
    assert "counted in the graphs that were compiled, once each" in record.precision_notes
    assert (record.memory, record.peak_bytes) == (None, None)


def test_compiling_is_part_of_what_a_run_is(tmp_path: Path) -> None:
    """A run cannot go on otherwise than it began."""
    run(tmp_path, stop_at=3)

    with pytest.raises(CheckpointError, match="compile"):
        run(tmp_path, options={"compile": ""}, resume=True)


def test_an_unknown_backend_is_refused_before_anything_is_built() -> None:
    """With the valid ones."""
    with pytest.raises(UnknownName, match="inducter"):
        TrainOptions(compile="inducter")


def test_the_record_and_the_report_say_how_often_was_compiled(tmp_path: Path) -> None:
    """Training, and evaluation in bf16, which sees one batch of eight: two graphs."""
    record = run(tmp_path)
    blocks = outline_of_run(record).sections[0].blocks
    rows = [row for block in blocks if isinstance(block, Facts) for row in block.pairs]

    assert record.compiled is not None
    assert (record.compiled.graphs, record.compiled.recompiles) == (2, 1)
    assert RunDirectory(tmp_path).read_record().compiled == record.compiled
    assert ("compiled", record.compiled.words) in rows


BREAKING = (
    SMALL.read_text()
    .replace(
        "        return self.layers(x)", "        print(end='')\n        return self.layers(x)"
    )
    .replace("samples: int = 44", "samples: int = 24")
)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_what_was_not_compiled_is_told_at_the_end(tmp_path: Path) -> None:
    """With the reason, as one note of the run."""
    recipe = tmp_path / "breaking.py"
    recipe.write_text(BREAKING)
    record = run(tmp_path / "run", path=recipe)

    assert [note for note in record.warnings if note.startswith("not all was compiled: aot_eager")]
    assert record.status == "finished"


def test_compile_is_an_option_of_train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And asks for inductor."""
    from typer.testing import CliRunner

    import narrowcast.training.train as training

    seen: list[TrainOptions] = []

    def note(recipe: Any, plan: Any, options: TrainOptions, *_: Any, **__: Any) -> RunRecord:
        seen.append(options)
        return run(tmp_path / "run", options={"compile": ""})

    monkeypatch.setattr(training, "train", note)
    result = CliRunner().invoke(
        app, ["train", str(SMALL), "--compile", "--output", str(tmp_path / "run")]
    )

    assert result.exit_code == 0, result.output
    assert [options.compile for options in seen] == ["inductor"]
    assert replace(seen[0], compile="") == TrainOptions()
