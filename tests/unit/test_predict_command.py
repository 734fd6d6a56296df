"""`narrowcast predict`: options in, the ledger of `narrowcast memory` out, without running."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner, Result

from narrowcast.cli import memory, predict
from narrowcast.errors import NarrowcastError, UnknownName, UsageError
from narrowcast.prediction.predict import predict_memory
from narrowcast.records.codec import dumps, loads
from narrowcast.records.memory import CATEGORIES, MemoryRecord

# Whole trainings or traces: left out of `make check`.
pytestmark = pytest.mark.slow

SMALL = ("--set", "batch_size=16", "--set", "width=32", "--device", "cpu")


def run(verb: str, *arguments: str) -> Result:
    app = typer.Typer()
    app.callback()(lambda: None)
    for module in (memory, predict):
        module.register(app)
    result = CliRunner().invoke(app, [verb, *arguments])
    if isinstance(result.exception, NarrowcastError):
        raise result.exception
    return result


def test_json_has_the_keys_and_the_bytes_of_a_measurement() -> None:
    """The same shape and figures; a prediction says that it is one, and what it assumes."""
    arguments = ("tabular", "-p", "bf16", *SMALL, "--json", "-")

    predicted = json.loads(run("predict", *arguments).stdout)
    measured = json.loads(run("memory", *arguments).stdout)

    assert predicted.keys() == measured.keys()
    for key in ("lines", "modules", "timeline", "total_peak_bytes", "peak_phase", "options"):
        assert predicted[key] == measured[key]
    assert predicted["predicted"] is True
    assert measured["predicted"] is False
    assert predicted["assumptions"]
    assert {line["category"] for line in predicted["lines"]} == set(CATEGORIES)


def test_a_person_reads_that_it_is_predicted_what_is_assumed_and_when_it_pays() -> None:
    """On the terminal, in the words of `narrowcast memory`."""
    result = run("predict", "tabular", "-p", "bf16", *SMALL)

    assert result.exit_code == 0
    for words in ("predicted", "assumed: two steps were traced", "autocast casts", "reak-even"):
        assert words in " ".join(result.stdout.split())


def test_the_break_even_is_the_measured_one() -> None:
    """Found on sizes alone, at the same batch; nothing is said to be measured."""
    arguments = ("tabular", "-p", "bf16", *SMALL, "--json", "-")

    predicted = json.loads(run("predict", *arguments).stdout)["break_even"]
    measured = json.loads(run("memory", *arguments).stdout)["break_even"]

    assert predicted["batch_size"] == measured["batch_size"]
    assert predicted["cast_bytes"] == measured["cast_bytes"]
    assert predicted["fp32_peak_bytes"] == measured["fp32_peak_bytes"]
    assert predicted["measured_at"] is None
    assert "measured" not in predicted["why"]


def test_weights_in_16_bits_always_pay() -> None:
    """Nothing stands beside the weights: less than fp32 at the batch asked for and at two."""
    record = predict_memory("tabular", "bf16-true", batch_size=32)

    found = record.break_even
    assert found is not None
    assert found.batch_size is None
    assert (
        found.fp32_peak_bytes == predict_memory("tabular", "fp32", batch_size=32).total_peak_bytes
    )
    assert "always pays" in found.why
    assert "at batch 2" in found.why
    assert "at batch 32" in found.why


def test_fp32_is_compared_with_nothing() -> None:
    """It is what others are compared with."""
    assert predict_memory("tabular", "fp32").break_even is None


def test_a_model_that_knows_its_batch_is_predicted_without_a_comparison(tmp_path: Path) -> None:
    """Other batch sizes cannot be traced, and a note says so."""
    path = tmp_path / "fixed.py"
    path.write_text(
        """
from dataclasses import dataclass
import torch
from torch import nn
from torch.utils.data import TensorDataset

@dataclass
class Options:
    batch_size: int = 8

class Fixed(nn.Linear):
    def forward(self, x):
        return super().forward(x.reshape(8, 4))

def model(options):
    return Fixed(4, 4)

def data(options):
    x = torch.randn(50, 4)
    return TensorDataset(x, x), TensorDataset(x, x)

def loss(model, batch):
    return model(batch[0]).square().mean()

def metrics(model, batch):
    return {"error": loss(model, batch)}
"""
    )

    record = predict_memory(path, "bf16")

    assert record.break_even is None
    assert any("no comparison with fp32" in note for note in record.notes)


def test_batch_and_islands_reach_the_prediction() -> None:
    """--batch is the batch size, --keep-fp32 an island without low-precision copies."""
    result = run(
        "predict", "tabular", "-p", "bf16", "--batch", "8", "--keep-fp32", "2", "--json", "-"
    )

    record = json.loads(result.stdout)
    plain = predict_memory("tabular", "bf16", batch_size=8).break_even
    assert plain is not None
    assert record["batch_size"] == 8
    assert record["break_even"]["cast_bytes"] < plain.cast_bytes


def test_json_into_a_file_reads_back_as_a_record(tmp_path: Path) -> None:
    """And the table is printed as well."""
    path = tmp_path / "peak.json"

    result = run("predict", "tabular", "-p", "fp32", *SMALL, "--json", str(path))

    record = loads(MemoryRecord, path.read_text())
    assert record.predicted
    assert loads(MemoryRecord, dumps(record)) == record
    assert "predicted" in result.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ("tabular", "-p", "bf15"),
        ("tabluar", "-p", "bf16"),
        ("tabular", "-p", "bf16", "--set", "widht=3"),
        ("tabular", "-p", "bf16", "--autocast-rules", "coda"),
        ("tabular", "-p", "bf16", "--device", "h20"),
    ],
)
def test_an_unknown_name_is_an_error_with_the_nearest_match(arguments: tuple[str, ...]) -> None:
    """Precision, recipe, option, rules and device: one line, exit code 2, and a guess."""
    with pytest.raises(UnknownName, match="unknown") as raised:
        run("predict", *arguments)

    assert raised.value.exit_code == 2
    assert "did you mean" in raised.value.hint


@pytest.mark.parametrize("batch", ["0", "-3"])
def test_a_batch_of_nothing_is_refused(batch: str) -> None:
    """With the value, and what would make sense."""
    with pytest.raises(UsageError, match=batch) as raised:
        run("predict", "tabular", "-p", "fp32", "--batch", batch)

    assert "at least 1" in raised.value.hint


def test_a_gpu_is_known_by_its_name_in_capitals() -> None:
    """As its maker writes it, and as `plan` takes it."""
    small = ("--set", "batch_size=16", "--set", "width=32", "-p", "fp32", "--json", "-")
    result = run("predict", "tabular", *small, "--device", "H200")

    assert json.loads(result.stdout)["device"] == "h200"


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is present")
def test_cuda_is_the_gpu_at_hand_and_an_error_without_one() -> None:
    """It is not an unknown name: `plan` takes it too."""
    with pytest.raises(UsageError, match="finds no CUDA device"):
        run("predict", "tabular", "--device", "cuda")
