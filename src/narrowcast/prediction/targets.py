"""What a prediction is for: a CPU, or a GPU that need not be there.

A target says in which precisions it can train, what a trace has to imitate, and what becomes of a
traced step: on a CPU its ledger, on a GPU also what the allocator makes of its events.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import torch

from narrowcast.errors import UnknownName, UnsupportedPrecision
from narrowcast.memory.measure import MemoryLedger
from narrowcast.plan import Plan, plan_named
from narrowcast.policy import POLICIES

# The table behind `capabilities` and `auto`, asked for a GPU that is not there.
from narrowcast.precision.device import (
    can,
    choose_for_cuda,
    cuda_capabilities,
    require,
    resolve_plan,
)
from narrowcast.prediction.cpu_kernels import CpuKernels
from narrowcast.prediction.cuda_ops import cuda_kernels
from narrowcast.prediction.gpu_record import on_gpu
from narrowcast.prediction.gpus import GPUS, Gpu, gpu_known_as
from narrowcast.prediction.trace import Stage, trace_from_start, trace_steps
from narrowcast.profiling import Bench
from narrowcast.records.memory import MemoryRecord

__all__ = ["Cpu", "CudaGpu", "Target", "target_named"]

_CPU = torch.device("cpu")


class Target(Protocol):
    """A device to predict for."""

    @property
    def name(self) -> str:
        """The name by which it is asked for."""

    @property
    def device(self) -> torch.device:
        """A device of its type."""

    def plan(self, precision: Plan | str) -> tuple[Plan, str]:
        """Return the plan and why it is this one; raises UnsupportedPrecision if it cannot be."""

    def traced(self, plan: Plan) -> Plan:
        """Return the plan that a trace, which is made of CPU tensors, has to follow."""

    def stage(self) -> Stage:
        """Return a stage on which operations on CPU tensors allocate as they do here."""

    def trace(self, bench: Bench, stage: Stage) -> tuple[MemoryRecord, MemoryLedger]:
        """Trace a step: what this device makes of it, and the ledger that it comes from."""


@dataclass(frozen=True)
class Cpu:
    """The CPU at hand: a trace is its prediction."""

    name: str = "cpu"

    @property
    def device(self) -> torch.device:
        return _CPU

    def plan(self, precision: Plan | str) -> tuple[Plan, str]:
        if isinstance(precision, str):
            return resolve_plan(precision, _CPU)
        require(precision.policy, _CPU)
        return precision, "as asked"

    def traced(self, plan: Plan) -> Plan:
        return plan

    def stage(self) -> Stage:
        return Stage(CpuKernels())

    def trace(self, bench: Bench, stage: Stage) -> tuple[MemoryRecord, MemoryLedger]:
        ledger = trace_steps(bench, stage)
        return ledger.record(), ledger


@dataclass(frozen=True)
class CudaGpu:
    """A GPU by its figures."""

    gpu: Gpu

    @property
    def name(self) -> str:
        return self.gpu.name

    @property
    def device(self) -> torch.device:
        return torch.device("cuda")

    def plan(self, precision: Plan | str) -> tuple[Plan, str]:
        able = cuda_capabilities(divmod(self.gpu.sm, 10))
        if precision == "auto":
            policy, why = choose_for_cuda(able)
            return plan_named(policy.name), why
        plan = plan_named(precision) if isinstance(precision, str) else precision
        if plan.policy.linears != "compute":
            raise UnsupportedPrecision(
                f"precision {plan.name!r} is not predicted for {self.gpu.title}: what its fp8 "
                "layers allocate on CUDA was never measured",
                hint="predict bf16, or bf16-split for fp8-split: fp8 saves time, not memory; on "
                "the GPU, `narrowcast memory` measures it",
            )
        if can(plan.policy, able):
            return plan, "as asked"
        formats = dict.fromkeys((plan.policy.compute, plan.policy.param))
        lacking = next(name for name in formats if name not in able or not able[name].supported)
        why = f": {able[lacking].why}" if lacking in able else ""
        possible = [name for name, policy in POLICIES.items() if can(policy, able)]
        raise UnsupportedPrecision(
            f"precision {plan.name!r} needs {lacking}, and {self.gpu.title} lacks it{why}",
            hint=f"this GPU can: {', '.join(possible)}; 'auto' chooses one and says why",
        )

    def traced(self, plan: Plan) -> Plan:
        if plan.policy.compute != "tf32":
            return plan
        return plan.with_policy(replace(plan.policy, compute="fp32"))  # held and saved alike

    def stage(self) -> Stage:
        return Stage(above=lambda: cuda_kernels(self.gpu))

    def trace(self, bench: Bench, stage: Stage) -> tuple[MemoryRecord, MemoryLedger]:
        return on_gpu(trace_from_start(bench, stage), bench, self.gpu)


def target_named(name: str) -> Target:
    """Return the target of this name. Raises UnknownName with the nearest match."""
    if name == "cpu":
        return Cpu()
    gpu = gpu_known_as(name)
    if gpu is None:
        raise UnknownName.of("device to predict for", name, ("cpu", *GPUS))
    return CudaGpu(gpu)
