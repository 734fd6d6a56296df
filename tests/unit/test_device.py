"""Facts about what a device can do, what is refused, what is chosen and what is said beforehand."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from narrowcast.cli import doctor
from narrowcast.errors import UnknownName, UnsupportedPrecision, UsageError
from narrowcast.plan import PLANS
from narrowcast.policy import POLICIES, policy_named
from narrowcast.precision import device as unit
from narrowcast.precision import speed
from narrowcast.precision.device import (
    capabilities,
    choose_policy,
    device_at_hand,
    environment,
    measure_device,
    require,
    resolve_plan,
    warnings_before_run,
)
from narrowcast.records.codec import dumps, loads
from narrowcast.records.device import DeviceRecord

CPU = torch.device("cpu")
MLP = nn.Linear(2, 2)
CNN = nn.Sequential(nn.Conv2d(1, 1, 3))

CHECKOUT = (Path(__file__).parents[2] / ".git").exists()


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, str], float]:
    """Replace the measurement by a table of seconds that a test may change."""
    table = {("matmul", f): 1e-3 for f in ("fp32", "tf32", "fp16", "bf16")}
    table |= {("conv", f): 2e-3 for f in ("fp32", "tf32", "fp16", "bf16")}
    for what in ("matmul", "conv"):
        name = "matmul_seconds" if what == "matmul" else "conv_training_seconds"
        monkeypatch.setattr(speed, name, lambda device, f, *, patience_s, what=what: table[what, f])
    return table


@pytest.fixture
def volta(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """A GPU of compute capability 7.0, which multiplies in fp16 and not in bf16."""
    return gpu(monkeypatch, (7, 0))


def gpu(monkeypatch: pytest.MonkeyPatch, version: tuple[int, int]) -> torch.device:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: version)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Tesla T800")
    return torch.device("cuda")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a fact about machines without CUDA")
def test_without_a_gpu_the_cpu_is_at_hand_and_cuda_is_refused() -> None:
    """Nothing asked: the CPU. CUDA asked: an error with a way out, not the CPU."""
    assert device_at_hand() == CPU
    with pytest.raises(UsageError, match="finds no CUDA device") as error:
        device_at_hand("cuda")

    assert "--device cpu" in error.value.hint


@pytest.mark.parametrize("name", ["cpu", "cpu:0"])
def test_the_cpu_can_be_asked_for(name: str) -> None:
    """The CPU has one index."""
    assert device_at_hand(name).type == "cpu"


def test_a_device_out_of_range_is_an_error() -> None:
    """The message says how many there are."""
    with pytest.raises(UsageError, match="there is 1 cpu device"):
        device_at_hand("cpu:3")


@pytest.mark.parametrize("name", ["gpu", "cdua", "cuda:x", ""])
def test_an_unknown_device_is_an_error(name: str) -> None:
    """A name that is no device lists the valid ones."""
    with pytest.raises(UnknownName, match="cpu, cuda"):
        device_at_hand(name)


@pytest.mark.parametrize("name", [n for n in POLICIES if n not in ("tf32", "fp8")])
def test_a_cpu_runs_every_precision_but_tf32_and_fp8(name: str) -> None:
    """fp16 included: torch has autocast and a loss scaler for it on CPUs."""
    require(policy_named(name), CPU)


def test_tf32_on_a_cpu_is_refused() -> None:
    """The error says what the device can, instead of running fp32 under the name of tf32."""
    with pytest.raises(UnsupportedPrecision, match="TF32 exists on CUDA devices only") as error:
        resolve_plan("tf32", CPU)

    assert error.value.exit_code == 3
    assert "fp32, fp16, bf16, bf16-true" in error.value.hint


@pytest.mark.parametrize("name", ["bf16", "bf16-true", "tf32"])
def test_a_gpu_before_ampere_refuses_bf16(name: str, volta: torch.device) -> None:
    """torch would emulate bf16 there; we refuse, and name what the device can do."""
    with pytest.raises(UnsupportedPrecision, match=r"compute capability 7\.0") as error:
        require(policy_named(name), volta)

    assert "this device can: fp32, fp16;" in error.value.hint


@pytest.mark.parametrize(
    ("version", "chosen"), [((9, 0), "bf16"), ((8, 0), "bf16"), ((7, 5), "fp16"), ((6, 1), "fp32")]
)
def test_auto_chooses_by_generation(
    version: tuple[int, int], chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """bf16 where it has tensor cores, else fp16 where that has, else fp32; each with its reason."""
    policy, why = choose_policy(gpu(monkeypatch, version))

    assert policy.name == chosen
    assert f"compute capability {version[0]}.{version[1]}" in why


@pytest.mark.parametrize(
    ("bf16_ms", "chosen", "said"),
    [
        (0.25, "bf16", "4.0 times as fast as fp32"),
        (0.95, "fp32", "about as fast as fp32"),
        (2.0, "fp32", "2.0 times slower than fp32"),
    ],
)
def test_auto_on_a_cpu_rests_on_a_measurement(
    bf16_ms: float, chosen: str, said: str, figures: dict[tuple[str, str], float]
) -> None:
    """bf16 only where it is measured to be notably faster; the reason quotes both figures."""
    figures["matmul", "bf16"] = bf16_ms / 1e3

    policy, why = resolve_plan("auto", CPU)

    assert policy.name == chosen
    assert said in why
    assert f"{bf16_ms:.3g} ms against 1 ms" in why


def test_names_and_aliases_are_as_asked() -> None:
    """No reason is invented where the user decided."""
    assert resolve_plan("bf16-mixed", CPU) == (PLANS["bf16"], "as asked")


def test_an_unknown_precision_names_the_nearest() -> None:
    """The error of the policy table reaches the user."""
    with pytest.raises(UnknownName, match="did you mean 'bf16'"):
        resolve_plan("bf1", CPU)


def test_slow_convolutions_are_announced(figures: dict[tuple[str, str], float]) -> None:
    """fp16 convolutions on a CPU: the factor and both times, and the advice to leave fp16."""
    figures["conv", "fp16"] = 0.58

    said = warnings_before_run(POLICIES["fp16"], CPU, CNN)

    measured = "(measured on one 3x3 layer: 580 ms against 2 ms)"
    advice = "choose another precision"
    assert said == (
        f"fp16 convolutions train 290 times slower than fp32 on this CPU {measured}; {advice}",
    )


def test_slow_products_are_announced(figures: dict[tuple[str, str], float]) -> None:
    """bf16 without fast hardware saves memory and not time, and says so."""
    figures["matmul", "bf16"] = 1.7e-3

    said = warnings_before_run(POLICIES["bf16"], CPU, MLP)

    assert len(said) == 1
    assert said[0].startswith("bf16 matrix products run 1.7 times slower than fp32")
    assert said[0].endswith("it saves memory, not time")


@pytest.mark.parametrize("name", ["fp32", "fp16", "bf16", "bf16-true"])
def test_equal_speed_is_not_worth_a_word(name: str, figures: dict[tuple[str, str], float]) -> None:
    """Differences within the noise of such a measurement are no warning."""
    figures["matmul", POLICIES[name].compute] = 1.1e-3

    assert warnings_before_run(POLICIES[name], CPU, CNN) == ()


def test_only_what_the_model_uses_is_measured(figures: dict[tuple[str, str], float]) -> None:
    """A model without convolutions is neither timed nor warned about them."""
    figures["conv", "fp16"] = 1.0
    del figures["conv", "fp32"]

    assert warnings_before_run(POLICIES["fp16"], CPU, MLP) == ()


@pytest.mark.parametrize(
    ("features", "native"),
    [
        ({}, {"fp32"}),
        ({"avx512_bf16": True, "avx512_fp16": False}, {"fp32", "bf16"}),
        ({"avx512_bf16": False, "amx_fp16": True}, {"fp32", "fp16"}),
    ],
)
def test_cpu_hardware_is_read_from_its_features(
    features: dict[str, bool], native: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A format is native where the CPU has instructions named after it."""
    monkeypatch.setattr(unit, "_cpu_features", lambda: features)

    found = capabilities(CPU)

    assert {f for f, c in found.items() if c.native} == native


