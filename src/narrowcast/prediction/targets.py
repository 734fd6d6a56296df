"""What a prediction is for: a CPU, or a GPU that need not be there.

A target says in which precisions it can train, which kernels a trace has to imitate, and what
becomes of a traced step: on a CPU its ledger, on a GPU also what the allocator makes of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from narrowcast.errors import UnknownName, UnsupportedPrecision
from narrowcast.plan import Plan, plan_named
from narrowcast.precision.device import Capability, gpu_capabilities, policy_for_gpu
from narrowcast.precision.device import require, resolve_plan
from narrowcast.prediction.cpu_kernels import CpuKernels
from narrowcast.prediction.cuda_ops import cuda_kernels
from narrowcast.prediction.cuda_replay import allocator_of, assumptions_on, margin_of, tensors_of
from narrowcast.prediction.gpus import GPUS, Gpu
from narrowcast.prediction.trace import Stage, trace_from_start, trace_steps
from narrowcast.memory.measure import MemoryLedger
from narrowcast.profiling import Bench
from narrowcast.records.memory import MemoryRecord

__all__ = ["Cpu", "CudaGpu", "Target", "target_named"]
