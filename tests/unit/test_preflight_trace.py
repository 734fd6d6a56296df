"""Rules that need values: one small forward pass of a recipe, watched operation by operation."""

from __future__ import annotations

from pathlib import Path

import pytest

from narrowcast.preflight.check import check
from narrowcast.records.check import CheckFinding

RECIPE = """
from dataclasses import dataclass
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

@dataclass
class Options:
    steps: int = 4

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(16, 16)

    def forward(self, x):
        h = self.inner(x)
        {body}

def model(options):
    return Net()

def data(options):
    x = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    return TensorDataset(x, x), TensorDataset(x, x)

def loss(model, batch):
    x, y = batch
    return {loss}

def metrics(model, batch):
    return {{"loss": loss(model, batch)}}
"""

FIRES = {
    "a cast that writes an expanded tensor out": (
        "NC501",
        "fp16",
        "return h + (x[:, None].expand(-1, 600, -1) @ self.inner.weight).mean()",
    ),
    "positions that collapse in fp16": (
        "NC502",
        "fp16",
        "return h + torch.arange(4096.0).view(1, 4096).expand(2, -1) @ torch.ones(4096, 1)",
    ),
    "positions that collapse in bf16": (
        "NC502",
        "bf16",
        "return h + torch.outer(torch.arange(600.0), torch.ones(1)).mm(torch.ones(1, 1))[:2]",
    ),
    "an eps that is 0": ("NC503", "fp16", "return h / (h.abs().mean(-1, keepdim=True) + 1e-8)"),
    "a clamp at 0": ("NC503", "fp16", "return h / h.abs().clamp(1e-9)"),
    "a mask below the format": ("NC504", "fp16", "return h.masked_fill(h > 3, -1e9)"),
    "a constant beyond the format": ("NC504", "fp16", "return torch.tanh(h + 1e5)"),
    "a long sum": (
        "NC505",
        "bf16-true",
        "return h + (h.mean() * torch.ones(600, dtype=h.dtype)).cumsum(0)[-1]",
    ),
}

QUIET = {
    "a plain network": ("fp16", "return h"),
    "a cast of a tensor that is whole": (
        "fp16",
        "return h + x.repeat(1, 300) @ torch.ones(4800, 1)",
    ),
    "a small expanded tensor": (
        "fp16",
        "return h + (x[:, None].expand(-1, 4, -1) @ self.inner.weight).mean()",
    ),
    "positions that the format holds": (
        "fp16",
        "return h + torch.arange(2048.0).view(1, 2048).expand(2, -1) @ torch.ones(2048, 1)",
    ),
    "positions kept out of low precision": (
        "bf16",
        "return h + (torch.arange(600.0) / 600).view(1, -1).expand(2, -1) @ torch.ones(600, 1)",
    ),
    "an eps that holds": ("fp16", "return h / (h.abs().mean(-1, keepdim=True) + 1e-5)"),
    "a small eps on fp32": ("fp16", "return h / (h.float().abs().mean(-1, keepdim=True) + 1e-8)"),
    "a small eps in bf16, which holds it": ("bf16", "return h / (h.abs().mean() + 1e-8)"),
    "a factor below the format": ("fp16", "return h + h * 1e-9"),
    "a mask of minus infinity": ("fp16", "return h.masked_fill(h > 3, float('-inf')).exp()"),
    "a mask that bf16 holds": ("bf16", "return h.masked_fill(h > 3, -1e9).exp()"),
    "a long sum that CUDA's autocast widens": (
        "fp16",
        "return h + h.repeat(1, 300).cumsum(1)[:, :16]",
    ),
}


def findings(
    folder: Path, precision: str, body: str, loss: str = "F.mse_loss(model(x), y)"
) -> list[CheckFinding]:
    path = folder / "recipe.py"
    path.write_text(RECIPE.format(body=body, loss=loss))
    return list(check(path, precision).findings)


@pytest.mark.parametrize("name", FIRES)
def test_a_value_that_the_format_loses_is_found_at_its_line(name: str, tmp_path: Path) -> None:
    """The finding names rule, file, line and code."""
    code, precision, body = FIRES[name]
    found = findings(tmp_path, precision, body)

    assert [f.rule.split()[0] for f in found] == [code]
    assert (found[0].code, found[0].source) == (body, "traced")
    assert found[0].file == str(tmp_path / "recipe.py")


@pytest.mark.parametrize("name", QUIET)
def test_a_value_that_the_format_keeps_is_not_accused(name: str, tmp_path: Path) -> None:
    """No rule fires at all."""
    precision, body = QUIET[name]

    assert findings(tmp_path, precision, body) == []


def test_what_raises_on_cuda_only_is_found_without_cuda(tmp_path: Path) -> None:
    """Binary cross-entropy of probabilities: the CPU's own autocast would let it pass."""
    loss = "F.binary_cross_entropy(torch.sigmoid(model(x)), y.sigmoid())"
    found = findings(tmp_path, "fp16", "return h", loss)

    assert [f.rule for f in found] == ["NC506 step-raises"]
    assert found[0].code == f"return {loss}"
    assert "not in fp32" in found[0].message


def test_the_module_is_named(tmp_path: Path) -> None:
    """A finding inside a module says which, by its dotted name."""
    path = tmp_path / "recipe.py"
    body = "return nn.functional.relu(h)"
    source = RECIPE.format(body=body, loss="F.mse_loss(model(x), y)")
    norm = (
        "\nclass Norm(nn.Module):\n    def forward(self, x):\n"
        "        return x / (x.norm(dim=-1).half() + 1e-8)[:, None]\n"
    )
    source = source.replace("\nclass Net", norm + "\nclass Net").replace(
        "nn.Linear(16, 16)", "nn.Sequential(nn.Linear(16, 16), Norm())"
    )
    path.write_text(source)
    found = check(path, "fp16").findings

    assert [(f.rule.split()[0], f.module) for f in found] == [("NC503", "inner.1")]


def test_no_trace_reads_only_the_source(tmp_path: Path) -> None:
    """`trace=False` takes no step, and says so by naming no precision."""
    path = tmp_path / "recipe.py"
    path.write_text(RECIPE.format(body="return h + 1e9", loss="F.mse_loss(model(x), y)"))
    record = check(path, "fp16", trace=False)

    assert (record.is_recipe, record.precision, record.findings) == (True, "", ())
    assert not any("NC5" in rule for rule in record.rules)


def test_fp32_has_nothing_to_trace(tmp_path: Path) -> None:
    """It is said, not done in silence."""
    path = tmp_path / "recipe.py"
    path.write_text(RECIPE.format(body="return h + 1e9", loss="F.mse_loss(model(x), y)"))

    assert check(path, "fp32").notes == ("no step was traced: fp32 computes in fp32",)


@pytest.mark.parametrize("name", ["tabular", "austen", "fashion"])
def test_the_built_in_recipes_are_clean(name: str) -> None:
    """In fp16, under CUDA's cast lists."""
    record = check(name, "fp16")

    assert (record.target, record.is_recipe, record.findings) == (name, True, ())
