"""fp8 through torchao on hardware that has it."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from torch import nn

from narrowcast.engine.engine import Engine
from narrowcast.engine.stores import planned_optimizer
from narrowcast.plan import plan_named
from narrowcast.precision.executed import ExecutedDtypes, honoured
from narrowcast.precision.float8 import CAPABILITY

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _has_fp8() -> None:
    if find_spec("torchao") is None:
        pytest.skip("needs torchao (pip install narrowcast[fp8])")
    if torch.cuda.get_device_capability() < CAPABILITY:
        pytest.skip(f"fp8 needs compute capability {CAPABILITY[0]}.{CAPABILITY[1]}")


def trained(precision: str, rows: int) -> tuple[list[float], ExecutedDtypes, Engine]:
    """Take five steps of a small net on fixed data."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64), nn.Linear(64, 10))
    plan = plan_named(precision)
    optimizer = planned_optimizer(torch.optim.AdamW(model.parameters(), lr=1e-3), model, plan)
    engine = Engine(model, optimizer, plan, device="cuda")
    x = torch.randn(rows, 64, device="cuda")
    targets = torch.randint(0, 10, (rows,), device="cuda")
    losses, executed = [], ExecutedDtypes()
    for step in range(5):
        executed = ExecutedDtypes()
        with executed:
            with engine.forward():
                loss = nn.functional.cross_entropy(model(x).float(), targets)
            engine.backward(loss)
        assert engine.step().applied, step
        losses.append(loss.item())
    return losses, executed, engine


@pytest.mark.parametrize("rows", [16, 21])
@pytest.mark.parametrize("precision", ["fp8", "fp8-split"])
def test_fp8_is_carried_out_and_agrees_with_its_emulation(precision: str, rows: int) -> None:
    """Products run in fp8, and the losses are those of the same roundings done in fp32.

    Rows that are no multiple of 16 included. Both round alike; tensor cores add in another order
    and, in the forward pass, with the fast accumulation that torchao asks for. No formula bounds
    its error: 5 per cent of a loss is a first guess, made without the hardware.
    """
    losses, executed, engine = trained(precision, rows)
    emulated, counted, _ = trained(f"{precision}-emulated", rows)
    is_honoured, notes = honoured(engine.policy, executed.counts)

    assert is_honoured, notes
    assert executed.counts["matmul"]["fp8"] == 6
    assert counted.counts["matmul"]["fp8-emulated"] == 5  # of which the first layer's dx is none
    assert losses == pytest.approx(emulated, rel=0.05)
    assert losses[-1] < losses[0]


def test_the_device_is_timed_in_fp8() -> None:
    """`narrowcast doctor` has a line for it."""
    from narrowcast.precision.device import measure_device

    record = measure_device(torch.device("cuda"))

    assert next(f for f in record.formats if f.format == "fp8").matmul_gflops
