"""What the device at hand can do in each precision, and the choice behind ``auto``.

A precision that a device cannot compute in is refused with a hint, never replaced by another. One
that it computes in badly is announced before the run, with figures measured on the spot.
"""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import torch
from torch import nn

from narrowcast import __version__
from narrowcast.errors import UnknownName, UnsupportedPrecision, UsageError
from narrowcast.plan import PLANS, Plan, plan_named
from narrowcast.policy import POLICIES, Policy
from narrowcast.precision import speed
from narrowcast.precision.float8 import CAPABILITY, require_torchao
from narrowcast.records.device import DeviceRecord, FormatSpeed
from narrowcast.records.run import Environment

__all__ = [
    "Capability",
    "can",
    "capabilities",
    "choose_for_cuda",
    "choose_policy",
    "cuda_capabilities",
    "device_at_hand",
    "environment",
    "measure_device",
    "require",
    "resolve_plan",
    "warnings_before_run",
]

_FORMATS = ("fp32", "tf32", "fp16", "bf16", "fp8")
_WITHOUT_CONVOLUTIONS = ("fp8",)
# Below this a difference is not worth a word: two runs of one measurement differ by as much.
_NOTABLE = 1.15
# A format is ten times slower only for want of a kernel, as fp16 weight gradients are on CPUs.
_HOPELESS = 10.0
_DOCTORS_PATIENCE_S = 0.12


@dataclass(frozen=True, kw_only=True)
class Capability:
    """Whether a device computes in a format at all, and with instructions of its own."""

    supported: bool
    native: bool
    why: str