def test_the_measurement_is_real_and_leaves_no_trace() -> None:
    """Real times are positive; threads, TF32 switches and gradients are as before."""
    threads, grad = torch.get_num_threads(), torch.is_grad_enabled()

    seconds = speed.matmul_seconds(CPU, "bf16", patience_s=0.0)
    conv = speed.conv_training_seconds(CPU, "fp32", patience_s=0.0)

    assert 0 < seconds < 60
    assert 0 < conv < 60
    assert (torch.get_num_threads(), torch.is_grad_enabled()) == (threads, grad)


def test_the_record_of_a_device_travels_as_json(monkeypatch: pytest.MonkeyPatch) -> None:
    """This very CPU: every format judged, one recommended, equal after JSON and back."""
    monkeypatch.setattr(unit, "_DOCTORS_PATIENCE_S", 0.0)

    record = measure_device(CPU)

    assert [f.format for f in record.formats] == ["fp32", "tf32", "fp16", "bf16", "fp8"]
    assert record.recommended in ("fp32", "bf16")
    by_name = {f.format: f for f in record.formats}
    assert by_name["fp32"].matmul_relative == by_name["fp32"].conv_relative == 1.0
    for name in ("tf32", "fp8"):
        assert not by_name[name].supported
        assert by_name[name].matmul_gflops is None
    assert (by_name["bf16"].matmul_gflops or 0) > 0
    assert record.memory_bytes > 2**20
    assert loads(DeviceRecord, dumps(record)) == record


def test_the_environment_names_versions_and_machine() -> None:
    """A figure can be traced to the software and the processor that it came from."""
    found = environment(CPU)

    assert found.torch == torch.__version__
    assert found.threads == torch.get_num_threads()
    assert found.device_name.strip()
    commit = r"[0-9a-f]{7,40}(-dirty)?" if CHECKOUT else ""
    assert re.fullmatch(commit, found.commit)


@pytest.fixture
def app() -> Any:
    import typer

    application = typer.Typer()
    application.callback()(lambda: None)
    doctor.register(application)
    return application


def test_doctor_prints_a_table_and_a_recommendation(
    app: Any, figures: dict[tuple[str, str], float]
) -> None:
    """Every format has a row; what is slow is a caution; the advice comes with its reason."""
    figures["conv", "fp16"] = 0.58

    result = CliRunner().invoke(app, ["doctor", "--device", "cpu"], env={"COLUMNS": "200"})

    assert result.exit_code == 0, result.output
    rows = {line.split()[0]: line for line in result.stdout.splitlines() if line.strip()}
    assert "no: TF32 exists on CUDA devices only" in rows["tf32"]
    assert "1.00x" in rows["bf16"]
    assert "0.003x" in rows["fp16"]
    assert "290 times slower" in rows["caution"]
    assert rows["use"].split()[1] == "fp32:"


def test_doctor_writes_json_alone_to_stdout(
    app: Any, figures: dict[tuple[str, str], float]
) -> None:
    """--json -: stdout is the record and nothing else."""
    result = CliRunner().invoke(app, ["doctor", "--device", "cpu", "--json", "-"])

    record = loads(DeviceRecord, result.stdout)
    assert record.formats[0].matmul_gflops == pytest.approx(2 * 384**3 / 1e-3 / 1e9)