def device_at_hand(name: str | None = None) -> torch.device:
    """Return the device of this name, or the best one present: CUDA, then the CPU.

    Raises UnknownName for a device we do not know, UsageError for one that is absent.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdecimal()):
        raise UnknownName.of("device", name, ("cpu", "cuda", "cuda:0"))
    if kind == "cuda" and not torch.cuda.is_available():
        built = torch.version.cuda or "no CUDA at all"
        raise UsageError(
            f"device {name!r} was asked for, but torch {torch.__version__} (built with {built}) "
            "finds no CUDA device",
            hint="use --device cpu, or install a CUDA build of torch and check `nvidia-smi`",
        )
    if index and int(index) >= (1 if kind == "cpu" else torch.cuda.device_count()):
        count = 1 if kind == "cpu" else torch.cuda.device_count()
        raise UsageError(
            f"device {name!r} was asked for, but there is {count} {kind} device",
            hint=f"valid: {', '.join(f'{kind}:{i}' for i in range(count))}",
        )
    return torch.device(name)


def capabilities(device: torch.device) -> dict[str, Capability]:
    """Say for each compute format whether the device has it, from what the device reports."""
    if device.type == "cuda":
        return cuda_capabilities(torch.cuda.get_device_capability(device))
    return _cpu_capabilities(_cpu_features())


def cuda_capabilities(version: tuple[int, int]) -> dict[str, Capability]:
    """Compute capability 7.0 brought tensor cores for fp16, 8.0 those for bf16 and TF32.

    NVIDIA, CUDA C++ Programming Guide, table of features per compute capability.
    """
    cc = f"compute capability {version[0]}.{version[1]}"
    volta, ampere = version >= (7, 0), version >= (8, 0)
    return {
        "fp32": Capability(supported=True, native=True, why=cc),
        "tf32": Capability(supported=ampere, native=ampere, why=f"{cc}; TF32 needs 8.0"),
        "fp16": Capability(
            supported=version >= (5, 3), native=volta, why=f"{cc}; fp16 tensor cores need 7.0"
        ),
        # Below 8.0 torch emulates bf16 through fp32: it runs, slowly, and saves memory only.
        "bf16": Capability(supported=ampere, native=ampere, why=f"{cc}; bf16 needs 8.0"),
        "fp8": Capability(
            supported=version >= CAPABILITY,
            native=version >= CAPABILITY,
            why=f"{cc}; fp8 needs {CAPABILITY[0]}.{CAPABILITY[1]}",
        ),
    }


def _cpu_features() -> dict[str, bool]:
    """Read the instruction sets that torch found, such as avx512_bf16 and amx_tile."""
    found = torch.cpu.get_capabilities()
    return {name: value for name, value in found.items() if isinstance(value, bool)}


def _cpu_capabilities(features: Mapping[str, bool]) -> dict[str, Capability]:
    """Torch computes in fp16 and bf16 on any CPU; the question is with which instructions."""

    def sixteen_bits(name: str) -> Capability:
        found = sorted(f for f, present in features.items() if present and name in f)
        why = f"instructions: {', '.join(found)}" if found else f"no {name} instructions"
        return Capability(supported=True, native=bool(found), why=why)

    return {
        "fp32": Capability(supported=True, native=True, why="every CPU computes in fp32"),
        "tf32": Capability(supported=False, native=False, why="TF32 exists on CUDA devices only"),
        "fp16": sixteen_bits("fp16"),
        "bf16": sixteen_bits("bf16"),
        "fp8": Capability(supported=False, native=False, why="fp8 exists on CUDA devices only"),
    }


def require(policy: Policy, device: torch.device) -> None:
    """Raise UnsupportedPrecision unless the device computes and keeps weights in its formats."""
    able = capabilities(device)
    possible = [n for n, p in POLICIES.items() if can(p, able)]
    for role, name in (("computes", policy.compute), ("keeps weights", policy.param)):
        if name not in able or not able[name].supported:
            why = able[name].why if name in able else "torch has no such matrix products"
            raise UnsupportedPrecision(
                f"precision {policy.name!r} {role} in {name}, and {_device_name(device)} "
                f"({device}) cannot: {why}",
                hint=f"this device can: {', '.join(possible)}; 'auto' chooses one and says why",
            )
    if policy.linears == "fp8":
        _require_fp8(policy, able["fp8"], device)


def _require_fp8(policy: Policy, able: Capability, device: torch.device) -> None:
    if not able.supported:
        emulated = f"{policy.name}-emulated"
        emulated = emulated if emulated in PLANS else "fp8-emulated"
        raise UnsupportedPrecision(
            f"precision {policy.name!r} multiplies in fp8, and {_device_name(device)} ({device}) "
            f"cannot: {able.why}",
            hint=f"--precision {emulated} shows what fp8 does to the result, without its speed; "
            "bf16 is what this device can",
        )
    require_torchao(policy)


def can(policy: Policy, able: Mapping[str, Capability]) -> bool:
    """Whether a device with these capabilities computes and keeps weights as the policy asks."""
    formats = (policy.compute, policy.param, *(("fp8",) if policy.linears == "fp8" else ()))
    return all(f in able and able[f].supported for f in formats)


def resolve_plan(name: str, device: torch.device) -> tuple[Plan, str]:
    """Return the plan of this name or alias, and why; ``auto`` chooses one for the device.

    Raises UnknownName, or UnsupportedPrecision if the device cannot.
    """
    if name == "auto":
        policy, why = choose_policy(device)
        return plan_named(policy.name), why
    plan = plan_named(name)
    require(plan.policy, device)
    return plan, "as asked"


@dataclass(frozen=True, kw_only=True)
class _Timing:
    """Seconds of one matrix product and of one convolution step, in a format and in fp32."""

    matmul: float
    matmul_fp32: float
    conv: float | None = None
    conv_fp32: float | None = None


def _time(
    device: torch.device, name: str, *, conv: bool = False, patience_s: float = 0.05
) -> _Timing:
    matmul = partial(speed.matmul_seconds, device, patience_s=patience_s)
    convolve = partial(speed.conv_training_seconds, device, patience_s=patience_s)
    return _Timing(
        matmul_fp32=matmul("fp32"),
        matmul=matmul(name),
        conv_fp32=convolve("fp32") if conv else None,
        conv=convolve(name) if conv else None,
    )


def choose_policy(device: torch.device) -> tuple[Policy, str]:
    """Choose the precision for ``auto``, with the reason in words and measured figures."""
    able = capabilities(device)
    return (
        choose_for_cuda(able) if device.type == "cuda" else _choose_for_cpu(_time(device, "bf16"))
    )


def choose_for_cuda(able: Mapping[str, Capability]) -> tuple[Policy, str]:
    """Choose the precision for ``auto`` on a GPU with these capabilities, with the reason."""
    if able["bf16"].native:
        return POLICIES["bf16"], (
            f"bf16 runs on tensor cores here ({able['bf16'].why}) and has fp32's range, "
            "so that no loss scaling is needed"
        )
    if able["fp16"].native:
        return POLICIES["fp16"], (
            f"fp16 runs on tensor cores here and bf16 does not ({able['bf16'].why})"
        )
    return POLICIES["fp32"], f"no tensor cores for 16-bit formats here ({able['fp16'].why})"


def _choose_for_cpu(bf16: _Timing) -> tuple[Policy, str]:
    ratio = bf16.matmul / bf16.matmul_fp32
    measured = f"measured: {_ms(bf16.matmul)} against {_ms(bf16.matmul_fp32)}"
    if ratio < 1 / _NOTABLE:
        return POLICIES["bf16"], (
            f"bf16 matrix products are {1 / ratio:.1f} times as fast as fp32 on this CPU "
            f"({measured}), and bf16 has fp32's range, so that no loss scaling is needed"
        )
    verdict = f"{_times(ratio)} slower than" if ratio > _NOTABLE else "about as fast as"
    return POLICIES["fp32"], (
        f"bf16 matrix products are {verdict} fp32 on this CPU ({measured}): a 16-bit precision "
        "would save memory, not time"
    )


def warnings_before_run(policy: Policy, device: torch.device, model: nn.Module) -> tuple[str, ...]:
    """Say what this device does badly in this precision, measured now (under half a second).

    Only what the model uses is measured: convolutions if it has any.
    """
    if policy.compute not in ("fp16", "bf16"):
        return ()
    convolves = any(isinstance(m, nn.modules.conv._ConvNd) for m in model.modules())
    return _cautions(policy.compute, device, _time(device, policy.compute, conv=convolves))


def _cautions(name: str, device: torch.device, timing: _Timing) -> tuple[str, ...]:
    """Turn what is notably slower than fp32 into sentences with the figures."""
    here = "this CPU" if device.type == "cpu" else "this device"
    pairs = (
        (f"{name} convolutions train", timing.conv, timing.conv_fp32, "one 3x3 layer"),
        (f"{name} matrix products run", timing.matmul, timing.matmul_fp32, "one product"),
    )
    return tuple(
        f"{what} {_times(slow / fast)} slower than fp32 on {here} (measured on {sample}: "
        f"{_ms(slow)} against {_ms(fast)}); {_advice(slow / fast)}"
        for what, slow, fast, sample in pairs
        if slow is not None and fast is not None and slow > _NOTABLE * fast
    )


def _times(ratio: float) -> str:
    return f"{ratio:.0f} times" if ratio >= 10 else f"{ratio:.1f} times"


def _advice(ratio: float) -> str:
    return "choose another precision" if ratio >= _HOPELESS else "it saves memory, not time"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"


def measure_device(device: torch.device) -> DeviceRecord:
    """Measure every format on the device (a few seconds) and recommend a precision."""
    start = time.perf_counter()
    able = capabilities(device)
    timings = {
        f: _time(device, f, conv=f not in _WITHOUT_CONVOLUTIONS, patience_s=_DOCTORS_PATIENCE_S)
        for f in _FORMATS
        if able[f].supported
    }
    cpu = device.type == "cpu"
    policy, why = _choose_for_cpu(timings["bf16"]) if cpu else choose_for_cuda(able)
    return DeviceRecord(
        device=str(device),
        name=_device_name(device),
        memory_bytes=_memory_bytes(device),
        threads=torch.get_num_threads(),
        formats=tuple(_format_speed(f, able[f], timings.get(f), device) for f in _FORMATS),
        recommended=policy.name,
        why=why,
        cautions=tuple(
            caution
            for f in ("fp16", "bf16")
            if f in timings
            for caution in _cautions(f, device, timings[f])
        ),
        seconds=time.perf_counter() - start,
        environment=environment(device),
    )


def _format_speed(
    name: str, able: Capability, timing: _Timing | None, device: torch.device
) -> FormatSpeed:
    if timing is None:
        return FormatSpeed(format=name, supported=False, native=False, why=able.why)
    reference = name == "fp32"  # measured twice, and equal to itself
    return FormatSpeed(
        format=name,
        supported=True,
        native=able.native,
        matmul_gflops=speed.matmul_flops(device) / timing.matmul / 1e9,
        matmul_relative=1.0 if reference else timing.matmul_fp32 / timing.matmul,
        conv_relative=1.0 if reference else _ratio(timing.conv_fp32, timing.conv),
        why=able.why,
    )


def _ratio(fp32: float | None, other: float | None) -> float | None:
    return None if fp32 is None or other is None else fp32 / other


def environment(device: torch.device) -> Environment:
    """Describe the machine and the versions that a figure is obtained with."""
    return Environment(
        device=str(device),
        device_name=_device_name(device),
        threads=torch.get_num_threads(),
        platform=platform.platform(),
        python=platform.python_version(),
        torch=str(torch.__version__),  # a subclass of str otherwise
        narrowcast=__version__,
        commit=_commit(),
    )


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()


@lru_cache(maxsize=1)
def _cpu_name() -> str:
    """Read the model name where the system tells it; platform.processor() is empty on Linux."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _memory_bytes(device: torch.device) -> int:
    """Return what may be used: the device's memory, or the machine's within a container's limit."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")  # cgroup v2; "max" means none
    text = limit.read_text().strip() if limit.exists() else "max"
    return min(physical, int(text)) if text.isdecimal() else physical


@lru_cache(maxsize=1)
def _commit() -> str:
    """Return the commit of the checkout that we run from; empty when installed without one."""
    root = Path(__file__).resolve().parents[3]
    if not (root / ".git").exists():
        return ""
    asked = subprocess.run(
        ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"],
        capture_output=True,
        text=True,
        check=False,
    )
    return asked.stdout.strip()
